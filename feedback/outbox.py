"""A SQLite partition as an outbox: what Kafka has, what it will never take, and who carries it.

One relay carries a partition at a time: it holds a lock beside the file, which the kernel frees when the process dies. Others wait for it.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from feedback.clock import wall_ms
from feedback.database import immediate
from feedback.errors import NotDurable, NotFound
from feedback.sqlite_log import open_file, open_to_read

WAITS, SENT, DEAD = 0, 1, 2
"""Values of `sent`."""

Row = tuple[int, str, str, bytes]
"""Offset, event id, key, value."""


@dataclass(frozen=True)
class DeadLetter:
    """A row that Kafka will not take. It stays in its partition and can be sent again."""

    partition: str
    offset: int
    event_id: str
    reason: str
    at_ms: int


class Outbox:
    """A partition whose lock this relay holds."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self._descriptor = descriptor
        self._db = open_file(path)
        self._db.execute("CREATE TABLE IF NOT EXISTS relayed (one INTEGER PRIMARY KEY CHECK (one = 1), topic TEXT NOT NULL)")

    @classmethod
    def take(cls, path: Path) -> Outbox | None:
        """None where another relay carries this partition."""
        descriptor = os.open(path.with_suffix(".relay"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return cls(path, descriptor)
        except BlockingIOError:
            os.close(descriptor)
            return None
        except BaseException:
            os.close(descriptor)
            raise

    def close(self) -> None:
        self._db.close()
        os.close(self._descriptor)

    def waiting(self, limit: int) -> list[Row]:
        """The oldest rows that were not sent."""
        query = "SELECT offset, event_id, partition_key, value FROM events WHERE sent = 0 ORDER BY offset LIMIT ?"
        return self._db.execute(query, (limit,)).fetchall()

    def mark(self, topic: str, rows: Sequence[Row], problems: Sequence[str | None]) -> bool:
        """Note what became of the rows in this topic.

        False where the partition was sent to another topic before, as after that one was deleted: then nothing that it got counts as sent
        any more, these rows included, and everything that still lies here is sent again.
        """
        with immediate(self._db) as db:
            known = db.execute("SELECT topic FROM relayed").fetchone()
            if known is None or known[0] != topic:
                db.execute("INSERT OR REPLACE INTO relayed VALUES (1, ?)", (topic,))
            if known is not None and known[0] != topic:
                db.execute("UPDATE events SET sent = 0 WHERE sent = 1")
                return False
            for (offset, *_), problem in zip(rows, problems, strict=True):
                db.execute("UPDATE events SET sent = ? WHERE offset = ?", (SENT if problem is None else DEAD, offset))
                if problem is not None:
                    db.execute("INSERT OR REPLACE INTO dead_letters VALUES (?, ?, ?)", (offset, problem, wall_ms()))
        return True


def outcomes(path: Path, event_ids: Iterable[str]) -> dict[str, int]:
    """`sent` of those of the events that lie in this partition."""
    found: dict[str, int] = {}
    with _reading(path) as db:
        for event_id in event_ids:
            row = db.execute("SELECT sent FROM events WHERE event_id = ?", (event_id,)).fetchone()
            if row is not None:
                found[event_id] = row[0]
    return found


def count(paths: Iterable[Path], sent: int) -> int:
    """How many rows of these partitions wait, or are dead letters."""
    total = 0
    for path in paths:
        with _reading(path) as db:
            # Of the rows that wait there is an index; dead letters are few and have a table.
            query = "SELECT count(*) FROM events WHERE sent = 0" if sent == WAITS else "SELECT count(*) FROM dead_letters"
            total += db.execute(query).fetchone()[0]
    return total


def dead_letters(paths: Iterable[Path]) -> list[DeadLetter]:
    """What Kafka will not take, oldest first."""
    found = []
    for path in paths:
        with _reading(path) as db:
            query = "SELECT d.offset, coalesce(e.event_id, ''), d.reason, d.at_ms FROM dead_letters d LEFT JOIN events e USING (offset)"
            found += [DeadLetter(path.stem, *row) for row in db.execute(query)]
    return sorted(found, key=lambda letter: (letter.at_ms, letter.partition, letter.offset))


def send_again(path: Path, offset: int) -> None:
    """Let the relay try a dead letter once more, after its reason is gone. Raises NotFound where it is none."""
    db = open_file(path)
    try:
        with immediate(db):
            gone = db.execute("DELETE FROM dead_letters WHERE offset = ?", (offset,)).rowcount
            db.execute("UPDATE events SET sent = 0 WHERE offset = ? AND sent = 2", (offset,))
    finally:
        db.close()
    if not gone:
        raise NotFound(f"offset {offset} of partition '{path.stem}' is no dead letter; `plaudit feedback dead-letters` lists them")


@contextmanager
def _reading(path: Path) -> Iterator[sqlite3.Connection]:
    """Closed at once: a long-lived reader would keep the WAL from being reset. Raises NotDurable.

    A partition that another process is just creating has no tables yet: then the block ends where it asks for them."""
    try:
        with closing(open_to_read(path)) as db:
            yield db
    except sqlite3.Error as exc:
        if "no such table" in str(exc):
            return
        raise NotDurable(f"the event log {path.name} cannot be read: {exc}", retry_after_s=2) from exc
