"""kill -9 of gateways, relay and archive readers under load: the short form of `make bench-kill`, with the same checker."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.kill import kills
from deploy.broker import Broker
from feedback.partitions import SqliteLogs
from feedback.sqlite_log import read_file

pytestmark = pytest.mark.slow


def test_nothing_that_was_acknowledged_is_lost_or_doubled(tmp_path: Path, kafka: Broker) -> None:
    found = kills(tmp_path, kafka, 0, {"gateway": 3, "relay": 1, "reader": 1})
    assert (found["anomalies"], found["first"]) == ({}, [])
    assert found["acknowledged"] > 50
    for path in SqliteLogs(tmp_path / "data" / "log").partitions():
        stamps = [record.event.stamp for record in read_file(path, 0, 1_000_000) if record.event]
        assert stamps == sorted(set(stamps))  # taken over by each new process; its clock never goes back


def test_the_control_that_acknowledges_before_it_writes_loses_some(tmp_path: Path) -> None:
    assert kills(tmp_path, None, 0, {"gateway": 2}, bug="lost write")["anomalies"].get("lost write", 0) > 0
