"""What people said in a canary: votes of comparisons, read from the archive."""

from __future__ import annotations

from collections.abc import Iterator

from feedback.archive import Archive
from feedback.events import FeedbackCleared, FeedbackGiven

WORTH = {"tie": 0.5, "both_bad": 0.5}


def votes(archive: Archive, rollout: str, first: int) -> dict[str, list[float]]:
    """For each rater the first votes, at most so many: 1 for the canary, 0 for stable, 1/2 for neither.

    A vote that is changed or taken back counts as it stood when its rater had given enough: their mean is bet on then, and would
    break the test's guarantee if it changed. Raters who have given enough come in the order in which they had.

    Only comparisons of this rollout whose two sides are the canary and the baseline count; a person without a name or a
    session counts in no per-person statistic, so not here; nor does one who withdrew.
    """
    withdrawn = archive.withdrawn()
    by_rater: dict[str, dict[str, float]] = {}
    for said in _choices(archive):
        given = by_rater.setdefault(said.rater, {})
        if said.rater in withdrawn or len(given) >= first:
            continue
        if isinstance(said, FeedbackCleared):
            given.pop(said.target, None)
        elif (worth := _worth(archive, rollout, said)) is not None:
            given[said.target] = worth
            if len(given) >= first:
                by_rater[said.rater] = by_rater.pop(said.rater)  # to the end
    return {rater: list(given.values()) for rater, given in by_rater.items() if given}


def _choices(archive: Archive) -> Iterator[FeedbackGiven | FeedbackCleared]:
    """All that was said about comparisons, oldest first."""
    found: list[FeedbackGiven | FeedbackCleared] = []
    for kind in ("feedback.given", "feedback.cleared"):
        stamp = 0
        while batch := archive.events(kind, stamp):
            stamp = batch[-1].stamp
            found += [event for event in batch if isinstance(event, FeedbackGiven | FeedbackCleared) and event.slot == "choice"]
    yield from sorted(found, key=lambda event: (event.stamp, event.event_id))


def _worth(archive: Archive, rollout: str, choice: FeedbackGiven) -> float | None:
    """None where it is no vote of this canary."""
    sides = archive.comparison(choice.target)
    arms = {side: each.started.arm for side, each in sides.items() if each.started.rollout == rollout}
    if set(arms.values()) != {"canary", "baseline"} or any(each.started.subject_kind == "single" for each in sides.values()):
        return None
    worth = WORTH.get(choice.value or "")
    return worth if worth is not None else float(arms[choice.value or "a"] == "canary")
