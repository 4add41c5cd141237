"""What `make bench-labels` stands on: nested logs, a control that only moves what was said, and the choice of settings."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from benchmarks import labels, plots
from benchmarks.harness import Report


def test_fewer_labels_are_the_first_of_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labels, "COMPARISONS", 16)
    few, more = (labels.log(0, n, tmp_path / str(n)).snapshot.rows for n in (12, 30))
    assert (len(few), len(more)) == (12, 30)
    said = {row.event_id: (row.prompt, row.answer_a, row.answer_b, row.outcome) for row in more}
    assert all(said[row.event_id] == (row.prompt, row.answer_a, row.answer_b, row.outcome) for row in few)
    # Sorted as they were given, the few lie before the rest: comparison 0's, then comparison 1's, ...
    given = [int(row.event_id.split("comparison-")[1].split("-")[0]) for row in few]
    assert max(given) <= min(int(i.split("comparison-")[1].split("-")[0]) for i in said.keys() - {row.event_id for row in few})


def test_the_control_keeps_every_outcome_and_moves_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labels, "COMPARISONS", 16)
    before = labels.log(0, 40, tmp_path).snapshot
    after = labels.shuffled(before, 1)
    for kind in ("choice", "thumb"):
        counts = [Counter(row.outcome for row in rows if row.kind == kind) for rows in (before.rows, after.rows)]
        assert counts[0] == counts[1]
    assert [row.event_id for row in before.rows] == [row.event_id for row in after.rows]
    assert [row.outcome for row in before.rows] != [row.outcome for row in after.rows]


def test_the_configuration_with_the_highest_mean_goes_on() -> None:
    grid = labels.GRIDS["dpo"]
    # Means 0.60, 0.65, 0.64: the second, although the third has the best single world.
    wins = {0: (0.6, 0.6), 1: (0.6, 0.7), 2: (0.5, 0.78)}
    rows = [{"method": "dpo", "configuration": dict(grid[i]), "wins": one} for i, both in wins.items() for one in both]
    assert labels.best("dpo", rows) == grid[1]
    assert labels.best("kto", rows) == labels.GRIDS["kto"][0]


@pytest.mark.parametrize(("won", "holds"), [(0.68, True), (0.66, False)])
def test_more_than_three_points_below_the_better_one_fails(won: float, holds: bool, tmp_path: Path) -> None:
    # DPO's median is 0.70, KTO's 0.60: ours may be 0.67 at least.
    wins = {"ours": won, "dpo": 0.7, "kto": 0.6}
    rows = [{"method": m, "world": w, "labels": 100, "wins": x, "kl_nats": 1.0} for m, x in wins.items() for w in range(3)]
    report = Report("labels", seed=0, rooms=(), folder=tmp_path)
    (found,) = labels.compare(report, rows, (100,))
    assert (found["W ours"], found["W dpo"], found["worlds"]) == (won, 0.7, 3)
    assert report.checks[0]["ok"] is holds
    assert f"minus that of dpo (paired by world {won - 0.7:+.3f} to {won - 0.7:+.3f})" in str(report.checks[0]["what"])


def test_the_plot_is_the_same_bytes_for_the_same_figures() -> None:
    cells = [{"method": m, "world": w, "labels": n, "wins": 0.5 + w / 10} for m in labels.GRIDS for n in labels.COUNTS for w in range(3)]
    drawn = [plots.labels({"figures": {"cells": cells}}) for _ in range(2)]
    assert drawn[0] == drawn[1]
    assert all(name in drawn[0] for _, name in plots.LABEL_METHODS.values())
