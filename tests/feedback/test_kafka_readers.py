"""The archive's readers as a consumer group: shared partitions, pauses, kills, a stale owner, poison, a topic made anew."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from feedback_world import rating
from kafka_world import MARKS, Hand, a_topic, broker_away, stores_with
from waiting import until

from deploy.broker import Broker
from feedback.archive import Archive
from feedback.clock import HybridClock
from feedback.config import KafkaSettings
from feedback.errors import Conflict, NotDurable
from feedback.kafka_log import KafkaLog
from feedback.log import Position, Record
from feedback.readers import GroupReader

pytestmark = [*MARKS, pytest.mark.slow]
ROOT = Path(__file__).parents[2]


class Talk:
    """Says numbered things into the topic, one batch after the other, until it is told to stop."""

    def __init__(self, settings: KafkaSettings, per_batch: int = 20, every_s: float = 0.05) -> None:
        self.said = 0
        self._log = KafkaLog(settings, HybridClock())
        self._log.topic.check()
        self._per_batch, self._every_s = per_batch, every_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(self._every_s):
            numbers = range(self.said, self.said + self._per_batch)
            asyncio.run(self._log.append([rating(f"i{n}", "r", "up", event_id=f"e{n:05}") for n in numbers]))
            self.said += self._per_batch

    def end(self) -> list[str]:
        self._stop.set()
        self._thread.join()
        self._log.close()
        return [f"e{n:05}" for n in range(self.said)]


@contextmanager
def member(path: Path, settings: KafkaSettings, name: str) -> Iterator[subprocess.Popen[str]]:
    """A reader in a process of its own; what it says goes to `<name>.txt` beside the archive."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "tests/feedback/reader_process.py"), str(path), settings.model_dump_json(), name]
    with (path.parent / f"{name}.txt").open("a") as out:
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=out, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def lines(path: Path, name: str) -> list[str]:
    """`# <new events> <partition>...` for each batch, without what the log says."""
    return [line for line in (path.parent / f"{name}.txt").read_text().splitlines() if line.startswith("# ")]


def kept(path: Path) -> list[str]:
    archive = Archive(path)
    found = sorted(event.event_id for event in archive.events("feedback.given", limit=1_000_000))
    archive.close()
    return found


def counted(path: Path) -> int:
    """How many events all members together called new."""
    return sum(int(line.split()[1]) for file in path.parent.glob("*.txt") for line in lines(path, file.stem))


def test_two_members_share_the_partitions_and_a_killed_one_is_replaced(kafka: Broker, tmp_path: Path) -> None:
    settings, path = a_topic(kafka, partitions=4), tmp_path / "archive.sqlite"
    Archive(path).close()
    talk = Talk(settings)
    try:
        with member(path, settings, "a") as a, member(path, settings, "b"):
            # Both store, and each owns two of the four.
            until(lambda: all(any(len(line.split()) == 4 for line in lines(path, name)) for name in "ab"), 40)
            a.kill()
            with member(path, settings, "a"):  # the same member again: its partitions are still its own
                before = len(lines(path, "a"))
                until(lambda: len(lines(path, "a")) > before, 40)
                a_again = lines(path, "a")[-1]
                assert len(a_again.split()) == 4
            until(lambda: any(len(line.split()) == 6 for line in lines(path, "b")), 40)  # a is dead for good: b has all four
            said = talk.end()
            until(lambda: kept(path) == said)
    finally:
        said = talk.end()
    assert kept(path) == said and counted(path) <= len(said)  # a killed member may not have said what it stored


def test_a_pause_longer_than_the_poll_interval_does_no_harm(kafka: Broker, tmp_path: Path) -> None:
    """Paused by SIGSTOP while its partitions go to the other one, and let go on."""
    settings, path = a_topic(kafka, partitions=4, session_timeout_s=1.5, max_poll_interval_s=3.0), tmp_path / "archive.sqlite"
    Archive(path).close()
    talk = Talk(settings)
    try:
        with member(path, settings, "a") as a, member(path, settings, "b"):
            until(lambda: all(any(len(line.split()) == 4 for line in lines(path, name)) for name in "ab"), 40)
            a.send_signal(signal.SIGSTOP)
            until(lambda: len(lines(path, "b")[-1].split()) == 6, 40)
            a.send_signal(signal.SIGCONT)
            until(lambda: len(lines(path, "b")[-1].split()) == 4 and len(lines(path, "a")[-1].split()) == 4, 40)
            said = talk.end()
            until(lambda: kept(path) == said)
            until(lambda: counted(path) == len(said))  # each was new exactly once
    finally:
        talk.end()


class Slow(Archive):
    """Stores when it is let, as a member does that was paused between reading and storing."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.reached, self.go = threading.Event(), threading.Event()
        self.refused: list[str] = []

    def store(self, records: list[Record], position: Position, owned: dict[str, int] | None = None) -> int:  # type: ignore[override]
        self.reached.set()
        self.go.wait(30)
        try:
            return super().store(records, position, owned)
        except Conflict as exc:
            self.refused.append(exc.message)
            raise


class Trusting(Slow):
    """The control: stores whatever it was given, whoever owns the partition now."""

    def store(self, records: list[Record], position: Position, owned: dict[str, int] | None = None) -> int:  # type: ignore[override]
        self.reached.set()
        self.go.wait(30)
        with self._transaction() as db:
            db.executemany("INSERT OR REPLACE INTO positions VALUES (?, ?)", [(each.partition, each.offset + 1) for each in records])
        return len(records)


@pytest.mark.parametrize("kind", [Slow, Trusting])
def test_the_batch_of_a_stale_owner_is_refused(kind: type[Slow], kafka: Broker, tmp_path: Path) -> None:
    settings = a_topic(kafka, partitions=1, session_timeout_s=1.5, max_poll_interval_s=1.5)
    log = KafkaLog(settings, HybridClock())
    asyncio.run(log.append([rating("i", "r", "up", event_id=f"e{n}") for n in range(10)]))
    path = tmp_path / "archive.sqlite"
    slow = kind(path)
    stale, fresh = GroupReader(slow, settings, "stale"), GroupReader(Archive(path), settings, "fresh")
    outcome: list[int | None] = []

    def pause() -> None:
        while not slow.reached.is_set():
            outcome.append(stale.step())

    paused = threading.Thread(target=pause)
    paused.start()
    assert slow.reached.wait(30)  # it holds ten events in its hands and sleeps over its poll interval
    until(lambda: fresh.catch_up() == 10, 40)
    asyncio.run(log.append([rating("j", "r", "up", event_id=f"f{n}") for n in range(5)]))
    until(lambda: fresh.catch_up() == 5)
    at = Archive(path).positions()
    slow.go.set()
    paused.join()
    if kind is Slow:
        assert outcome[-1] is None and stale.owned() == set() and len(slow.refused) == 1
        assert Archive(path).positions() == at
    else:
        assert Archive(path).positions() != at  # the position went back: every event is read again, and only the ids save it
    stale.close()
    fresh.close()
    log.close()


def test_a_member_that_leaves_hands_over_at_once(kafka: Broker, tmp_path: Path) -> None:
    settings = a_topic(kafka, session_timeout_s=30.0)
    log = KafkaLog(settings, HybridClock())
    archive = Archive(tmp_path / "archive.sqlite")
    first, second = GroupReader(archive, settings, "first"), GroupReader(archive, settings, "second")
    until(lambda: first.catch_up() == 0 and len(first.owned()) == 3)
    first.close()
    asyncio.run(log.append([rating("i", "r", "up")]))
    started = time.monotonic()
    until(lambda: second.catch_up() == 1)
    assert time.monotonic() - started < 10  # not the thirty seconds after which a silent one is given up
    second.close()
    log.close()


def test_poison_is_set_aside_and_counted_and_the_rest_goes_on(kafka: Broker, tmp_path: Path) -> None:
    settings = a_topic(kafka, partitions=1)
    log = KafkaLog(settings, HybridClock())
    asyncio.run(log.append([rating("i", "r", "up", event_id="before")]))
    with Hand(settings) as hand:
        for value in (b"\xff\x00 no JSON", b'{"type": "from.tomorrow"}', None):
            hand.write(value)
    asyncio.run(log.append([rating("i", "s", "up", event_id="behind")]))
    archive = Archive(tmp_path / "archive.sqlite")
    reader = GroupReader(archive, settings, "one")
    total = 0

    def read() -> bool:
        nonlocal total
        total += reader.catch_up()
        return total == 2

    until(read)
    assert archive.counts() == {"feedback.given": 2, "held:rating": 2, "poison": 3}
    reader.close()
    assert archive.ingest(log) == 0 and archive.counts()["poison"] == 3
    archive.close()
    log.close()


def test_a_reader_waits_out_an_outage_and_a_topic_made_anew(kafka: Broker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("feedback.readers.TOPIC_S", 0.5)
    monkeypatch.setattr("feedback.kafka_topic.CONNECT_S", 1.0)
    settings = a_topic(kafka)
    stores = stores_with(settings, tmp_path)
    with broker_away(kafka):
        stores.start_reading()  # a service that starts while the broker is away
        with pytest.raises(NotDurable, match="does not answer"):
            stores.ingest()
    said = [f"e{n:02}" for n in range(40)]
    asyncio.run(stores.record_feedback([rating(f"i{event_id}", "r", "up", event_id=event_id) for event_id in said[:30]]))

    def held() -> list[str]:
        try:
            stores.ingest()
        except NotDurable as exc:
            told.append(exc.message)
        return sorted(event.event_id for event in stores.archive.events("feedback.given"))

    told: list[str] = []
    until(lambda: held() == said[:30])
    with Hand(settings) as hand:
        hand.delete()
        until(lambda: held() and any("deleted" in each for each in told))
        hand.make(retention_ms="-1")
    asyncio.run(stores.record_feedback([rating(f"i{event_id}", "r", "up", event_id=event_id) for event_id in said[30:]]))
    until(lambda: held() == said)  # offsets of the new topic lie below those of the old one, and are read all the same
    assert stores.archive.counts()["held:rating"] == 40
    stores.close()


def test_commands_leave_reading_to_the_group(kafka: Broker, tmp_path: Path) -> None:
    settings = a_topic(kafka)
    service, command = stores_with(settings, tmp_path), stores_with(settings, tmp_path, process="operator")
    service.start_reading()
    asyncio.run(command.record_feedback([rating("i", "r", "up")]))
    assert command.ingest() == 0
    until(lambda: service.ingest() == 1)
    assert command.archive.counts()["held:rating"] == 1
    assert all(partition.startswith(f"{settings.topic}/") for partition in service.archive.positions())  # no event is read twice
    command.close()
    service.close()
