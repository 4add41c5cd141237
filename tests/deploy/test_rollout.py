"""From candidate to stable and back, with a real registry and archive: each step, each refusal, each by its words."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from rollout_world import MARA, SHUFFLED, TRAINER, MakeAdapter, Ring, answer

from deploy.approval import approve, stop
from deploy.config import GateSettings, RolloutSettings
from deploy.controller import Controller
from deploy.manifest import vllm_name
from deploy.votes import votes
from feedback import audit
from feedback.errors import NotAllowed, NotFound, PromotionRefused
from feedback.events import FeedbackCleared, new_id
from feedback.keys import ApiKey


@pytest.fixture
def ring(tmp_path: Path, tiny_policy: Path, make_adapter: MakeAdapter) -> Iterator[Ring]:
    made = Ring(tmp_path / "data", tiny_policy, make_adapter)
    yield made
    made.stores.close()
    made.stores.engine.dispose()


def test_a_candidate_reaches_everybody_only_through_gates_people_and_a_person(ring: Ring) -> None:
    adapter = ring.candidate(1)
    ring.look()  # begins the rollout
    assert (ring.running().state, ring.registry.routing().canary) == ("gates", None)
    ring.look()  # the replica loads it, the gates pass
    table = ring.registry.routing()
    assert ring.running().state == "canary"
    assert (table.canary and table.canary.adapter, table.weight, table.stable.adapter) == (adapter, 0.3, ring.base)
    assert table.baseline_name in ring.registry.held_everywhere()

    ring.look()
    assert ring.running().reason.startswith("none of 0 raters has given 3 votes yet; evidence 1, needed >= 40: about ")
    with pytest.raises(PromotionRefused, match=r"does not wait for approval; its rollout is 'canary': none of 0 raters"):
        approve(ring.registry, ring.rollout.settings, adapter, MARA)

    ring.compare(raters=12, votes=3)
    ring.look()
    assert ring.running().state == "awaiting"
    assert "the canary wins 100.0%" in ring.running().reason and "plaudit adapters promote" in ring.running().reason
    assert ring.registry.routing().stable.adapter == ring.base, "nobody has approved yet"

    approve(ring.registry, ring.rollout.settings, adapter[:12], MARA)
    table = ring.registry.routing()
    assert (table.stable.adapter, table.previous and table.previous.adapter, table.canary) == (adapter, ring.base, None)
    assert {vllm_name(adapter), vllm_name(ring.base)} == set(ring.registry.wanted()), "previous stays loaded"


def test_rollback_gives_the_old_one_back_and_ends_what_runs(ring: Ring) -> None:
    with pytest.raises(NotFound, match="'previous' points at nothing; nothing was promoted yet"):
        ring.registry.rollback("mara", "to see")
    first = ring.to_approval(1)
    approve(ring.registry, ring.rollout.settings, first, MARA)
    second = ring.candidate(2)
    ring.look(2)
    assert ring.running().adapter == second
    before = ring.registry.routing().version
    assert ring.registry.rollback("mara", "it forgot the menu") == ring.base
    table = ring.registry.routing()
    assert (table.stable.adapter, table.previous and table.previous.adapter, table.canary) == (ring.base, first, None)
    assert table.version > before
    assert ring.registry.active_rollout() is None
    assert ring.registry.adapter(first).reason == "rolled back by mara: it forgot the menu"
    assert ring.registry.adapter(second).state == "refused"


def test_a_control_on_shuffled_labels_reaches_nobody(ring: Ring) -> None:
    control = ring.candidate(1, SHUFFLED)
    ring.look(3)
    assert ring.registry.active_rollout() is None
    ended = ring.registry.rollouts(control)[-1]
    assert (ended.state, ended.canary_ms) == ("stopped", None)
    assert ended.reason.startswith("reward model: foresees 420 ratings of unseen prompts by +0.000 nats each, at least -0.010, needed > ")
    with pytest.raises(PromotionRefused, match=r"its rollout is 'stopped': reward model: foresees 420"):
        approve(ring.registry, ring.rollout.settings, control, MARA)
    ring.look(2)
    assert len(ring.registry.rollouts()) == 1, "one that was refused is not tried again"


def test_without_an_evaluation_nothing_begins(ring: Ring) -> None:
    adapter = ring.candidate(1, None)
    ring.look(2)
    assert ring.registry.rollouts() == []
    with pytest.raises(PromotionRefused, match="it is 'candidate': registered"):
        approve(ring.registry, ring.rollout.settings, adapter, MARA)


@pytest.mark.parametrize(
    ("key", "error", "said"),
    [
        (TRAINER, NotAllowed, "adapters:promote"),
        (MARA.model_copy(update={"person": False}), PromotionRefused, "names no person"),
        (MARA.model_copy(update={"owner": "trainer"}), PromotionRefused, "'trainer' registered .* another person's key is needed"),
    ],
)
def test_who_may_not_approve(ring: Ring, key: ApiKey, error: type[Exception], said: str) -> None:
    adapter = ring.to_approval(1)
    with pytest.raises(error, match=said):
        approve(ring.registry, ring.rollout.settings, adapter, key)
    assert ring.running().state == "awaiting"
    assert ring.registry.routing().stable.adapter == ring.base


def test_many_votes_of_few_raters_do_not_win(ring: Ring) -> None:
    ring.candidate(1)
    ring.look(2)
    ring.compare(raters=5, votes=20)
    ring.look()
    # Five raters who always prefer it: at most the bet 1.96 won five times, (1 + 0.98)^5 = 30.4 < 40.
    assert ring.running().state == "canary"
    assert "with 5 raters" in ring.running().reason and "more raters like these" in ring.running().reason


def test_a_canary_that_people_do_not_like_ends(ring: Ring) -> None:
    adapter = ring.candidate(1)
    ring.look(2)
    ring.compare(raters=24, votes=3, prefers="baseline")
    ring.look()
    ended = ring.registry.rollouts(adapter)[-1]
    assert ended.state == "stopped"
    assert "wins: the canary wins 0.0% (0.0% to " in ended.reason and "so it will not win" in ended.reason
    assert ring.registry.routing().stable.adapter == ring.base


def test_a_canary_that_fails_more_often_is_stopped(ring: Ring) -> None:
    adapter = ring.candidate(1)
    ring.look(2)
    for person in range(60):
        failing = answer(ring.running(), f"p{person}", "canary", "error" if person % 2 else "stop")
        ring.happened(*failing, *answer(ring.running(), f"q{person}", "baseline", "stop"))
    ring.look()
    assert ring.registry.active_rollout() is None
    ended = ring.registry.rollouts(adapter)[-1]
    assert ended.reason.startswith(
        "guardrail errors: answers that broke off: +50.0 points against the baseline, surely +15.0 points, worse than +1.0"
    )
    assert ring.registry.routing().canary is None


def test_a_person_stops_a_canary(ring: Ring) -> None:
    with pytest.raises(NotFound, match="no rollout is running"):
        stop(ring.registry, "to see", MARA)
    adapter = ring.candidate(1)
    ring.look(2)
    ended = stop(ring.registry, "complaints", MARA)
    assert (ended.state, ended.adapter, ended.reason) == ("stopped", adapter, "stopped by mara: complaints")
    assert ring.registry.routing().canary is None


def test_what_no_replica_loads_is_refused_with_the_reason(ring: Ring) -> None:
    ring.rollout.gates = GateSettings(probe_timeout_s=0.001)
    adapter = ring.candidate(1)
    weights = ring.registry.adapter(adapter).path / "adapter_model.safetensors"
    weights.chmod(0o644)
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    ring.look(3)
    ended = ring.registry.rollouts(adapter)[-1]
    assert (ended.state, ended.canary_ms) == ("stopped", None)
    assert ended.reason.startswith(f"loads: no replica has loaded {vllm_name(adapter)} within 0.001 s")


def test_only_the_leader_acts_and_its_successor_goes_on(ring: Ring) -> None:
    ring.candidate(1)
    ring.look()
    other = Controller(ring.rollout, ring.stores.log)
    other.holder = "another"
    assert not asyncio.run(other.tick()), "the lease is taken"
    ring.rollout.settings = RolloutSettings(weights=(0.3,), lease_s=0.001)
    ring.look()
    assert ring.running().state == "canary"
    assert asyncio.run(other.tick())
    assert ring.running().state == "canary", "it read where its predecessor was"


def test_every_change_is_audited_and_told_to_the_log(ring: Ring) -> None:
    adapter = ring.to_approval(1)
    approve(ring.registry, ring.rollout.settings, adapter, MARA)
    ring.look()
    actions = [row["action"] for row in audit.read(ring.stores.engine)]
    assert actions == [
        "adapter.registered",
        "alias.moved",
        "adapter.registered",
        "adapter.attested",
        "rollout.started",
        "rollout.canary",
        "rollout.awaiting",
        "rollout.promoted",
    ]
    assert ring.registry.unsent() == []
    ring.stores.ingest()
    approved = ring.stores.archive.events("rollout.approved")
    assert [(event.actor, event.adapter) for event in approved if event.type == "rollout.approved"] == [("mara", adapter)]


def test_a_vote_that_is_changed_after_its_rater_counts_changes_nothing(ring: Ring) -> None:
    ring.candidate(1)
    ring.look(2)
    running = ring.running()
    ring.compare(raters=2, votes=3)
    before = votes(ring.stores.archive, running.id, 3)
    assert before == {"rater 0": [1.0, 1.0, 1.0], "rater 1": [1.0, 1.0, 1.0]}
    given = [each for each in ring.stores.archive.current() if each.rater == "rater 0"]
    other = {"a": "b", "b": "a"}[given[0].value or "a"]
    ring.happened(given[0].model_copy(update={"event_id": new_id(), "value": other, "stamp": 0}))
    ring.happened(FeedbackCleared(event_id=new_id(), target=given[1].target, rater="rater 0", slot="choice"))
    assert votes(ring.stores.archive, running.id, 3) == before
    # Who has not given enough may still change their mind: five are asked for, one is changed, one is taken back.
    assert votes(ring.stores.archive, running.id, 5)["rater 0"] in ([0.0, 1.0], [1.0, 0.0])
