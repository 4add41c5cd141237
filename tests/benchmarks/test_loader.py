"""The loader's benchmark in small: nothing wrong is held while an enemy exchanges files, and the naive loader shows that it tries."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.loader import KINDS, exchange, flips, honest_ones
from benchmarks.sealed import make_policy


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    return make_policy(tmp_path / "policy")


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_held_is_what_was_hashed(policy: Path, tmp_path: Path, kind: str) -> None:
    found = exchange(policy, tmp_path / "work", kind, 3)
    assert found["something else"] == 0 and found["refused"] + found["as hashed"] == 3 and found["swaps"] > 0


def test_flipped_bytes_and_honest_adapters_are_told_apart(policy: Path, tmp_path: Path) -> None:
    assert flips(policy, tmp_path / "flips", 6)["taken"] == []
    assert honest_ones(policy, tmp_path / "honest", 2)["held"] == 2
