"""Golden files: events as a version of Plaudit stored them, `golden/v<schema_version>.jsonl`, never written again once released.

A new version gets a file of its own: `PYTHONPATH=. python tests/feedback/golden_world.py > tests/feedback/golden/v2.jsonl`.
"""

from __future__ import annotations

import hashlib
import sys
import tempfile
from pathlib import Path
from typing import Any

from feedback_world import stores_in
from sqlalchemy import insert

from feedback.clock import COUNTER_BITS
from feedback.events import (
    AdapterEvent,
    ConsentWithdrawn,
    Event,
    FeedbackCleared,
    FeedbackGiven,
    FeedbackText,
    FinishedText,
    InteractionFinished,
    InteractionScored,
    InteractionStarted,
    RolloutEvent,
    StartedText,
    SubjectErased,
    encode,
)
from feedback.sqlite_log import open_file
from feedback.stores import Stores
from feedback.subjects import subject_keys

FOLDER = Path(__file__).parent / "golden"
BEGAN_MS = 1_790_000_000_000
PEOPLE = ("anna", "ben", "carl", "dora")


def secret(name: str) -> bytes:
    """A fixed test key: nothing real was ever sealed under it."""
    return hashlib.sha256(f"golden {name}".encode()).digest()


def golden_stores(folder: Path) -> Stores:
    """Stores whose people have the keys under which the golden files' texts are sealed."""
    keys = folder / "keys"
    keys.mkdir(parents=True)
    (keys / "kek").write_bytes(secret("kek"))
    (keys / "pseudonym").write_bytes(secret("pseudonym"))
    stores = stores_in(folder)
    with stores.engine.begin() as db:
        for person in PEOPLE:
            wrapped = stores.subjects._wrap(person, 1, secret(person))
            db.execute(insert(subject_keys).values(subject=person, generation=1, wrapped=wrapped, created_ms=BEGAN_MS))
    return stores


def put(stores: Stores, values: list[bytes], partition: str = "old") -> None:
    """Into a partition of their own, byte for byte as another process stored them."""
    db = open_file(stores.logs.folder / f"{partition}.sqlite")
    for number, value in enumerate(values):
        db.execute("INSERT INTO events (event_id, partition_key, value) VALUES (?, '', ?)", (f"{partition}-{number}", value))
    db.close()


def _answered(stores: Stores, name: str, subject: str, answer: str, **fields: Any) -> list[Event]:
    asked = StartedText(messages=[{"role": "user", "content": f"{name}?"}], metadata={"shop": "north"})
    read = FinishedText(answer=answer, token_ids=[1, 2], logprobs=[-0.5, -0.25])
    return [
        InteractionStarted(
            event_id=f"started {name}",
            interaction_id=name,
            subject=subject,
            subject_kind="named",
            cohorts=("cooks",),
            model="plaudit",
            adapter="a" * 64,
            sampling={"temperature": 0.7},
            key_id="key",
            sealed=stores.subjects.seal((subject,), asked),
            **fields,
        ),
        InteractionFinished(
            event_id=f"finished {name}",
            interaction_id=name,
            subject=subject,
            finish_reason="stop",
            prompt_tokens=3,
            completion_tokens=2,
            first_token_ms=1.5,
            total_ms=2.5,
            sealed=stores.subjects.seal((subject,), read),
        ),
    ]


def one_of_each(stores: Stores) -> list[Event]:
    """Every type of event, with every field set somewhere."""

    def given(name: str, target: str, rater: str, slot: str, value: str | None = None, **fields: Any) -> FeedbackGiven:
        return FeedbackGiven.model_validate(
            {"event_id": name, "target": target, "rater": rater, "slot": slot, "value": value, "reasons": (), **fields}
        )

    comment = stores.subjects.seal(("ben",), FeedbackText(comment="Too long."))
    correction = stores.subjects.seal(("ben", "anna"), FeedbackText(correction="Halve it."))
    events: list[Event] = [
        *_answered(stores, "left", "anna", "With a knife.", comparison_id="pair", side="a"),
        *_answered(stores, "right", "anna", "Halve it first.", comparison_id="pair", side="b", arm="canary", rollout="r", propensity=0.5),
        *_answered(stores, "alone", "ben", "Slowly."),
        *_answered(stores, "withdrawn", "carl", "By hand."),
        *_answered(stores, "erased", "dora", "Not at all."),
        InteractionScored(event_id="scored", interaction_id="alone", reward_model="m" * 64, score=0.25),
        given("choice 1", "pair", "anna", "choice", "a"),
        given("choice 2", "pair", "anna", "choice", "b", reasons=("clear",), idempotency="f" * 64),
        given("thumb", "alone", "ben", "rating", "down", reasons=("too_long", "other"), sealed=comment),
        given("correction", "alone", "ben", "correction", sealed=correction),
        given("signal", "alone", "ben", "signal", "copied"),
        FeedbackCleared(event_id="cleared", target="alone", rater="ben", slot="signal", idempotency="e" * 64),
        given("thumb of carl", "withdrawn", "carl", "rating", "up"),
        given("thumb of dora", "erased", "dora", "rating", "up"),
        ConsentWithdrawn(event_id="withdrew", subject="carl"),
        SubjectErased(event_id="erased dora", subject="dora"),
    ]
    for kind in ("registered", "attested", "aliased", "unaliased", "retired"):
        fields: dict[str, Any] = {
            "type": f"adapter.{kind}",
            "adapter": "a" * 64,
            "actor": "ada",
            "alias": "stable",
            "detail": {"why": kind},
        }
        events.append(AdapterEvent(event_id=kind, **fields))
    for kind in ("started", "stepped", "judged", "approved", "ended"):
        fields = {"type": f"rollout.{kind}", "rollout": "r", "adapter": "a" * 64, "actor": "ada", "detail": {"verdict": "pass"}}
        events.append(RolloutEvent(event_id=f"rollout {kind}", **fields))
    return [event.model_copy(update={"stamp": (BEGAN_MS + number) << COUNTER_BITS}) for number, event in enumerate(events)]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        world = golden_stores(Path(folder))
        for each in one_of_each(world):
            sys.stdout.buffer.write(encode(each) + b"\n")
        world.close()
