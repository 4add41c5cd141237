"""What people said in a canary: votes of comparisons and ends of answers, read from the archive."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from feedback.archive import Archive
from feedback.events import InteractionFinished, InteractionStarted

WORTH = {"tie": 0.5, "both_bad": 0.5}
BROKEN = ("error",)


@dataclass(frozen=True)
class Ends:
    """How the answers of one arm ended."""

    answers: int
    failed: int
    """Broken off by an error, or empty."""


def votes(archive: Archive, rollout: str) -> dict[str, list[float]]:
    """For each rater the votes in the order given: 1 for the canary, 0 for stable, 1/2 for neither.

    Only comparisons of this rollout whose two sides are the canary and the baseline count; a person without a name or a
    session counts in no per-person statistic, so not here; nor does one who withdrew.
    """
    found: list[tuple[int, str, float]] = []
    withdrawn = archive.withdrawn()
    for choice in archive.current():
        if choice.slot != "choice" or choice.rater in withdrawn:
            continue
        sides = archive.comparison(choice.target)
        arms = {side: each.started.arm for side, each in sides.items() if each.started.rollout == rollout}
        if set(arms.values()) != {"canary", "baseline"}:
            continue
        if any(each.started.subject_kind == "single" for each in sides.values()):
            continue
        worth = WORTH.get(choice.value or "")
        found.append((choice.stamp, choice.rater, worth if worth is not None else float(arms[choice.value or "a"] == "canary")))
    by_rater: dict[str, list[float]] = {}
    for _, rater, vote in sorted(found):
        by_rater.setdefault(rater, []).append(vote)
    return by_rater


def ends(archive: Archive, rollout: str, since_stamp: int) -> Mapping[str, Ends]:
    """By arm, of all answers of this rollout that began after the stamp and have ended."""
    counted = {"canary": [0, 0], "baseline": [0, 0]}
    stamp = since_stamp
    while batch := archive.events("interaction.started", stamp):
        stamp = batch[-1].stamp
        for event in batch:
            if not isinstance(event, InteractionStarted) or event.rollout != rollout or event.comparison_id is not None:
                continue  # a comparison shows both arms to the same person, so it says nothing about one arm
            finished = _finished(archive, event.interaction_id)
            if event.arm in counted and finished is not None:
                counted[event.arm][0] += 1
                counted[event.arm][1] += finished.finish_reason in BROKEN or finished.completion_tokens == 0
    return {arm: Ends(*numbers) for arm, numbers in counted.items()}


def _finished(archive: Archive, interaction_id: str) -> InteractionFinished | None:
    interaction = archive.interaction(interaction_id)
    return interaction.finished if interaction else None
