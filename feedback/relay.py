"""Carries what lies in SQLite partitions to Kafka and marks what arrived. A thread of the gateway, or a process of its own.

A row is marked after Kafka has acknowledged it, so a crash between the two sends it twice and never loses it; readers de-duplicate by
`event_id`. A row that Kafka will never take goes to `dead_letters`, so that it does not stop the ones behind it.
"""

from __future__ import annotations

import asyncio
import sqlite3
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from pathlib import Path

import structlog

from feedback import outbox
from feedback.clock import HybridClock
from feedback.config import KafkaSettings
from feedback.errors import ConfigError, NotDurable
from feedback.events import Event
from feedback.kafka_log import KafkaLog
from feedback.kafka_topic import RETRY_AFTER_S
from feedback.outbox import Outbox
from feedback.partitions import SqliteLogs

log = structlog.get_logger(__name__)

IDLE_S = 0.05
AWAY_S = 1.0
LOOK_S = 1.0
"""How often to look for new partitions, and for those whose relay has died."""
TOPIC_S = 5.0
"""How often an idle relay asks whether the topic is still the one that it sent to."""


class Relay:
    """Owns its thread and its connections. Carries every partition of the folder that no other relay holds, `own` first; the rows of each
    leave in the order in which they were committed, one batch at a time."""

    def __init__(self, folder: Path, settings: KafkaSettings, own: Path | None = None) -> None:
        self._logs = SqliteLogs(folder)
        self._batch = settings.batch_events
        self._kafka = KafkaLog(settings, HybridClock())
        self._own = own
        self._held: dict[Path, Outbox] = {}
        self._broken: set[Path] = set()
        self._waiting: dict[str, Future[None]] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._wake = threading.Event()
        self._said: str | None = None
        self.problem: str | None = None
        """Why nothing is carried at the moment."""
        self.sent = 0
        self.dead = 0
        self._take()  # before the thread starts, so that a gateway that comes back holds its own partition at once
        self._thread = threading.Thread(target=self._run, name="relay", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread; what was not sent stays marked so."""
        self._stop.set()
        self._wake.set()
        self._kafka.close()  # what is being sent is given up
        self._thread.join()
        for each in self._held.values():
            each.close()

    def check(self) -> None:
        """Look at the topic now. Raises ConfigError where it would lose events, NotDurable where no broker answers."""
        self._kafka.topic.check()

    async def delivered(self, events: Sequence[Event], timeout_s: float) -> None:
        """Return when Kafka has all of them, whichever relay carried them. Raises NotDurable after `timeout_s`; a dead letter at once."""
        futures: list[Future[None]] = []
        with self._lock:
            for event in events:
                futures.append(self._waiting.setdefault(event.event_id, Future()))
        # Registered first, looked up second: whatever was marked in between is found by the look-up.
        await asyncio.to_thread(self._resolve_marked, self._logs.partitions(), [event.event_id for event in events])
        self._wake.set()
        try:
            async with asyncio.timeout(timeout_s):
                waits = [asyncio.shield(asyncio.wrap_future(future)) for future in futures]
                for outcome in await asyncio.gather(*waits, return_exceptions=True):
                    if isinstance(outcome, BaseException):
                        raise outcome
        except TimeoutError:
            reason = self.problem or f"Kafka did not confirm within {timeout_s:g} s"
            raise NotDurable(f"stored here, not yet by the broker: {reason}", retry_after_s=RETRY_AFTER_S) from None
        finally:
            with self._lock:
                for event in events:
                    self._waiting.pop(event.event_id, None)

    def pending(self) -> int:
        """How many rows wait to be sent, in the whole folder."""
        return outbox.count(self._logs.partitions(), outbox.WAITS)

    def dead_letters(self) -> int:
        """How many rows Kafka will not take, in the whole folder."""
        return outbox.count(self._logs.partitions(), outbox.DEAD)

    def holds(self) -> set[str]:
        """The partitions that this relay carries."""
        return {path.stem for path in self._held}

    def _run(self) -> None:
        # A short command that has nothing to send ends before it has asked anything.
        looked, asked = time.monotonic(), time.monotonic() - TOPIC_S + LOOK_S
        while not self._stop.is_set():
            self._wake.clear()
            try:
                if time.monotonic() - looked > LOOK_S:
                    looked = time.monotonic()
                    self._take()
                moved = sum(self._drain_or_let_go(path) for path in list(self._held))
                if moved or time.monotonic() - asked > TOPIC_S:
                    asked = time.monotonic()
                    if not moved:
                        self._compare_topic()
                    self.problem, self._said = None, None  # Kafka has answered
                self._resolve_elsewhere()
                self._wake.wait(0 if moved else IDLE_S)
            except (NotDurable, ConfigError) as exc:
                self._tell(exc.message, exc.field or "")
                self._stop.wait(AWAY_S)

    def _tell(self, problem: str, kind: str) -> None:
        """Log what stops the relay, once for each kind of trouble; it goes on trying."""
        if self._stop.is_set():
            return
        self.problem = problem
        if kind != self._said:
            log.warning("relay.waits", problem=problem)
            self._said = kind

    def _take(self) -> None:
        """Hold every partition that no other relay holds."""
        for path in sorted(self._logs.partitions(), key=lambda each: each != self._own):
            if path in self._held:
                continue
            try:
                taken = Outbox.take(path)
            except (sqlite3.Error, OSError) as exc:
                self._tell_broken(path, exc)
            else:
                if taken is not None:
                    self._held[path] = taken
                    self._broken.discard(path)

    def _drain_or_let_go(self, path: Path) -> int:
        """A partition that cannot be read or marked does not hold up the others; it is tried again with the next look."""
        try:
            return self._drain(self._held[path])
        except sqlite3.Error as exc:
            self._tell_broken(path, exc)
            self._held.pop(path).close()
            return 0

    def _tell_broken(self, path: Path, exc: Exception) -> None:
        if path not in self._broken:
            log.error("relay.partition_unusable", partition=path.stem, problem=str(exc))
            self._broken.add(path)

    def _drain(self, box: Outbox) -> int:
        """Send one batch of a partition; how many rows it had."""
        rows = box.waiting(self._batch)
        if not rows:
            return 0
        problems = self._kafka.send([(key, value) for _, _, key, value in rows])
        # Asked after Kafka took them: a topic that was made anew in between would hold some of them, or none.
        if not self._mark(box, self._kafka.topic.key(), rows, problems):
            return len(rows)
        dead = [(event_id, problem) for (_, event_id, *_), problem in zip(rows, problems, strict=True) if problem is not None]
        for event_id, problem in dead:
            log.error("relay.dead_letter", partition=box.path.stem, event_id=event_id, problem=problem)
        self.sent += len(rows) - len(dead)
        self.dead += len(dead)
        lost = dict(dead)
        self._resolve({event_id: lost.get(event_id) for _, event_id, *_ in rows})
        return len(rows)

    def _mark(self, box: Outbox, topic: str, rows: Sequence[outbox.Row], problems: Sequence[str | None]) -> bool:
        if not box.mark(topic, rows, problems):
            log.warning("relay.sends_again", partition=box.path.stem, topic=topic, reason="the topic is another one than before")
            return False
        return True

    def _compare_topic(self) -> None:
        topic = self._kafka.topic.key()
        for each in self._held.values():
            self._mark(each, topic, [], [])

    def _resolve_elsewhere(self) -> None:
        """Tell those who wait for events of partitions that another relay carries."""
        with self._lock:
            event_ids = list(self._waiting)
        if event_ids:
            self._resolve_marked([path for path in self._logs.partitions() if path not in self._held], event_ids)

    def _resolve_marked(self, paths: Iterable[Path], event_ids: Sequence[str]) -> None:
        for path in paths:
            found = outbox.outcomes(path, event_ids)
            dead = "Kafka does not take it, see `plaudit feedback dead-letters`"
            self._resolve({each: None if sent == outbox.SENT else dead for each, sent in found.items() if sent != outbox.WAITS})

    def _resolve(self, outcomes: dict[str, str | None]) -> None:
        with self._lock:
            for event_id, problem in outcomes.items():
                future = self._waiting.get(event_id)
                if future is None or future.done():
                    continue
                if problem is None:
                    future.set_result(None)
                else:
                    future.set_exception(NotDurable(f"stored here, never by the broker: {problem}", retry_after_s=RETRY_AFTER_S))
