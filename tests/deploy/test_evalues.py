"""The win test by hand, and by simulation with its negative controls: peeking, and votes instead of raters."""

from __future__ import annotations

import math

import numpy as np
import pytest

from deploy.config import RolloutSettings
from deploy.evalues import BETS, confidence_sequence, e_value, rater_means, raters_needed, threshold, win_test

SETTINGS = RolloutSettings()


def test_a_rater_counts_once_with_the_mean_of_the_first_votes() -> None:
    votes: dict[str, list[float]] = {"ann": [1, 1, 0, 0, 0, 0], "bob": [1, 0.5], "cleo": [0.5, 0, 0]}
    # ann (1+1+0)/3, bob has one vote too few, cleo (0.5+0+0)/3
    assert rater_means(votes, 3) == pytest.approx([2 / 3, 1 / 6], abs=1e-12)
    assert rater_means(votes, 1) == [1, 1, 0.5]


def test_the_e_value_by_hand() -> None:
    # BETS = 0.02·k for k = 1..98. Their mean is 0.02·49.5 = 0.99.
    assert BETS.mean() == pytest.approx(0.99, abs=1e-12)
    assert e_value([]) == pytest.approx(1.0, abs=1e-12)
    # A win multiplies by 1 + l/2: in the mean 1 + 0.99/2.
    assert e_value([1]) == pytest.approx(1.495, abs=1e-12)
    # A win and a loss by 1 - l²/4; mean of l² = 0.0004·(99·197/6) = 1.3002, so 1 - 1.3002/4.
    assert e_value([1, 0]) == pytest.approx(0.67495, abs=1e-12)
    # Ties change nothing.
    assert e_value([1, 0.5, 0.5]) == pytest.approx(1.495, abs=1e-12)
    # The order of the raters does not matter.
    assert e_value([0, 1, 1, 0.5]) == pytest.approx(e_value([1, 0.5, 0, 1]), rel=1e-12)


def test_an_e_value_of_very_many_wins_is_a_number() -> None:
    assert math.isfinite(e_value([1.0] * 5000))


def test_thresholds_of_all_canaries_together_risk_alpha() -> None:
    assert [threshold(i, 0.05) for i in (1, 2, 3)] == pytest.approx([40, 120, 240])
    # sum of 1/(i(i+1)) for i = 1..n is 1 - 1/(n+1)
    assert sum(1 / threshold(i, 0.05) for i in range(1, 1000)) == pytest.approx(0.05 * (1 - 1 / 1000), abs=1e-12)


def test_the_confidence_sequence_by_hand_after_two_wins() -> None:
    # bet 1: sqrt(2·ln 40 / (1/4·1·ln 2)) = 6.5250. After x = 1 the mean is 3/4, the variance (1/4 + 1/16)/2 = 0.15625,
    # so bet 2: sqrt(2·ln 40 / (0.15625·2·ln 3)) = 4.6357; neither is cut by 1/(2m) down here. With u = 1 - m:
    # (1 + 6.5250 u)(1 + 4.6357 u) = 40 at u = 0.96587, m = 0.0341. First mean of the grid above it: 0.035, less one step.
    assert confidence_sequence([1.0, 1.0], 0.05) == pytest.approx((0.034, 1.0), abs=1e-9)
    # One win alone makes at most 1 + 6.525 of 1, far from 40, so nothing is excluded.
    assert confidence_sequence([1.0], 0.05) == (0.0, 1.0)
    assert confidence_sequence([], 0.05) == (0.0, 1.0)


def test_the_confidence_sequence_is_symmetric_and_narrows() -> None:
    values = [1.0, 0.0, 1.0, 1.0] * 10
    low, high = confidence_sequence(values, 0.05)
    mirrored = confidence_sequence([1 - value for value in values], 0.05)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=1e-9)
    longer = confidence_sequence(values * 4, 0.05)
    assert low < longer[0] < 0.75 < longer[1] < high


def test_needed_raters_are_those_it_takes() -> None:
    values = [1.0, 1.0, 1.0, 0.0] * 5
    bar = threshold(1, 0.05)
    more = raters_needed(values, bar)
    assert more is not None and more > 0
    # The same mix again and again: 3/4 wins. One step of four raters before the estimate is too few, the estimate suffices.
    assert e_value(values + [1.0, 1.0, 1.0, 0.0] * math.ceil(more / 4)) >= bar
    assert e_value(values + [1.0, 1.0, 1.0, 0.0] * (more // 4 - 1)) < bar
    assert raters_needed([1.0] * 30, bar) == 0
    assert raters_needed([0.0, 1.0] * 20, bar) is None


def test_verdicts_say_what_is_missing() -> None:
    none_yet = win_test({"ann": [1, 1]}, 1, SETTINGS)
    assert none_yet.verdict.verdict == "inconclusive"
    assert none_yet.verdict.reason == (
        f"none of 1 raters has given 3 votes yet; evidence 1, needed >= 40: about {none_yet.needed} more raters like these"
    )
    assert none_yet.needed is not None and 150 < none_yet.needed < 400
    won = win_test({f"r{i}": [1, 1, 1] for i in range(20)}, 1, SETTINGS)
    assert won.verdict.verdict == "pass" and won.e_value >= won.threshold == 40
    lost = win_test({f"r{i}": [0, 0, 1] for i in range(80)}, 1, SETTINGS)
    assert lost.verdict.verdict == "fail" and lost.high < SETTINGS.futility
    assert lost.verdict.value == lost.high and lost.verdict.threshold == SETTINGS.futility


def raters_of_divided_taste(rng: np.random.Generator, raters: int, votes: int) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """Votes of people whose tastes differ much (Beta(1/2, 1/2)) and cancel out: nobody wins in the mean."""
    tastes = rng.beta(0.5, 0.5, size=(raters, 1))
    return (rng.random((raters, votes)) < tastes).astype(float)


def ever(values: np.ndarray[tuple[int], np.dtype[np.float64]], bar: float) -> bool:
    """Whether the e-value reaches the bar at any time, looking after every value."""
    logs = np.log1p(np.outer(BETS, values - 0.5)).cumsum(axis=1)
    return bool((np.logaddexp.reduce(logs, axis=0) - np.log(len(BETS)) >= np.log(bar)).any())


def z_ever(values: np.ndarray[tuple[int], np.dtype[np.float64]]) -> bool:
    """The usual one-sided z-test at 5 %, looked at after every value from the tenth on."""
    counts = np.arange(1, len(values) + 1)
    mean = values.cumsum() / counts
    sd = np.sqrt(np.maximum((values**2).cumsum() / counts - mean**2, 1e-9))
    return bool(((mean - 0.5) / (sd / np.sqrt(counts)) > 1.645)[9:].any())


def test_without_a_preference_it_rarely_wins_however_often_one_looks() -> None:
    rng = np.random.default_rng(1)
    runs = [raters_of_divided_taste(rng, 200, 3).mean(axis=1) for _ in range(400)]
    false_wins = np.mean([ever(values, 20.0) for values in runs])
    assert false_wins <= 0.05
    # The control: what a z-test would do that is looked at as often.
    assert np.mean([z_ever(values) for values in runs]) > 0.2


def test_votes_of_few_raters_taken_as_independent_win_falsely() -> None:
    rng = np.random.default_rng(2)
    runs = [raters_of_divided_taste(rng, 5, 100).T.reshape(-1) for _ in range(200)]
    # The broken variant that the rater as the unit prevents: every vote enters.
    assert np.mean([ever(values, 20.0) for values in runs]) > 0.2
    # Five raters, each with the mean of three votes, can never reach 20: at most (1 + 0.98)^5 in the best bet, fewer in the mean.
    by_rater = [raters_of_divided_taste(rng, 5, 3).mean(axis=1) for _ in range(200)]
    assert np.mean([ever(values, 20.0) for values in by_rater]) <= 0.05


def test_a_real_preference_wins() -> None:
    rng = np.random.default_rng(3)
    found = []
    for _ in range(100):
        tastes = rng.beta(3, 1.5, size=(150, 1))  # a mean of 2/3
        found.append(ever((rng.random((150, 3)) < tastes).mean(axis=1), 40.0))
    assert np.mean(found) > 0.95


def test_the_confidence_sequence_covers_at_all_times() -> None:
    rng = np.random.default_rng(4)
    missed = 0
    for _ in range(200):
        low, high = confidence_sequence(list(rng.beta(2, 1, size=100)), 0.05)
        missed += not low <= 2 / 3 <= high
    # The bounds at the end are the narrowest ever, so this counts every look.
    assert missed / 200 <= 0.05
