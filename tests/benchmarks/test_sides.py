"""Both sides of the crossover are admissible preferences: seen in base answers, noisy as people are, and opposite."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from benchmarks.sides import RATING, SIDES, UNSEEN, WORDS, concierge, smollm2
from examples.concierge.world import Guest, base_answers

QUESTION = "How do I cook rice?"
PLAIN = "Rice cooks in salted water."
FULL = "To cook rice, rinse it. Then add twice as much water, bring it to a boil, cover your pot, and let it rest for 10 minutes. " * 2


@pytest.mark.parametrize("seed", range(2))
def test_the_concierge_sides_are_opposite_and_noisy_as_people_are(seed: int) -> None:
    sides = concierge(seed)
    agreed: dict[str, list[float]] = {side: [] for side in SIDES}
    same = []
    for _, answers in base_answers():
        gaps: dict[str, list[float]] = {}
        for side in SIDES:
            guest = sides.asked[side][0]
            assert isinstance(guest, Guest)
            liked = [guest.taste(seen) for seen in answers]
            gaps[side] = [a - b for a, b in itertools.combinations(liked, 2)]
            agreed[side] += [1 / (1 + float(np.exp(-abs(gap)))) for gap in gaps[side] if abs(gap) > 1e-9]
        same += [p * q > 0 for p, q in zip(*gaps.values(), strict=True)]
    assert all(0.74 <= float(np.mean(values)) <= 0.81 for values in agreed.values()), agreed
    assert np.mean(same) < 0.4


def test_the_readers_of_smollm2_want_the_opposite() -> None:
    sides = smollm2(0)
    assert len(FULL.split()) > WORDS - 4
    plain, full = (PLAIN, True), (FULL, False)
    for side, better, worse in (("P", plain, full), ("Q", full, plain)):
        people = [*sides.asked[side], *sides.unseen[side]]
        assert len(people) == RATING + UNSEEN
        assert all(person.utility(QUESTION, *better) > person.utility(QUESTION, *worse) for person in people)


@pytest.mark.parametrize("make", [concierge, smollm2])
def test_who_judges_has_rated_nothing(make: object) -> None:
    sides = make(3)  # type: ignore[operator]
    for side in SIDES:
        assert not {person.id for person in sides.rated_by(side).raters} & {person.id for person in sides.judged_by(side).raters}
