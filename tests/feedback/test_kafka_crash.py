"""kill -9 between a write and its acknowledgement: written twice, archived once. The control marks before it sends, and loses."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from feedback_world import rating
from kafka_world import MARKS, a_topic, archived, in_topic
from waiting import until

from deploy.broker import Broker
from feedback.archive import Archive
from feedback.clock import HybridClock
from feedback.config import KafkaSettings
from feedback.kafka_log import KafkaLog
from feedback.log import EventLog
from feedback.relay import Relay
from feedback.sqlite_log import SqliteLog

pytestmark = [*MARKS, pytest.mark.slow]
ROOT = Path(__file__).parents[2]


def dies(mode: str, folder: Path, settings: KafkaSettings) -> None:
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests' / 'feedback'}"}
    command = [sys.executable, str(ROOT / "tests/feedback/crash_process.py"), mode, str(folder), settings.model_dump_json()]
    assert subprocess.run(command, env=environment, timeout=60, check=False, capture_output=True).returncode == -signal.SIGKILL


@pytest.mark.parametrize("kind", ["sqlite", "kafka"])
def test_what_was_written_and_not_told_is_said_again_and_counts_once(kind: str, kafka: Broker, tmp_path: Path) -> None:
    settings = a_topic(kafka)
    dies(kind, tmp_path, settings)
    log: EventLog = SqliteLog(tmp_path / "one.sqlite", HybridClock()) if kind == "sqlite" else KafkaLog(settings, HybridClock())
    asyncio.run(log.append([rating("i", "r", "up", event_id="e")]))  # the client never heard of it and says it again
    assert len(log.read({}, 10)) == {"sqlite": 1, "kafka": 2}[kind]
    archive = Archive(tmp_path / "archive.sqlite")
    assert archive.ingest(log) == 1
    archive.close()
    log.close()


@pytest.mark.parametrize(("mode", "copies"), [("relay", 2), ("forgetful", 0)])
def test_a_relay_that_dies_before_its_mark_sends_again(mode: str, copies: int, kafka: Broker, tmp_path: Path) -> None:
    settings, said = a_topic(kafka), [f"e{n}" for n in range(5)]
    log = SqliteLog(tmp_path / "log" / "gateway.sqlite", HybridClock())
    log.append_sync([rating(f"i{n}", "r", "up", event_id=event_id) for n, event_id in enumerate(said)])
    log.close()
    dies(mode, tmp_path / "log", settings)
    relay = Relay(tmp_path / "log", settings)
    until(lambda: relay.pending() == 0)
    relay.close()
    assert in_topic(settings) == sorted(said * copies)
    assert archived(settings, tmp_path) == (said if copies else [])
