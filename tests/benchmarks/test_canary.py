"""The simulation decides as the product would that is told each answer, and tells a fault from none."""

from __future__ import annotations

import math

import numpy as np
import pytest

from benchmarks.canary import first_stop, generators, naive_stop, pairs_of, traffic, undecided
from deploy.guards import DEPTHS, GUARDRAILS, Arm, Guards, path

FEW = 1_500


@pytest.mark.parametrize("fault", [None, "early stop"])
def test_it_decides_as_the_product(fault: str | None) -> None:
    seen = traffic(np.random.default_rng(5), fault)
    guards = Guards(0.025)
    for at in range(FEW):
        arm: Arm = "canary" if seen.canary[at] else "baseline"
        for each in GUARDRAILS:
            if not math.isnan(value := float(seen.figures[each.name][at])):
                guards.measured(each.name, str(seen.person[at]), arm, value)
        if at % 10 == 0 or at == FEW - 1:
            guards.verdicts()
    every = [(each, depth) for each in GUARDRAILS for depth in DEPTHS]
    for (guardrail, depth), (_, when, differences) in zip(every, pairs_of(seen), strict=True):
        found = differences[: int(np.searchsorted(when, FEW))]
        evidence = guards._evidence[guardrail.name, depth]
        assert evidence.pairs == len(found)
        assert evidence.mean == pytest.approx(guardrail.span * float(found.mean()) if len(found) else 0.0, abs=1e-9)
        if len(found):  # the simulation looks after every answer, above after every tenth
            highest = float(path(found, guardrail.margin / guardrail.span).max())
            assert evidence.log_e <= max(highest, 0.0) + 1e-9


def test_a_fault_is_stopped_by_its_guardrail_and_nothing_else_is() -> None:
    rng = generators("test", 3)
    stop = first_stop(traffic(rng[0], "length"))
    assert stop is not None and stop[0] == "longer" and stop[1] < 2_000
    calm = traffic(rng[1], None)
    assert first_stop(calm) is None
    assert sum(naive_stop(traffic(each, None)) for each in generators("naive", 4)) >= 2


def test_divided_tastes_rarely_win() -> None:
    found = undecided(20)
    assert found["wins"] <= 2 and found["naive"] > 4 and found["votes_of_20"] > 4
