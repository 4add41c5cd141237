"""When finished cells are stale."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import harness


def test_a_room_may_be_a_file_whose_change_makes_cells_stale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "ROOT", tmp_path)
    (tmp_path / "benchmarks").mkdir()
    for name in ("one", "other"):
        (tmp_path / "benchmarks" / f"{name}.py").write_text("A = 1\n")
    before = [harness.code_digest("", "benchmarks/one.py"), harness.code_digest("", "benchmarks")]
    (tmp_path / "benchmarks" / "other.py").write_text("A = 2\n")
    assert harness.code_digest("", "benchmarks/one.py") == before[0]
    assert harness.code_digest("", "benchmarks") != before[1]
    (tmp_path / "benchmarks" / "one.py").write_text("A = 2\n")
    assert harness.code_digest("", "benchmarks/one.py") != before[0]
    with pytest.raises(FileNotFoundError):
        harness.code_digest("", "benchmarks/renamed.py")
