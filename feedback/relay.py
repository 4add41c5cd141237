"""Carries what lies in SQLite partitions to Kafka and marks what arrived. A thread of the gateway, or a process of its own.

A row is marked after Kafka has acknowledged it, so a crash between the two sends it twice and never loses it; readers de-duplicate by
`event_id`. A row that Kafka will never take goes to `dead_letters`, so that it does not stop the ones behind it.
"""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path

import structlog

from feedback.clock import HybridClock, wall_ms
from feedback.config import KafkaSettings
from feedback.errors import NotDurable
from feedback.events import Event
from feedback.kafka_log import RETRY_AFTER_S, KafkaLog
from feedback.sqlite_log import open_file

log = structlog.get_logger(__name__)

IDLE_S = 0.05
AWAY_S = 1.0


class Relay:
    """Owns its thread and its connections. Rows leave in the order in which they were committed, one batch at a time."""

    def __init__(self, partitions: Sequence[Path], settings: KafkaSettings) -> None:
        self._partitions = list(partitions)
        self._batch = settings.batch_events
        self._kafka = KafkaLog(settings, HybridClock())
        self._waiting: dict[str, Future[None]] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self.problem: str | None = None
        """Why Kafka cannot be reached at the moment."""
        self.sent = 0
        self.dead = 0
        self._thread = threading.Thread(target=self._run, name="relay", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread; what was not sent stays marked so."""
        self._stop.set()
        self._thread.join()
        self._kafka.close()

    async def delivered(self, events: Sequence[Event], timeout_s: float) -> None:
        """Return when Kafka has all of them. Raises NotDurable after `timeout_s`."""
        futures: list[Future[None]] = []
        with self._lock:
            for event in events:
                futures.append(self._waiting.setdefault(event.event_id, Future()))
        # Registered first, looked up second: whatever was marked in between is found by the look-up.
        await asyncio.to_thread(self._resolve_sent, [event.event_id for event in events])
        try:
            async with asyncio.timeout(timeout_s):
                await asyncio.gather(*(asyncio.shield(asyncio.wrap_future(future)) for future in futures))
        except TimeoutError:
            reason = self.problem or f"Kafka did not confirm within {timeout_s:g} s"
            raise NotDurable(f"stored here, not yet by the broker: {reason}", retry_after_s=RETRY_AFTER_S) from None
        finally:
            with self._lock:
                for event in events:
                    self._waiting.pop(event.event_id, None)

    def pending(self) -> int:
        """How many rows wait to be sent."""
        total = 0
        for path in self._partitions:
            db = open_file(path)
            total += db.execute("SELECT count(*) FROM events WHERE sent = 0").fetchone()[0]
            db.close()
        return total

    def _run(self) -> None:
        files: dict[Path, sqlite3.Connection] = {}
        while not self._stop.is_set():
            try:
                moved = 0
                for path in self._partitions:
                    if path not in files:
                        files[path] = open_file(path)
                    moved += self._drain(files[path])
                self.problem = None
                self._stop.wait(0 if moved else IDLE_S)
            except NotDurable as exc:
                if self.problem is None:
                    log.warning("relay.kafka_away", problem=exc.message)
                self.problem = exc.message
                self._stop.wait(AWAY_S)
            except sqlite3.Error as exc:
                log.warning("relay.partition_unreadable", problem=str(exc))
                self.problem = str(exc)
                self._stop.wait(AWAY_S)
        for db in files.values():
            db.close()

    def _drain(self, db: sqlite3.Connection) -> int:
        """Send one batch of a partition; how many rows it had."""
        rows = db.execute(
            "SELECT offset, event_id, partition_key, value FROM events WHERE sent = 0 ORDER BY offset LIMIT ?", (self._batch,)
        ).fetchall()
        if not rows:
            return 0
        problems = self._kafka.send([(key, value) for _, _, key, value in rows])
        # Not fsynced: a mark that is lost only sends the row once more.
        db.execute("PRAGMA synchronous=NORMAL")
        db.execute("BEGIN IMMEDIATE")
        try:
            for (offset, event_id, _, _), problem in zip(rows, problems, strict=True):
                db.execute("UPDATE events SET sent = ? WHERE offset = ?", (1 if problem is None else 2, offset))
                if problem is not None:
                    db.execute("INSERT OR REPLACE INTO dead_letters VALUES (?, ?, ?)", (offset, problem, wall_ms()))
                    log.error("relay.dead_letter", event_id=event_id, problem=problem)
            db.execute("COMMIT")
        except sqlite3.Error:
            db.execute("ROLLBACK")
            raise
        taken = [event_id for (_, event_id, _, _), problem in zip(rows, problems, strict=True) if problem is None]
        self.sent += len(taken)
        self.dead += len(rows) - len(taken)
        self._resolve(taken)
        return len(rows)

    def _resolve_sent(self, event_ids: Sequence[str]) -> None:
        found: list[str] = []
        for path in self._partitions:
            db = open_file(path)
            for event_id in event_ids:
                if db.execute("SELECT 1 FROM events WHERE event_id = ? AND sent = 1", (event_id,)).fetchone():
                    found.append(event_id)
            db.close()
        self._resolve(found)

    def _resolve(self, event_ids: Sequence[str]) -> None:
        with self._lock:
            futures = [self._waiting[event_id] for event_id in event_ids if event_id in self._waiting]
        for future in futures:
            if not future.done():
                future.set_result(None)
