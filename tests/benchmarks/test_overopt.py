"""What bench-overopt concludes from a run, on one that fits on a line."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.overopt import UNLIMITED_NATS, best, released, shape, share
from benchmarks.plots import overopt as draw

CURVE: dict[str, Any] = {
    "kl_nats": [-0.01, 1.0, 4.0, 9.0],
    "score": [0.0, 1.0, 2.0, 3.0],
    "stop_score": [0.0, 1.0, 1.5, 1.25],
    "gain": [0.0, 2.0, 3.0, 1.0],
    "released": 3,
    "other_raters_would_release": 1,
    "kl_target_nats": UNLIMITED_NATS,
}


def test_the_best_is_looked_for_within_the_budget_only() -> None:
    assert (best(CURVE), best(CURVE, 1.5), released(CURVE)) == (3.0, 2.0, 1.0)
    unmeasured = CURVE | {"gain": [0.0, None, None, 1.0]}
    assert best(unmeasured) == 1.0
    assert share(1.0, best(CURVE)) == pytest.approx(1 / 3)
    assert share(-0.2, 0.0) == 0.0


def test_the_shape_of_a_run() -> None:
    found = shape(CURVE)
    assert found["proxy_line_r2"] == pytest.approx(1.0)  # the score is the distance 0, 1, 2, 3
    assert (found["peak_step"], found["peak_distance"]) == (2, 2.0)
    assert (found["stop_share"], found["end_share"]) == (pytest.approx(2 / 3), pytest.approx(1 / 3))
    # 2 - 1.5 at the peak, 3 - 1.25 at the end; the other raters' score fell by 0.25 meanwhile.
    assert (found["gap_at_peak"], found["gap_at_end"], found["other_raters_rose_after_peak"]) == (0.5, 1.75, -0.25)
    assert 1 < found["hump"]["peak"] < 3


def test_a_run_without_other_raters_has_no_gap() -> None:
    assert "gap_at_end" not in shape(CURVE | {"stop_score": [None] * 4})


def test_the_plot_is_the_same_for_the_same_figures() -> None:
    inside, outside = {"free": CURVE, "chosen": CURVE}, {"first": CURVE, "second": CURVE, "known": CURVE}
    result = {"figures": {"inside": [inside], "outside": [outside]}}
    assert draw(result) == draw(result)
    assert draw(result).startswith("<svg role")
