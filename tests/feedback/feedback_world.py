"""What the tests of this room say and hear: one person, one interaction, one comparison."""

from __future__ import annotations

from pathlib import Path

from feedback.config import FeedbackSettings, Settings
from feedback.events import (
    Event,
    FeedbackCleared,
    FeedbackGiven,
    FinishedText,
    InteractionFinished,
    InteractionStarted,
    Side,
    Slot,
    StartedText,
    new_id,
)
from feedback.stores import Stores, open_stores


def stores_in(folder: Path, process: str = "gateway") -> Stores:
    return open_stores(Settings(feedback=FeedbackSettings(data_dir=folder)), process)


def rating(target: str, rater: str, value: str, *, slot: Slot = "rating", event_id: str | None = None, stamp: int = 0) -> FeedbackGiven:
    return FeedbackGiven(event_id=event_id or new_id(), target=target, rater=rater, slot=slot, value=value, stamp=stamp)


def clearing(target: str, rater: str, *, slot: Slot = "rating", event_id: str | None = None, stamp: int = 0) -> FeedbackCleared:
    return FeedbackCleared(event_id=event_id or new_id(), target=target, rater=rater, slot=slot, stamp=stamp)


def answered(
    stores: Stores,
    interaction: str,
    subject: str,
    answer: str,
    *,
    comparison: str | None = None,
    side: Side | None = None,
    finish: str = "stop",
) -> list[Event]:
    """A question about onions and its answer, as the gateway records them."""
    asked = StartedText(messages=[{"role": "user", "content": "How do I cut an onion?"}])
    return [
        InteractionStarted(
            event_id=f"started-{interaction}",
            interaction_id=interaction,
            subject=subject,
            subject_kind="named",
            cohorts=("cooks",),
            comparison_id=comparison,
            side=side,
            model="stable",
            adapter="a" * 64,
            sealed=stores.subjects.seal((subject,), asked),
        ),
        InteractionFinished(
            event_id=f"finished-{interaction}",
            interaction_id=interaction,
            subject=subject,
            finish_reason=finish,
            sealed=stores.subjects.seal((subject,), FinishedText(answer=answer)),
        ),
    ]
