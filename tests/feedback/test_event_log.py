"""The contract of `EventLog`, for the embedded log and for a real Kafka."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from feedback_world import rating
from kafka_world import MARKS

from feedback.archive import Archive
from feedback.clock import HybridClock
from feedback.config import KafkaSettings
from feedback.kafka_log import KafkaLog
from feedback.log import EventLog, Position
from feedback.sqlite_log import SqliteLog

pytestmark = MARKS
Opener = Callable[[], EventLog]


@pytest.fixture(params=["sqlite", pytest.param("kafka", marks=pytest.mark.slow)])
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Opener]:
    """Opens the same log, as often as a test wants to be another process."""
    logs: list[EventLog] = []
    settings = KafkaSettings(topic=f"events-{time.time_ns()}", partitions=3)
    if request.param == "kafka":
        settings = settings.model_copy(update={"bootstrap": request.getfixturevalue("kafka").bootstrap})

    def opener() -> EventLog:
        log = SqliteLog(tmp_path / "one.sqlite", HybridClock()) if request.param == "sqlite" else KafkaLog(settings, HybridClock())
        logs.append(log)
        return log

    yield opener
    for log in logs:
        log.close()


@pytest.fixture
def log(opened: Opener) -> EventLog:
    return opened()


def test_what_is_appended_can_be_read_from_any_position(log: EventLog) -> None:
    said = [rating(f"i{n % 5}", "r", "up") for n in range(40)]
    stored = [asyncio.run(log.append([event]))[0] for event in said]
    assert [event.model_copy(update={"stamp": 0}) for event in stored] == said
    assert [event.stamp for event in stored] == sorted({event.stamp for event in stored})
    records = log.read({}, 100)
    assert sorted(event.event_id for event in stored) == sorted(record.event.event_id for record in records if record.event)
    position: Position = {}
    again: list[str] = []
    while batch := log.read(position, 7):
        assert len(batch) <= 7
        for record in batch:
            assert record.offset >= position.get(record.partition, 0)
            position[record.partition] = record.offset + 1
            again += [record.event.event_id] if record.event else []
    assert sorted(again) == sorted(event.event_id for event in said)


def test_what_is_said_about_one_target_stays_in_order(log: EventLog) -> None:
    stored = asyncio.run(log.append([rating(f"i{n % 3}", "r", "up" if n % 2 else "down") for n in range(30)]))
    records = log.read({}, 100)
    for target in ("i0", "i1", "i2"):
        mine = [event for event in stored if getattr(event, "target", None) == target]
        assert [record.event for record in records if getattr(record.event, "target", None) == target] == mine
        assert len({record.partition for record in records if getattr(record.event, "target", None) == target}) == 1


def test_an_archive_reads_each_event_once(log: EventLog, tmp_path: Path) -> None:
    asyncio.run(log.append([rating(f"i{n}", "r", "up", event_id=f"e{n}") for n in range(25)]))
    asyncio.run(log.append([rating("i0", "r", "up", event_id="e0")]))  # said twice
    archive = Archive(tmp_path / "archive.sqlite")
    assert archive.ingest(log) == 25
    assert archive.ingest(log) == 0
    archive.close()


def test_another_process_goes_on_where_the_archive_is(opened: Opener, tmp_path: Path) -> None:
    first = opened()
    asyncio.run(first.append([rating(f"i{n}", "r", "up", event_id=f"e{n}") for n in range(10)]))
    archive = Archive(tmp_path / "archive.sqlite")
    assert archive.ingest(first) == 10
    first.close()
    archive.close()
    second = opened()
    asyncio.run(second.append([rating(f"i{n}", "r", "down", event_id=f"f{n}") for n in range(4)]))
    archive = Archive(tmp_path / "archive.sqlite")
    assert len(second.read(archive.positions(), 100)) == 4
    assert archive.ingest(second) == 4
    archive.close()


def test_a_log_that_was_cut_short_brings_nothing_twice(log: EventLog, tmp_path: Path) -> None:
    asyncio.run(log.append([rating("i", "r", "up", event_id=f"e{n}") for n in range(3)]))
    archive = Archive(tmp_path / "archive.sqlite")
    assert archive.ingest(log) == 3
    beyond = {partition: offset + 100 for partition, offset in archive.positions().items()}
    records = log.read(beyond, 100)  # may begin anew
    assert archive.store(records, archive.positions()) == 0
    archive.close()
