"""What people said in a canary: votes of comparisons, read from the archive."""

from __future__ import annotations

from feedback.archive import Archive

WORTH = {"tie": 0.5, "both_bad": 0.5}


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
