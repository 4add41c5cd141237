"""The k-th write, fsync or rename fails, for every k: nothing is acknowledged that a power cut could take, and no file is broken.

`PLAUDIT_EVERY_FAULT=1` tries every k in every scenario; without it the slower ones try every few. Where a fault was not met the sweep
has come to its end, and a sweep that ends too early fails.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from disk_faults import FAULTS, Found, Worker, compile_shim, sweep

EVERY = bool(os.environ.get("PLAUDIT_EVERY_FAULT"))
STEPS = {"append": 2, "checkpoint": 3, "ingest": 5, "take": 13, "redact": 7, "erase": 5}
"""How many writes each sweep goes forward at once."""
LEAST = {
    "write": {"append": 50, "checkpoint": 60, "ingest": 40, "take": 70, "redact": 40, "erase": 40},
    "sync": {"append": 10, "checkpoint": 15, "ingest": 6, "take": 7, "redact": 4, "erase": 7},
    "name": {"take": 1, "redact": 2},
}
"""A scenario that meets fewer has not been swept."""


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    if sys.platform != "linux" or shutil.which("cc") is None:
        if os.environ.get("CI") == "true":
            pytest.fail("fail_io.c needs Linux and a C compiler named cc")
        pytest.skip("fail_io.c needs Linux and a C compiler named cc")
    worker = Worker(compile_shim(tmp_path_factory.mktemp("shim")))
    yield worker
    worker.close()


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """In memory where that is possible: the faults are played, and real fsyncs would only take time."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else tmp_path) as path:
        yield Path(path)


def swept(worker: Worker, scenario: str, name: str, folder: Path, careless: str = "") -> Found:
    fault = FAULTS[name]
    step = 1 if EVERY or fault.calls != "write" else STEPS[scenario]
    found = sweep(worker, scenario, fault, folder, careless, step)
    assert found.last >= LEAST[fault.calls][scenario] // (2 if careless else 1)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, fault in FAULTS.items() if fault.calls != "name"])
@pytest.mark.parametrize("scenario", ["append", "checkpoint", "ingest", "take", "redact", "erase"])
def test_a_disk_that_fails_loses_nothing_acknowledged(worker: Worker, scenario: str, name: str, folder: Path) -> None:
    found = swept(worker, scenario, name, folder)
    assert found.problems == []
    assert found.refused >= found.runs / 2  # the other failures are ones that may be passed over, as of a checkpoint that comes again


@pytest.mark.slow
@pytest.mark.parametrize("scenario", ["take", "redact"])
def test_a_rename_that_fails_leaves_a_whole_snapshot(worker: Worker, scenario: str, folder: Path) -> None:
    found = swept(worker, scenario, "rename error", folder)
    assert found.problems == [] and found.refused == found.runs


@pytest.mark.slow
@pytest.mark.parametrize(
    ("careless", "name"),
    [
        ("hasty", "disk full"),  # acknowledges before it commits
        ("unsynced", "fsync error"),  # commits without an fsync
        ("unsettled", "fsync errors"),  # takes what it finds in the write-ahead log for durable
        ("unsettled", "fsync error, then killed"),
        ("forthcoming", "fsync errors"),  # lets readers find what it has refused
        ("undurable mode", "fsync error"),  # goes on in another journal mode
    ],
)
def test_a_careless_log_is_caught(worker: Worker, careless: str, name: str, folder: Path) -> None:
    problems = swept(worker, "append", name, folder, careless).problems
    caught = "was refused and is shown" if careless == "forthcoming" else "was acknowledged and is not stored"
    assert any(caught in problem for problem in problems)
