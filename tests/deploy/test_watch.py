"""What the archive holds reaches the guardrails: of both arms, once, with its text, and only until its person is erased."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import pytest

from deploy.guards import Arm as GuardArm
from deploy.guards import Guards
from deploy.watch import Watch
from feedback.config import FeedbackSettings, Settings
from feedback.events import (
    Arm,
    Event,
    FeedbackGiven,
    FinishedText,
    InteractionFinished,
    InteractionScored,
    InteractionStarted,
    StartedText,
    SubjectErased,
    new_id,
)
from feedback.stores import Stores, open_stores

ASKED = "How is the weather, and what should I wear?"
ARMS: tuple[GuardArm, GuardArm] = ("canary", "baseline")
FINE = "It is warm, and you can wear what you like."


@pytest.fixture
def stores(tmp_path: Path) -> Iterator[Stores]:
    made = open_stores(Settings(feedback=FeedbackSettings(data_dir=tmp_path)))
    yield made
    made.close()
    made.engine.dispose()


def happened(stores: Stores, *events: Event) -> None:
    asyncio.run(stores.log.append(events))
    stores.ingest()


def answered(stores: Stores, who: str, arm: Arm, text: str = FINE, comparison: str | None = None, rollout: str = "r") -> list[Event]:
    interaction = new_id()
    started = InteractionStarted(
        event_id=new_id(),
        interaction_id=interaction,
        subject=who,
        subject_kind="named",
        comparison_id=comparison,
        side="a" if comparison else None,
        model="plaudit",
        adapter="0" * 64,
        arm=arm,
        rollout=rollout,
        sampling={"response_format": {"type": "json_object"}},
        sealed=stores.subjects.seal((who,), StartedText(messages=[{"role": "user", "content": ASKED}])),
    )
    finished = InteractionFinished(
        event_id=new_id(),
        interaction_id=interaction,
        subject=who,
        finish_reason="stop",
        completion_tokens=12,
        first_token_ms=100.0,
        total_ms=500.0,
        sealed=stores.subjects.seal((who,), FinishedText(answer=text)),
    )
    return [started, finished]


def watch(stores: Stores, *, keys: bool = True) -> Watch:
    return Watch(stores.archive, stores.subjects if keys else None, "r", 0, Guards(0.025))


def reasons(watched: Watch) -> dict[str, str]:
    watched.look()
    return {each.name.removeprefix("guardrail "): f"{each.verdict}: {each.reason}" for each in watched.guards.verdicts()}


def test_each_answer_counts_once_in_its_arm_with_its_text(stores: Stores) -> None:
    watched = watch(stores)
    for people in (range(20), range(20, 60)):
        for person in people:
            foreign = answered(stores, f"c{person}", "canary", "Es ist warm und Sie sind nicht allein.")
            happened(stores, *foreign, *answered(stores, f"b{person}", "baseline"))
        watched.look()
    found = reasons(watched)
    assert found == reasons(watched), "a second look finds nothing new"
    assert found == reasons(watch(stores)), "a controller that takes over finds the same"
    assert found["language"].startswith("fail: answers in another language than the question: +100.0 points against the baseline")
    assert found["JSON"].startswith("pass: malformed answers where JSON was asked for: +0.0 points against the baseline"), "neither is JSON"
    assert found["sample ratio"].startswith("pass: people: 60 in the canary and 60 in the baseline")
    without = reasons(watch(stores, keys=False))
    assert without["language"].startswith("inconclusive: ") and "60 people an arm" in without["errors"]


def test_comparisons_other_rollouts_and_stable_do_not_count(stores: Stores) -> None:
    events: list[Event] = []
    for person in range(12):
        events += answered(stores, f"x{person}", "canary", comparison=new_id()) + answered(stores, f"s{person}", "stable")
        events += answered(stores, f"o{person}", "canary", rollout="another") + answered(stores, f"b{person}", "baseline")
    happened(stores, *events)
    found = reasons(watch(stores))
    assert found["errors"].startswith("inconclusive: answers that broke off: 0 people in the smaller arm")
    assert found["sample ratio"].startswith("pass: people: 0 in the canary and 12 in the baseline")


def test_scores_and_first_thumbs(stores: Stores) -> None:
    watched = watch(stores)
    events: list[Event] = []
    later: list[Event] = []
    for person in range(40):
        for arm, score, thumb in (("canary", -1.0, "down"), ("baseline", 0.0, "up")):
            started, finished = answered(stores, f"{arm}{person}", "canary" if arm == "canary" else "baseline")
            assert isinstance(started, InteractionStarted)
            about, who = started.interaction_id, started.subject
            scored = InteractionScored(event_id=new_id(), interaction_id=about, reward_model="m", score=score)
            given = FeedbackGiven(event_id=new_id(), target=about, rater=who, slot="rating", value=thumb)
            events += [started, finished, scored, given]
            later.append(given.model_copy(update={"event_id": new_id(), "value": "up"}))
    happened(stores, *events)
    watched.look()
    happened(stores, *later)
    found = reasons(watched)
    assert "score by the reward model: -1.00 sd against the baseline" in found["reward"]
    assert found["thumbs"].startswith("fail: thumbs up among thumbs: -100.0 points against the baseline")


def test_who_was_erased_is_not_read_again(stores: Stores) -> None:
    happened(stores, *chain(*(answered(stores, f"{arm}-{person}", arm) for person in range(12) for arm in ARMS)))
    watched = watch(stores)
    watched.look()
    assert "canary-3" in repr(vars(watched.guards))
    happened(stores, SubjectErased(event_id=new_id(), subject="canary-3"))
    watched.look()
    assert "canary-3" not in repr(vars(watched.guards))
    assert "11 in the canary and 12 in the baseline" in reasons(watch(stores))["sample ratio"]


def test_who_was_erased_and_came_back_is_one_person(stores: Stores) -> None:
    happened(stores, SubjectErased(event_id=new_id(), subject="c0"))
    watched = watch(stores)
    watched.look()
    for turn in range(30):
        happened(stores, *answered(stores, "c0", "canary"), *answered(stores, f"b{turn}", "baseline"))
        watched.look()
    found = reasons(watched)
    assert "1 in the canary and 30 in the baseline" in found["sample ratio"] and ": 1 people in the smaller arm" in found["errors"]
