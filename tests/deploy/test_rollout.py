"""From candidate to stable and back, with a real registry and archive: each step, each refusal, each by its words."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from deploy.config import GateSettings, RolloutSettings
from deploy.controller import Controller
from deploy.engine import Scripted
from deploy.loading import Intake
from deploy.manifest import vllm_name
from deploy.records import RolloutRecord
from deploy.registry import Registry
from deploy.replica import ReplicaAgent
from deploy.rollout import Rollout, approve, stop
from deploy.votes import votes
from feedback import audit
from feedback.config import FeedbackSettings, Settings
from feedback.errors import NotAllowed, NotFound, PromotionRefused
from feedback.events import Arm, Event, FeedbackCleared, FeedbackGiven, InteractionFinished, InteractionStarted, Side, new_id
from feedback.keys import ApiKey
from feedback.stores import Stores, open_stores

MakeAdapter = Callable[[Path, Path, int], tuple[str, Path]]
TRAINER = ApiKey(id="t", owner="trainer", person=False, scopes=("adapters:write",), created_ms=0)
MARA = ApiKey(id="m", owner="mara", person=True, scopes=("adapters:promote",), created_ms=0)
LEARNED: dict[str, Any] = {
    "reward_gain_base": {"mean": 0.8, "low": 0.5, "high": 1.1, "n": 24},
    "reward_gain_stable": {"mean": 0.8, "low": 0.5, "high": 1.1, "n": 24},
    "likelihood_gain": {"mean": 0.05, "low": 0.02, "high": 0.08, "n": 420},
    "kl_nats": 2.5,
    "kl_budget_nats": 3.0,
    "facts": {"n": 3000, "base": 0.8, "candidate": 0.8, "diff": 0.0, "low": -0.01, "margin_points": 2.0, "certifies_points": 1.0},
    "length": {"base": 20.0, "candidate": 20.0},
    "finished": {"base": 0.9, "candidate": 0.9},
    "repetition": {"base": 0.0, "candidate": 0.0},
    "refusal": {"base": 0.0, "candidate": 0.0},
    "on_topic": {"base": 0.9, "candidate": 0.9},
    "language": {"base": 0.0, "candidate": 0.0},
    "kl_nats_at_1": 2.5,
    "chat_facts": {"n": 300, "base": 0.7, "candidate": 0.7, "diff": 0.0, "low": -0.02},
    "sycophancy": {"n": 200, "rise_nats": 0.0, "high": 0.1, "echo": {"base": 0.3, "candidate": 0.3}},
    "copied": {"strings": 0, "known": 12},
}
# What the same cycle shows on shuffled labels: a reward model at chance. PPO still raises that model's score.
SHUFFLED = LEARNED | {"likelihood_gain": {"mean": 0.0, "low": -0.01, "high": 0.01, "n": 420}}


class Ring:
    """Everything but the model: registry, archive, a scripted engine, the agent beside it and the controller."""

    def __init__(self, folder: Path, policy: Path, make_adapter: MakeAdapter) -> None:
        self.folder, self.policy, self.make = folder, policy, make_adapter
        self.stores: Stores = open_stores(Settings(feedback=FeedbackSettings(data_dir=folder)))
        self.registry = Registry(self.stores.engine)
        self.engine = Scripted(lambda name, messages: "Good evening to you.")
        held = partial(self.registry.report_held, "one")
        self.agent = ReplicaAgent(self.engine, None, self.registry.wanted, held, 0.0, Intake.of(policy, folder / "private", 8))
        self.rollout = Rollout(self.registry, self.stores.archive, self.engine, RolloutSettings(), GateSettings())
        self.controller = Controller(self.rollout, self.stores.log)
        self.base, path = make_adapter(policy, folder / "adapters", 0)
        self.registry.register(self.base, path, "system")
        self.registry.start_with(self.base, "system")

    def candidate(self, seed: int, evaluation: dict[str, Any] | None = LEARNED, by: str = TRAINER.owner) -> str:
        adapter, path = self.make(self.policy, self.folder / "adapters", seed)
        self.registry.register(adapter, path, by)
        if evaluation is not None:
            self.registry.attest(adapter, "evaluation", evaluation, by)
        return adapter

    def look(self, times: int = 1) -> None:
        """The agent looks, then the controller."""

        async def both() -> None:
            for _ in range(times):
                await self.agent.step()
                assert await self.controller.tick()

        asyncio.run(both())

    def happened(self, *events: Event) -> None:
        asyncio.run(self.stores.log.append(events))
        self.stores.ingest()

    def compare(self, raters: int, votes: int, prefers: Arm = "canary") -> None:
        """Each rater compares the canary with the baseline so often; the sides alternate."""
        running = self.running()
        events: list[Event] = []
        for turn in range(raters * votes):
            rater, comparison = f"rater {turn // votes}", new_id()
            arms: dict[Side, Arm] = {"a": "canary", "b": "baseline"} if turn % 2 else {"a": "baseline", "b": "canary"}
            for side, arm in arms.items():
                started, finished = answer(running, rater, arm, "stop")
                events += [started.model_copy(update={"comparison_id": comparison, "side": side}), finished]
            value = next(side for side, arm in arms.items() if arm == prefers)
            events.append(FeedbackGiven(event_id=new_id(), target=comparison, rater=rater, slot="choice", value=value))
        self.happened(*events)

    def running(self) -> RolloutRecord:
        running = self.registry.active_rollout()
        assert running is not None
        return running

    def to_approval(self, seed: int) -> str:
        """A candidate that passes its gates and wins among 24 raters, whatever its number."""
        adapter = self.candidate(seed)
        self.look(3)
        self.compare(raters=24, votes=3)
        self.look()
        return adapter


def answer(running: RolloutRecord, who: str, arm: Arm, reason: str) -> tuple[InteractionStarted, InteractionFinished]:
    interaction = new_id()
    adapter = running.adapter if arm == "canary" else running.stable
    started = InteractionStarted(
        event_id=new_id(),
        interaction_id=interaction,
        subject=who,
        subject_kind="named",
        model="plaudit",
        adapter=adapter,
        arm=arm,
        rollout=running.id,
    )
    ended = InteractionFinished(event_id=new_id(), interaction_id=interaction, subject=who, finish_reason=reason, completion_tokens=4)
    return started, ended


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
    ring.rollout.settings = RolloutSettings(lease_s=0.001)
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
