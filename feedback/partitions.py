"""All partitions in a folder, each one written by its own process (`sqlite_log.py`): read together, and pruned."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from feedback.clock import stamp_ms
from feedback.errors import NotDurable
from feedback.events import Event
from feedback.files import sync
from feedback.log import Position, Record
from feedback.sqlite_log import RETRY_AFTER_S, open_file, open_to_read, parse, query, read_file, select

PRUNED_AT_ONCE = 500
MAX_IDLE = 8
"""Connections to one partition that are kept for the next question."""


class SqliteLogs:
    """All partitions in a folder, for those who read what other processes write."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._idle: dict[tuple[Path, int], list[sqlite3.Connection]] = {}

    def close(self) -> None:
        """Release files."""
        while self._idle:
            for db in self._idle.popitem()[1]:
                db.close()

    def partitions(self) -> list[Path]:
        return sorted(self.folder.glob("*.sqlite"))

    def read(self, position: Position, limit: int) -> list[Record]:
        """See `EventLog.read`; each partition gets an equal share of the limit, so that a busy one does not starve the others."""
        paths = self.partitions()
        records: list[Record] = []
        share = max(1, limit // max(1, len(paths)))
        for path in paths:
            records += read_file(path, position.get(path.stem, 0), min(share, limit - len(records)))
        return records

    def sync(self) -> None:
        """fsync what can be read here, as what a killed process wrote last may not be. Raises NotDurable."""
        for path in self.partitions():
            try:
                with contextlib.suppress(FileNotFoundError):  # then all of it is in the database, fsynced
                    sync(Path(f"{path}-wal"))
            except OSError as exc:
                raise NotDurable(f"the event log {path} could not be written: {exc.strerror}", retry_after_s=RETRY_AFTER_S) from exc

    def about(self, key: str) -> list[Event]:
        """Every event with this partition key (an interaction, a comparison, a subject), in no particular order."""
        found: list[Event] = []
        for path in self.partitions():
            with self._reader(path) as db:
                records = query(db, path, "partition_key = ? ORDER BY offset", (key,))
            found += [record.event for record in records if record.event is not None]
        return found

    @contextlib.contextmanager
    def _reader(self, path: Path) -> Iterator[sqlite3.Connection]:
        """A connection that is kept for the next question, because opening one takes longer than asking. Between two questions it holds
        nothing back. Those to a file that was replaced meanwhile are not used again."""
        try:
            idle = self._idle.setdefault((path, path.stat().st_ino), [])
        except OSError as exc:
            raise NotDurable(f"the event log {path} cannot be read: {exc.strerror}", retry_after_s=RETRY_AFTER_S) from exc
        try:
            db = idle.pop()
        except IndexError:
            db = open_to_read(path)
        try:
            yield db
        except BaseException:
            db.close()
            raise
        if len(idle) < MAX_IDLE:
            idle.append(db)
        else:
            db.close()

    def last_stamp(self) -> int:
        """The greatest stamp that is stored, 0 for none."""
        last = [select(path, "1 ORDER BY offset DESC LIMIT 1", ()) for path in self.partitions()]
        return max((record.event.stamp for records in last for record in records if record.event), default=0)


def prune(path: Path, archived: int, before_ms: int, only_sent: bool) -> int:
    """Delete rows below offset `archived` that are older than `before_ms`, with `only_sent` none that Kafka does not have. How many.

    May be called beside the process that writes the partition. Nothing of the rows is left in the file (`secure_delete`) and, unless
    somebody reads it at this moment, in its write-ahead log."""
    deleted = 0
    try:
        with contextlib.closing(open_file(path)) as db:
            cut = 0
            for offset, value in db.execute("SELECT offset, value FROM events WHERE offset < ? ORDER BY offset", (archived,)):
                event = parse(value)
                if event is not None and stamp_ms(event.stamp) >= before_ms:
                    break
                cut = offset
            old = "SELECT offset FROM events WHERE offset <= ? AND (sent = 1 OR ?) ORDER BY offset LIMIT ?"
            # In small transactions, so that the writer never waits long for its lock.
            while some := db.execute(f"DELETE FROM events WHERE offset IN ({old})", (cut, not only_sent, PRUNED_AT_ONCE)).rowcount:
                deleted += some
            if deleted:
                db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    except sqlite3.Error as exc:
        raise NotDurable(f"the event log {path} could not be pruned: {exc}", retry_after_s=RETRY_AFTER_S) from exc
    return deleted
