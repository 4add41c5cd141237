"""Whose ratings moved a candidate: two opposed cohorts by hand, merged cohorts, the shuffled control, and nobody's name."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

import pytest
import torch
from rating_world import LINEAR, rated_world
from torch import Tensor

from deploy.card import SMALLEST_COHORT, Influence
from trainer.config import RewardModelSettings
from trainer.evaluation import Answers
from trainer.influence import MOST_COHORTS, SHUFFLES, Refits, cohorts, influence
from trainer.labels import Answer, Choices, Labels, Thumbs
from trainer.likelihood import A, B
from trainer.reply import Reply

SETTINGS = RewardModelSettings(maps=("linear",), ridges=(1.0, 1.0), folds=2)
PROMPTS = 6


def rows(*each: tuple[float, float]) -> Tensor:
    return torch.tensor(each)


def answered(features: Tensor, lengths: Sequence[int] = ()) -> Answers:
    """Held-out answers with these features; four to a prompt."""
    tokens = lengths or [3] * len(features)
    replies = [Reply((1,), (2,) * n, True) for n in tokens]
    return Answers(replies, ["word"] * len(features), torch.zeros(len(features)), {}, features)


def opposed(many: int = 7, few: int = 5) -> Labels:
    """`many` raters like the first feature and `few` dislike it; all like the second one. Each rates each prompt's two pairs once."""
    features = rows((1, 0), (-1, 0), (0, 1), (0, -1)).repeat(PROMPTS, 1)
    first, second, outcomes, raters = [], [], [], []
    for rater in range(many + few):
        for prompt in range(PROMPTS):
            first += [4 * prompt, 4 * prompt + 2]
            second += [4 * prompt + 1, 4 * prompt + 3]
            outcomes += [A if rater < many else B, A]
            raters += [rater] * 2
    columns = [torch.tensor(each) for each in (first, second, outcomes, raters)]
    choices = Choices(columns[0], columns[1], columns[2], columns[3], torch.zeros(len(first), dtype=torch.bool))
    none = torch.zeros(0, dtype=torch.long)
    return Labels(
        features_ND=features,
        prompts_N=torch.arange(PROMPTS).repeat_interleave(4),
        prompt_features_QD=torch.zeros(PROMPTS, 2),
        choices=choices,
        thumbs=Thumbs(none, none, none),
        raters=tuple(f"person-{i}" for i in range(many + few)),
        cohorts=(("for",),) * many + (("against",),) * few,
        answers=tuple(Answer(prompt, "word", True, 3) for prompt in range(PROMPTS) for _ in range(4)),
        prompts=("",) * PROMPTS,
    )


BASE = rows((1, 0), (-1, 0), (0, 1), (0, -1)).repeat(3, 1)


def found(labels: Labels, candidate: Tensor, shuffle: int | None = None) -> Influence:
    body = influence(Refits(labels, SETTINGS, "linear", 1.0, (answered(BASE), answered(candidate))), 4, shuffle)
    return Influence.model_validate(json.loads(json.dumps(body)))


def test_two_opposed_cohorts_pull_opposite_ways_by_hand() -> None:
    # The candidate went the way of the many: (1, 0) to every prompt, beside base's (±1, 0) and (0, ±1).
    seen = found(opposed(), rows((1, 0)).repeat(12, 1))
    # With weights w and v the scores of base are ±w and ±v, mean 0 and unit sqrt(2(w² + v²)/3): the gap is w / that.
    # All like the second feature alike, so v > |w| where the opposed partly cancel: 0 < gap < sqrt(3)/2.
    assert 0 < seen.everybody.gap.mean < math.sqrt(3) / 2
    by_name = {each.cohort: each for each in seen.cohorts}
    many, few = by_name["for"], by_name["against"]
    assert many.pull is not None and few.pull is not None and many.without is not None and few.without is not None
    # Without the few, w = v: gap w / sqrt(4w²/3) = sqrt(3)/2 by symmetry. Without the many, w = -v: the same below zero.
    assert few.without.gap.mean == pytest.approx(math.sqrt(3) / 2, abs=1e-3)
    assert many.without.gap.mean == pytest.approx(-math.sqrt(3) / 2, abs=1e-3)
    assert many.pull.mean == pytest.approx(seen.everybody.gap.mean + math.sqrt(3) / 2, abs=1e-3)
    assert many.pull.mean > 0 > few.pull.mean
    # (1, 0) against (1, 0), (-1, 0), (0, 1), (0, -1): with w = v a draw, two wins and a draw; with w = -v the wins are losses.
    assert few.without.prefers == pytest.approx(0.75, abs=0.13) and many.without.prefers == pytest.approx(0.25, abs=0.13)
    assert (many.raters, many.ratings, few.raters, few.ratings, seen.ratings) == (7, 84, 5, 60, 144)


def test_a_candidate_that_went_the_other_way_turns_the_signs() -> None:
    seen = {each.cohort: each.pull for each in found(opposed(), rows((-1, 0)).repeat(12, 1)).cohorts}
    assert seen["for"] is not None and seen["against"] is not None
    assert seen["for"].mean < 0 < seen["against"].mean


def test_what_would_have_been_preferred_without_a_cohort() -> None:
    # The answer that the many like is the long one, in base's answers as in the candidate's.
    base = answered(BASE, [9, 1, 5, 5] * 3)
    candidate = answered(BASE, [9, 1, 5, 5] * 3)
    body = influence(Refits(opposed(), SETTINGS, "linear", 1.0, (base, candidate)), 4, None)
    seen = Influence.model_validate(body)
    many = next(each for each in seen.cohorts if each.cohort == "for")
    ((what, before, after),) = seen.changed(many)
    assert what == "longer answers" and before > 0 > after
    assert seen.everybody.gap.mean == pytest.approx(0.0, abs=1e-9), "a candidate that says what base says gains nothing"


def test_shuffled_labels_foresee_nothing_and_a_shuffled_cycle_needs_no_control() -> None:
    world = rated_world(3, choices=300)
    draw = torch.Generator().manual_seed(0)
    held_out = answered(torch.randn(24, 24, generator=draw) * 3)
    fits = Refits(world.labels, LINEAR, "linear", 1.0, (held_out, held_out))
    shuffled = influence(fits, 4, shuffle=0)["shuffled"]
    control = shuffled["likelihood_gain"]
    assert shuffled["gaps"] == [0.0] * SHUFFLES, "the same answers on both sides gain nothing by any reward model"
    real = fits.foresees(world.labels)
    assert real["low"] > 0.05 and control["low"] < 0.02 and control["mean"] < real["low"]
    assert influence(fits, 4, None)["shuffled"] is None


def test_small_cohorts_stand_merged_or_nowhere() -> None:
    labels = opposed(many=SMALLEST_COHORT, few=SMALLEST_COHORT - 1)
    assert cohorts(labels) == ({"for": set(range(5))}, 1), "four people are too few even merged"
    tags = (("for", "red"),) * 3 + (("for",),) * 2 + (("blue",),) * 3 + ((),)
    groups, merged = cohorts(Labels(**(vars(labels) | {"cohorts": tags})))
    # red 3, blue 3 and one without a tag: seven people of three small cohorts.
    assert groups == {"for": {0, 1, 2, 3, 4}, "(3 other cohorts)": {0, 1, 2, 5, 6, 7, 8}} and merged == 3
    many = Labels(**(vars(labels) | {"cohorts": tuple(tuple(f"tag {i}" for i in range(MOST_COHORTS + 3)) for _ in range(9))}))
    groups, merged = cohorts(many)
    assert len(groups) == MOST_COHORTS + 1 and merged == 3


def test_a_tag_that_all_carry_cannot_be_left_out() -> None:
    labels = Labels(**(vars(opposed()) | {"cohorts": (("simulated",),) * 12}))
    (row,) = found(labels, BASE).cohorts
    assert (row.cohort, row.raters, row.pull, row.without) == ("simulated", 12, None, None)


def test_nobody_is_named() -> None:
    labels = opposed()
    body = influence(Refits(labels, SETTINGS, "linear", 1.0, (answered(BASE), answered(BASE))), 4, 0)
    assert "person-" not in json.dumps(body)
