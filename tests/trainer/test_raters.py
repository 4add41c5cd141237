"""Raters beside each other and beside themselves, and what their differences do to a fit. Experiments of docs/lab.md that take seconds."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from panel_world import panel
from rating_world import RatedWorld

from trainer.config import RewardModelSettings
from trainer.held_out import UnseenRaters, foretold, unseen_raters
from trainer.labels import Choices, Labels, Thumbs
from trainer.likelihood import DOWN, TIE, UP, A, B
from trainer.raters import Standing, agreement, dissenters, findings, reliability, repeats, standings
from trainer.ridge import cross_validate, fit_ridge

SETTINGS = RewardModelSettings(maps=("linear",), ridges=(1.0, 4.0), folds=4, grid_extensions=0)


def said(choices: list[tuple[int, int, int, int]], thumbs: list[tuple[int, int, int]] = []) -> Labels:  # noqa: B006  (only read)
    """Ratings as (first, second, outcome, rater) and (answer, outcome, rater), answers 0-5 to prompt 0, 6-11 to prompt 1."""
    first, second, outcome, by = (torch.tensor(column, dtype=torch.long) for column in zip(*choices, strict=True))
    rated, value, thumb_by = torch.tensor(thumbs, dtype=torch.long).reshape(-1, 3).T.unbind()
    labels = panel(0, raters=4, pairs=1).labels
    return replace(
        labels, choices=Choices(first, second, outcome, by, torch.zeros(len(by), dtype=torch.bool)), thumbs=Thumbs(rated, value, thumb_by)
    )


def agreed(world: RatedWorld) -> float:
    return world.agreement(fit_ridge(world.labels, SETTINGS).score(world.labels.features_ND)[0])


def test_agreement_by_hand() -> None:
    # Answers 0 and 1: raters 0 and 1 prefer 0 (one of them saw it on the right), rater 2 prefers 1: 1 of 3 pairs of raters agrees.
    # Answer 6: both thumbs up: 1 of 1. Rater 3's tie and a pair that one rater judged say nothing. Mean (1/3 + 1) / 2 = 2/3.
    labels = said([(0, 1, A, 0), (1, 0, B, 1), (0, 1, B, 2), (0, 1, TIE, 3), (2, 3, A, 0)], [(6, UP, 0), (6, UP, 1)])
    found = agreement(labels)
    assert found.items == 2 and found.value == pytest.approx(2 / 3)
    # Half of the verdicts agree by chance; p² + (1 - p)² = 2/3 at p = (1 + sqrt(1/3)) / 2.
    assert found.ceiling == pytest.approx((1 + math.sqrt(1 / 3)) / 2)
    assert "two raters agree on 67 %" in found.words and "at best 79 %" in found.words
    alone = agreement(said([(0, 1, A, 0), (2, 3, A, 1)]))
    assert alone.value is None and alone.ceiling is None and "is unknown" in alone.words


def test_repeated_questions_by_hand() -> None:
    # Rater 0 judges (0, 1) three times: 0, then 0 from the other side, then 1: asked twice again, failed once. Rater 1's thumb turns.
    labels = said([(0, 1, A, 0), (1, 0, B, 0), (0, 1, B, 0), (2, 3, A, 1)], [(6, UP, 1), (6, DOWN, 1), (6, UP, 2)])
    assert repeats(labels) == ([2, 1, 0, 0], [1, 1, 0, 0])


def test_reliability_by_hand() -> None:
    # Rater 0: 20 pairs judged and judged again, 10 of them otherwise; rater 1: 20 again, none otherwise; rater 2 has too few votes.
    pairs = (
        [(a, b) for a in range(6) for b in range(a + 1, 6)] + [(a, b) for a in range(6, 9) for b in range(a + 1, 9)] + [(9, 10), (9, 11)]
    )
    rows = [(a, b, A, rater) for a, b in pairs for rater in (0, 1)]
    rows += [(a, b, B if i < 10 else A, 0) for i, (a, b) in enumerate(pairs)] + [(a, b, A, 1) for a, b in pairs]
    rows += [(0, 1, outcome, 2) for outcome in (A, B, A, B)]
    # In all 10 + 0 + 3 of 20 + 20 + 3 failed: 13/43. Rater 0: (10 + 4·13/43) / 24, so 1 - 2·share = 1 - 20.4186/... by the usual 1 - 26/43.
    share = (10 + 4 * 13 / 43) / 24
    assert reliability(said(rows)).tolist() == pytest.approx([(1 - 2 * share) / (1 - 26 / 43), 1.0, 1.0, 1.0])
    # Without a single failure nobody loses, and where all fail there is nobody to measure by.
    assert reliability(said([row for row in rows if row[3] == 1])).tolist() == [1.0] * 4
    assert reliability(said([row for row in rows if row[3] == 2] * 8)).tolist() == [1.0] * 4


def test_only_sure_dissent_is_named() -> None:
    def standing(name: str, agrees: float, votes: int = 40) -> Standing:
        half = 1.959964 * math.sqrt(agrees * (1 - agrees) / votes)
        return Standing(name, votes, agrees, agrees - half, agrees + half, 0, 0, 1.0)

    # Of 3: chances of 0.2 (z = -3.8), 0.45 (z = -0.6) and 0.8 by a coin; only the first is below 5 % / 3.
    found = [standing("a", 0.8), standing("b", 0.2), standing("c", 0.45)]
    assert dissenters(found) == ["b"] and dissenters([]) == []
    assert "1 of 3 raters judge against the others" in findings(found, ["b"], discounted=False)[0]
    assert dissenters([standing("c", 0.45), standing("d", 0.4)]) == []


def test_a_coin_is_seen_and_counts_for_less_and_dissent_does_not() -> None:
    """Experiment 11's other half: 6 of 24 raters answer at random, 6 have the opposite taste; all are asked 15 pairs twice."""
    coins, flippers = range(6), range(6, 12)
    world = panel(5, raters=24, pairs=60, repeated=15, coins=coins, flippers=flippers)
    weights_U = reliability(world.labels)
    assert float(weights_U[:6].mean()) < 0.4 < 0.85 < float(weights_U[6:].mean())
    assert bool((weights_U >= 0).all()) and bool((weights_U <= 1).all())
    discounted = replace(world.labels, weights_U=weights_U)
    assert agreed(RatedWorld(discounted, world.utilities_N)) > agreed(world) - 0.01
    chosen = cross_validate(world.labels, SETTINGS)
    found = standings(world.labels, unseen_raters(world.labels, SETTINGS, chosen))
    dissent = dissenters(found)
    assert len(found) == 24 and set(dissent) <= {f"r{i:02d}" for i in flippers} and len(dissent) >= 5
    told = findings(found, dissent, discounted=True)
    assert "a cohort of their own" in told[0] and "count for less" in told[1]


def test_who_says_up_to_everything_agrees_half_and_is_no_dissenter() -> None:
    # Rater 0 likes all of 42 answers. By the others one is far above the rest: their mean lies above 41 of them, their median above 21.
    thumbs = [(answer, UP, 0) for answer in range(42)]
    scores_N = torch.tensor([100.0, *range(41), *[0.0] * (240 - 42)], dtype=torch.float64)
    (found,) = standings(said([(0, 1, A, 1)], thumbs), UnseenRaters(torch.zeros(4, dtype=torch.long), scores_N[None]))
    assert found.rater == "r00" and found.agrees == 0.5 and dissenters([found]) == []
    # Of an odd number the one in the middle is worth a half.
    (found,) = standings(said([(0, 1, A, 1)], thumbs[:41]), UnseenRaters(torch.zeros(4, dtype=torch.long), scores_N[None]))
    assert found.agrees == 0.5


def test_one_rater_stands_beside_nobody() -> None:
    labels = panel(0, raters=1, pairs=30).labels
    assert unseen_raters(labels, SETTINGS, cross_validate(labels, SETTINGS)) is None
    assert standings(labels, None) == []


def test_flippers_are_found_and_what_they_cost() -> None:
    """Experiment 11: plain Bradley-Terry, 40 raters with 30 votes; a fifth have the opposite taste."""
    honest, mixed = panel(3, pairs=30), panel(3, pairs=30, flippers=range(8))
    assert agreed(honest) > 0.92
    assert 0.86 < agreed(mixed) < agreed(honest)
    found = standings(mixed.labels, unseen_raters(mixed.labels, SETTINGS, cross_validate(mixed.labels, SETTINGS)))
    wrong, right = ([each.agrees for each in found if (each.rater < "r08") == flipped] for flipped in (True, False))
    better = [(r > w) + 0.5 * (r == w) for r in right for w in wrong]
    assert sum(better) / len(better) > 0.95  # the area under the curve


@pytest.mark.slow
def test_pairs_and_thumbs_add() -> None:
    """Experiment 9: 200 pairs are worth about 400 thumbs, and both together more than either."""
    world = panel(7, raters=20, pairs=10, thumbs=20)
    nobody = torch.zeros(20, dtype=torch.bool)
    pairs = world.labels.select(torch.ones(200, dtype=torch.bool), nobody.repeat(20))
    thumbs = world.labels.select(nobody.repeat(10), torch.ones(400, dtype=torch.bool))
    by = {
        name: agreed(RatedWorld(some, world.utilities_N)) for name, some in {"pairs": pairs, "thumbs": thumbs, "both": world.labels}.items()
    }
    assert by["pairs"] > 0.8 and by["thumbs"] > 0.75
    assert by["both"] > max(by["pairs"], by["thumbs"])


@pytest.mark.parametrize(("side", "alarm"), [(0.0, False), (0.6, True), (-0.6, True)])
def test_a_bias_for_a_side_is_recovered(side: float, alarm: bool) -> None:
    labels = panel(11, pairs=25, side=side).labels  # 1,000 choices
    chosen = cross_validate(labels, SETTINGS)
    _, found = foretold(labels, chosen)
    assert found is not None and found.low is not None and found.high is not None
    assert abs(found.value - side) < 0.2 and found.alarm is alarm
    # The joint fit has it, too.
    scalars = fit_ridge(labels, SETTINGS, chosen).about["scalars"]
    assert isinstance(scalars, dict) and abs(scalars["side_bias"] - side) < 0.2


def test_unseen_raters_are_scored_by_the_others() -> None:
    others = UnseenRaters(torch.tensor([1, 0]), torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    assert others.of(torch.tensor([0, 1]), torch.tensor([1, 1])).tolist() == [4.0, 2.0]
