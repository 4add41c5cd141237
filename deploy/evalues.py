"""Do people like the canary better? A test that stays valid however often one looks, with the rater as the unit.

Votes of one person agree with each other, so 500 votes of 5 people are 5 opinions: a rater enters once, with the mean of
the first few votes. The test is a betting e-process (Ville 1939; Waudby-Smith & Ramdas 2023, "Estimating means of bounded
random variables by betting"): a fortune that cannot grow on average while the win rate is 1/2 or less, so that the chance
of its ever reaching 1/alpha is at most alpha.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from deploy.config import RolloutSettings
from deploy.gates import Verdict

Floats = np.ndarray[tuple[int], np.dtype[np.float64]]

BETS: Floats = np.linspace(0.02, 1.96, 98)
"""Shares of the fortune; a bet of 2 could lose everything. Nobody knows the best one, so the fortune is spread evenly."""
RESOLUTION = 1001
"""Means at which the confidence sequence is evaluated."""
PLANNED_WIN_RATE = 0.6
"""Assumed for the number of raters while fewer than `FEW` are in."""
FEW = 10
MOST_RATERS = 100_000


def rater_means(votes: Mapping[str, Sequence[float]], first: int) -> list[float]:
    """The mean of each rater's first votes in [0, 1], once there are so many; raters in the order given.

    Fewer votes do not count yet: a mean that changes after it was bet on would break the guarantee.
    """
    return [sum(given[:first]) / first for given in votes.values() if len(given) >= first]


def _log_fortunes(values: Sequence[float]) -> Floats:
    """Log of what each bet would have made of 1; bets x 1."""
    gains: Floats = np.log1p(np.outer(BETS, np.asarray(values, float) - 0.5)).sum(axis=1)
    return gains


def e_value(values: Sequence[float]) -> float:
    """E = mean over bets l of prod_i (1 + l·(x_i - 1/2)); 1 without values, and a tie changes nothing."""
    logs = _log_fortunes(values)
    top = float(logs.max())
    # Beyond e^700 a float overflows, and nobody's threshold is there.
    return math.exp(min(top, 700.0)) * float(np.exp(logs - top).mean())


def e_path(values: Sequence[float]) -> Floats:
    """Log of `e_value` after each value: what somebody sees who looks every time."""
    logs = np.log1p(np.outer(np.asarray(values, float) - 0.5, BETS)).cumsum(axis=0)
    top = logs.max(axis=1)
    path: Floats = top + np.log(np.exp(logs - top[:, None]).mean(axis=1))
    return path


def threshold(number: int, alpha: float) -> float:
    """i(i+1)/alpha for the i-th canary ever: 1/(i(i+1)) sums to 1, so all canaries together risk alpha."""
    return number * (number + 1) / alpha


def confidence_sequence(values: Sequence[float], alpha: float) -> tuple[float, float]:
    """Bounds of the mean of values in [0, 1] that hold at all times together with probability 1 - alpha.

    Hedged capital with predictable plug-in bets (Waudby-Smith & Ramdas 2023, eq. 26, truncation 1/2): all means against
    which neither a bet on more nor one on less ever made 2/alpha. (0, 1) without values.
    """
    means = np.linspace(0.0, 1.0, RESOLUTION)
    up, down, best = np.zeros(RESOLUTION), np.zeros(RESOLUTION), np.zeros(RESOLUTION)
    most_up = 0.5 / np.maximum(means, 1e-12)
    most_down = 0.5 / np.maximum(1 - means, 1e-12)
    total, squares, variance = 0.5, 0.25, 0.25
    for t, value in enumerate(values, start=1):
        bet = math.sqrt(2 * math.log(2 / alpha) / (variance * t * math.log(1 + t)))
        up += np.log1p(np.minimum(bet, most_up) * (value - means))
        down += np.log1p(np.minimum(bet, most_down) * (means - value))
        best = np.maximum(best, np.maximum(up, down))
        total += value
        squares += (value - total / (t + 1)) ** 2
        variance = squares / (t + 1)
    left = means[best < math.log(2 / alpha)]
    if len(left) == 0:  # only of values that no constant mean explains
        mean = float(np.mean(values))
        return mean, mean
    # The true mean lies between two points of the grid, so each bound is moved out by one of them.
    step = 1 / (RESOLUTION - 1)
    return max(0.0, float(left[0]) - step), min(1.0, float(left[-1]) + step)


def raters_needed(values: Sequence[float], bar: float) -> int | None:
    """How many more raters like those so far would lift the e-value to `bar`; None where they never would.

    While there are fewer than `FEW`, of raters who prefer the canary with probability `PLANNED_WIN_RATE`.
    """
    logs = _log_fortunes(values)
    if len(values) >= FEW:
        growth = logs / len(values)
    else:
        growth = PLANNED_WIN_RATE * np.log1p(BETS / 2) + (1 - PLANNED_WIN_RATE) * np.log1p(-BETS / 2)

    def reached(more: int) -> bool:
        return bool(np.logaddexp.reduce(logs + more * growth) - math.log(len(BETS)) >= math.log(bar))

    if reached(0):
        return 0
    if not reached(MOST_RATERS):
        return None
    low, high = 0, MOST_RATERS
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if reached(middle) else (middle, high)
    return high


@dataclass(frozen=True)
class WinTest:
    """The test as it stands."""

    raters: int
    """Who gave enough votes and so counts."""
    win_rate: float | None
    """Mean over raters; None without any."""
    low: float
    high: float
    """Of the win rate, valid at all times together."""
    e_value: float
    threshold: float
    needed: int | None
    """How many more raters it would take if they vote like the others; None where it would never end."""
    verdict: Verdict


def win_test(votes: Mapping[str, Sequence[float]], number: int, settings: RolloutSettings) -> WinTest:
    """`votes`: for each rater, in the order of their first votes, 1 for the canary, 0 for stable, 1/2 for neither.

    pass: the e-value is at least the threshold; fail: even the upper bound of the win rate is below `futility`; else
    inconclusive, with how many raters are missing.
    """
    values = rater_means(votes, settings.votes_per_rater)
    bar, found = threshold(number, settings.alpha), e_value(values)
    low, high = confidence_sequence(values, settings.alpha)
    needed, mean = raters_needed(values, bar), float(np.mean(values)) if values else None
    if mean is None:
        seen = f"none of {len(votes)} raters has given {settings.votes_per_rater} votes yet"
    else:
        seen = f"the canary wins {mean:.1%} ({low:.1%} to {high:.1%}) with {len(values)} raters"
    evidence = f"evidence {found:.3g}"
    if found >= bar:
        verdict = Verdict.passed("wins", f"{seen}; {evidence} >= {bar:g}")
    elif high < settings.futility:
        verdict = Verdict.failed(
            "wins", f"{seen}; {high:.1%} < {settings.futility:.0%}, so it will not win; train again with these ratings"
        )
    else:
        missing = f"about {needed} more raters like these" if needed is not None else "raters like these will not decide it; ask others"
        verdict = Verdict.inconclusive("wins", f"{seen}; {evidence}, needed >= {bar:g}: {missing}")
    figures = {"value": found, "comparison": ">=", "threshold": bar}
    if verdict.verdict == "fail":
        figures = {"value": high, "comparison": ">=", "threshold": settings.futility}
    return WinTest(len(values), mean, low, high, found, bar, needed, verdict.model_copy(update=figures))
