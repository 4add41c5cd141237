"""Guards of a canary: does it fail more often than the baseline arm? Valid however often one looks.

An asymptotic confidence sequence for a difference of proportions (Robbins' normal mixture; Waudby-Smith et al. 2021,
"Time-uniform central limit theory"), because people look after every answer and a fixed-n interval would then be wrong
about every third time.
"""

from __future__ import annotations

import math

from deploy.votes import Ends

TIGHTEST_AT = 500
"""Answers an arm at which the sequence is tightest."""
BURN_IN = 20
"""Answers an arm below which no guard speaks."""


def half_width(variance: float, n: float, alpha: float) -> float:
    """Of the two-sided 1 - alpha confidence sequence of a mean of n values with this variance.

    sqrt(v)·sqrt(2(n·rho²+1)/(n²·rho²)·ln(sqrt(n·rho²+1)/alpha)), rho chosen to be tightest at TIGHTEST_AT.
    """
    log_alpha = -2 * math.log(alpha)
    rho2 = (log_alpha + math.log(log_alpha) + 1) / TIGHTEST_AT
    return math.sqrt(variance) * math.sqrt(2 * (n * rho2 + 1) / (n**2 * rho2) * math.log(math.sqrt(n * rho2 + 1) / alpha))


def failure_rise(canary: Ends, baseline: Ends, alpha: float) -> tuple[float, float] | None:
    """(rise, its lower bound) of the failure rate against the baseline; None while there is too little to say."""
    if min(canary.answers, baseline.answers) < BURN_IN:
        return None
    # One failure and one success more on each side: a variance of 0 would make any single failure significant.
    rates = [(each.failed + 1) / (each.answers + 2) for each in (canary, baseline)]
    rise = canary.failed / canary.answers - baseline.failed / baseline.answers
    n = min(canary.answers, baseline.answers)
    return rise, rise - half_width(sum(rate * (1 - rate) for rate in rates), n, 2 * alpha)
