"""Steps of weight, what cannot be judged, and deadlines: with a real registry and archive."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rollout_world import MARA, MakeAdapter, Ring, answer

from deploy import look
from deploy.approval import approve
from deploy.config import EngineSettings, GateSettings, PolicySettings, RolloutSettings, WebhookSettings
from deploy.guards import Guards
from deploy.manifest import vllm_name
from deploy.registry import Registry
from deploy.rollout import Rollout
from feedback.config import FeedbackSettings, Settings
from feedback.errors import ConfigError, Conflict, NotDurable, PromotionRefused
from feedback.stores import open_stores
from serving.config import GatewaySettings
from serving.service import Service

QUICK: dict[str, Any] = {"weights": (0.1, 0.3, 0.5), "step_people": 3, "step_minutes": 0.0}


@pytest.fixture
def ring(tmp_path: Path, tiny_policy: Path, make_adapter: MakeAdapter) -> Iterator[Ring]:
    made = Ring(tmp_path / "data", tiny_policy, make_adapter)
    made.rollout.settings = RolloutSettings(**QUICK)
    yield made
    made.stores.close()
    made.stores.engine.dispose()


def on_canary(ring: Ring) -> str:
    adapter = ring.candidate(1)
    ring.look(2)
    assert ring.running().state == "canary"
    return adapter


def people(ring: Ring, names: range, reason: str = "stop") -> None:
    """So many new people an arm get an answer; the canary's ends so."""
    for number in names:
        ring.happened(*answer(ring.running(), f"c{number}", "canary", reason), *answer(ring.running(), f"b{number}", "baseline", "stop"))


def test_the_weight_grows_with_people_who_saw_nothing_wrong(ring: Ring) -> None:
    on_canary(ring)
    weights = []
    for shown in range(4):
        ring.look(2)  # looking more often changes nothing
        weights.append(ring.registry.routing().weight)
        people(ring, range(3 * shown, 3 * shown + 3))
    assert weights == [0.1, 0.3, 0.5, 0.5]
    stepped = [event.detail["to"] for event in ring.registry_events("rollout.stepped")]
    assert stepped == ["canary", "grown", "grown"]


def test_too_few_people_do_not_take_a_step_and_are_counted_in_words(ring: Ring) -> None:
    on_canary(ring)
    people(ring, range(2))
    ring.look()
    assert ring.registry.routing().weight == 0.1
    told = "; step 1 of 3, 10% of people: 2 people in the smaller arm, needed >= 3, or 1 days; 0 minutes, needed >= 0"
    assert ring.running().reason.endswith(told)
    step = ring.running().verdicts[-1]
    assert (step["name"], step["verdict"]) == ("step", "inconclusive")


@pytest.mark.parametrize(("more", "weight"), [({"step_days": 0.0}, 0.3), ({"step_days": 0.0, "step_minutes": 60.0}, 0.1)])
def test_where_people_are_few_time_takes_the_step_but_never_before_its_minutes(ring: Ring, more: dict[str, Any], weight: float) -> None:
    on_canary(ring)
    ring.rollout.settings = RolloutSettings(**(QUICK | more))
    ring.look()
    assert ring.registry.routing().weight == weight


def test_a_guardrail_that_fails_takes_no_step(ring: Ring) -> None:
    adapter = on_canary(ring)
    people(ring, range(60), "error")
    ring.look()
    ended = ring.registry.rollouts(adapter)[-1]
    assert (ended.state, ended.weight) == ("stopped", 0.0) and ended.reason.startswith("guardrail errors: ")
    assert ring.registry.routing().canary is None


def test_it_wins_only_at_the_last_weight(ring: Ring) -> None:
    on_canary(ring)
    ring.compare(raters=24, votes=3)
    ring.look()
    assert (ring.running().state, ring.registry.routing().weight) == ("canary", 0.1)
    people(ring, range(6))
    ring.look(2)
    assert (ring.running().state, ring.registry.routing().weight) == ("canary", 0.5)
    ring.look()
    assert ring.running().state == "awaiting"


def test_weights_must_grow() -> None:
    for wrong in ((), (0.3, 0.1), (0.2, 0.2), (0.6,), (0.0,)):
        with pytest.raises(ValueError, match="weights"):
            RolloutSettings(weights=wrong)


def test_the_registry_takes_no_step_back_or_twice(ring: Ring) -> None:
    on_canary(ring)
    epoch = ring.registry.lease("controller", ring.controller.holder, 60) or 0
    for weight in (0.05, 0.1):
        with pytest.raises(Conflict, match=rf"has weight 0.1, which does not grow to {weight}"):
            ring.registry.grow_canary(ring.running().id, weight, [], "controller", epoch)


# --- what cannot be judged ------------------------------------------------------------------------------------------


def unreadable(ring: Ring, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> object:
        raise NotDurable("the archive cannot be read: disk I/O error")

    monkeypatch.setattr(ring.stores.archive, "events", fail)


def wrong_sums(ring: Ring, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> object:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(Guards, "verdicts", fail)


def late(ring: Ring, monkeypatch: pytest.MonkeyPatch) -> None:
    ring.rollout.look.newest = lambda: 1 << 62
    ring.look()
    monkeypatch.setattr(look, "LATE_S", -1.0)


def lost(ring: Ring, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second replica that has only stable."""
    ring.registry.report_held("two", {vllm_name(ring.base)})


ERRORS = [
    (unreadable, "look", "the archive cannot be read: disk I/O error; nothing was judged"),
    (wrong_sums, "look", "ZeroDivisionError: division by zero; nothing was judged"),
    (late, "data", "the archive is -1 s behind the log"),
    (lost, "replicas", "not every replica holds a-"),
]


@pytest.mark.parametrize(("happens", "name", "said"), ERRORS, ids=["unreadable", "wrong sums", "late", "lost"])
def test_what_cannot_be_judged_advances_nothing_is_shown_and_ends_in_time(
    ring: Ring, monkeypatch: pytest.MonkeyPatch, happens: Callable[[Ring, pytest.MonkeyPatch], None], name: str, said: str
) -> None:
    adapter = on_canary(ring)
    people(ring, range(3))
    with monkeypatch.context() as broken:
        happens(ring, broken)
        weight = ring.running().weight
        ring.look(2)
        stuck = ring.running()
        assert (stuck.state, stuck.weight, stuck.error_ms is not None) == ("canary", weight, True)
        assert stuck.reason.startswith(f"cannot be judged: {name}: {said}")
        told = [row["reason"] for row in stuck.verdicts if row["verdict"] == "error"]
        assert told == [stuck.reason.removeprefix(f"cannot be judged: {name}: ")]
        assert stuck.verdicts[0]["name"] == "answers", "what its gates said stays"
        ring.look()
        assert ring.running().error_ms == stuck.error_ms, "it counts from the first"

        ring.rollout.settings = RolloutSettings(**QUICK, error_minutes=0.0)
        ring.look()
        ended = ring.registry.rollouts(adapter)[-1]
        assert (ended.state, ended.weight) == ("stopped", 0.0) and ended.reason.startswith(f"{name}: {said}")
    assert ring.registry.routing().canary is None


def test_a_look_that_succeeds_again_forgets_the_error_and_has_missed_nothing(ring: Ring, monkeypatch: pytest.MonkeyPatch) -> None:
    on_canary(ring)
    with monkeypatch.context() as broken:
        unreadable(ring, broken)
        ring.look()
        people(ring, range(3))
    assert ring.running().error_ms is not None
    ring.look()
    assert (ring.running().error_ms, ring.registry.routing().weight) == (None, 0.3)


def test_while_a_replica_lacks_an_arm_everybody_is_answered_by_stable(ring: Ring) -> None:
    on_canary(ring)
    assert ring.registry.routing().canary is not None
    lost(ring, pytest.MonkeyPatch())
    table = ring.registry.routing()
    assert (table.canary, table.weight, table.stable.adapter) == (None, 0.0, ring.base)
    ring.registry.report_held("two", ring.registry.held_everywhere() | set(ring.registry.wanted()))
    assert ring.registry.routing().weight == 0.1


def test_a_server_that_is_away_refuses_no_candidate(ring: Ring) -> None:
    ring.candidate(1)
    ring.look()
    asyncio.run(ring.agent.step())
    ring.engine.up = False
    assert asyncio.run(ring.controller.tick())
    assert ring.running().state == "gates"
    assert ring.running().reason == "cannot be judged: answers: the model server cannot be asked: the model server does not answer"
    ring.engine.up = True
    ring.look()
    assert (ring.running().state, ring.running().error_ms) == ("canary", None)


def test_nobody_is_approved_while_something_cannot_be_judged(ring: Ring, monkeypatch: pytest.MonkeyPatch) -> None:
    ring.rollout.settings = RolloutSettings(weights=(0.3,))
    adapter = ring.to_approval(1)
    with monkeypatch.context() as broken:
        wrong_sums(ring, broken)
        ring.look()
        with pytest.raises(PromotionRefused, match=r"approval: [0-9a-f]{16}: look: ZeroDivisionError"):
            approve(ring.registry, ring.rollout.settings, adapter, MARA)
    ring.look()
    approve(ring.registry, ring.rollout.settings, adapter, MARA)
    assert ring.registry.alias("stable") == adapter


def test_nothing_is_promoted_without_a_stored_verdict_that_it_won(ring: Ring) -> None:
    adapter = on_canary(ring)
    epoch = ring.registry.lease("controller", ring.controller.holder, 60) or 0
    ring.registry.await_approval(ring.running().id, [{"name": "wins", "verdict": "inconclusive", "reason": "few"}], "", "controller", epoch)
    with pytest.raises(PromotionRefused, match="no passing verdict 'wins' is stored"):
        approve(ring.registry, ring.rollout.settings, adapter, MARA)
    assert ring.registry.alias("stable") == ring.base


def test_who_is_not_approved_in_time_ends(ring: Ring) -> None:
    ring.rollout.settings = RolloutSettings(weights=(0.3,))
    adapter = ring.to_approval(1)
    ring.look()
    assert ring.running().state == "awaiting"
    ring.rollout.settings = RolloutSettings(weights=(0.3,), approval_days=1e-9)
    ring.look()
    ended = ring.registry.rollouts(adapter)[-1]
    assert (ended.state, ended.reason) == ("stopped", "approval: nobody approved it within 1e-09 days (rollout.approval_days)")


def test_guardrails_go_on_while_a_person_thinks(ring: Ring) -> None:
    ring.rollout.settings = RolloutSettings(weights=(0.3,))
    adapter = ring.to_approval(1)
    assert ring.running().state == "awaiting"
    people(ring, range(60), "error")
    ring.look()
    assert ring.registry.rollouts(adapter)[-1].reason.startswith("guardrail errors: ")


def test_a_margin_that_there_cannot_be_is_refused_at_the_start(ring: Ring, tmp_path: Path, tiny_policy: Path) -> None:
    settings = RolloutSettings(guard_margins={"mistakes": 0.1})
    with pytest.raises(ConfigError, match=r"rollout\.guard_margins: there is no guardrail 'mistakes'"):
        Rollout(ring.registry, ring.stores.archive, ring.engine, settings, GateSettings())
    feedback = FeedbackSettings(data_dir=tmp_path / "service")
    stores = open_stores(Settings(feedback=feedback))
    try:
        gateway = GatewaySettings(policy=PolicySettings(), feedback=feedback)
        service = Service(
            stores, Registry(stores.engine), gateway, EngineSettings(kind="scripted"), settings, GateSettings(), WebhookSettings()
        )
        service.prepare(tiny_policy)
        with pytest.raises(ConfigError) as refused:
            asyncio.run(service.run(lambda what, share: None, lambda url: pytest.fail("it serves")))
        assert refused.value.field == "rollout.guard_margins"
    finally:
        stores.close()
        stores.engine.dispose()
