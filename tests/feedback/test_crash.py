"""kill -9 at any moment: what was promised is stored. The control promises before it stores, and this test catches it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from feedback.sqlite_log import SqliteLogs

ROOT = Path(__file__).parents[2]


def promised_and_lost(folder: Path, mode: str, promises: int) -> tuple[int, int]:
    """Kill the process once it has made so many promises; how many it made, and how many of those are not stored."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests' / 'feedback'}"}
    command = [sys.executable, str(ROOT / "tests" / "feedback" / "rating_process.py"), str(folder), mode]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        heard = [child.stdout.readline() for _ in range(promises)]
        os.kill(child.pid, signal.SIGKILL)
        heard += child.stdout.readlines()  # what was promised before the kill and not read yet
    said = {line.decode().strip() for line in heard if line.endswith(b"\n")}
    stored = [record.event.event_id for record in SqliteLogs(folder / "log").read({}, 1_000_000) if record.event]
    assert len(stored) == len(set(stored))
    return len(said), len(said - set(stored))


@pytest.mark.slow
def test_nothing_that_was_promised_is_lost(tmp_path: Path) -> None:
    for promises in (1, 50, 200, 333, 500):
        made, lost = promised_and_lost(tmp_path / str(promises), "durable", promises)
        assert made >= promises and lost == 0


@pytest.mark.slow
def test_the_control_that_promises_first_loses_some(tmp_path: Path) -> None:
    made, lost = promised_and_lost(tmp_path, "hasty", 300)
    assert made >= 300 and lost > 0


@pytest.mark.slow
def test_the_log_is_whole_after_many_kills_in_one_folder(tmp_path: Path) -> None:
    total = 0
    for _ in range(4):
        promised_and_lost(tmp_path, "durable", 40)
        stored = [record.event for record in SqliteLogs(tmp_path / "log").read({}, 1_000_000)]
        stamps = [event.stamp for event in stored if event is not None]
        assert len(stamps) == len(stored) > total
        assert stamps == sorted(set(stamps))  # one partition, taken over by each new process; stamps never go back
        total = len(stored)
