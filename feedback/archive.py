"""The de-duplicated record of everything that was said and answered, and the current state of ratings beside it.

One SQLite file. Rows, the current state and the read positions change in one transaction, so each event counts exactly once however
often a log is read. Erasure is remembered as (subject, stamp): what that subject said or asked before it is deleted, also where it
arrives later from another partition.
"""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog
from pydantic import ValidationError

from feedback.clock import COUNTER_BITS, wall_ms
from feedback.database import configure, immediate, report_damage, settle, told
from feedback.errors import ConfigError, Conflict, NotDurable
from feedback.events import (
    SCHEMA_VERSION,
    ConsentWithdrawn,
    Event,
    FeedbackCleared,
    FeedbackGiven,
    InteractionFinished,
    InteractionStarted,
    SubjectErased,
    decode,
    encode,
    partition_key,
)
from feedback.log import EventReader, Position, Record

log = structlog.get_logger(__name__)

SCHEMA = """
CREATE TABLE IF NOT EXISTS events (
    event_id TEXT PRIMARY KEY,
    type TEXT NOT NULL,
    stamp INTEGER NOT NULL,
    about TEXT NOT NULL,
    subject TEXT,
    value BLOB NOT NULL
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS events_about ON events (about);
CREATE INDEX IF NOT EXISTS events_subject ON events (subject);
CREATE INDEX IF NOT EXISTS events_type ON events (type, stamp);
CREATE TABLE IF NOT EXISTS interactions (
    interaction_id TEXT PRIMARY KEY,
    comparison_id TEXT,
    side TEXT,
    started_ms INTEGER NOT NULL
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS interactions_comparison ON interactions (comparison_id);
CREATE TABLE IF NOT EXISTS said (
    target TEXT NOT NULL,
    rater TEXT NOT NULL,
    slot TEXT NOT NULL,
    stamp INTEGER NOT NULL,
    event_id TEXT NOT NULL,
    cleared INTEGER NOT NULL,
    PRIMARY KEY (target, rater, slot)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS farewells (subject TEXT NOT NULL, kind TEXT NOT NULL, stamp INTEGER NOT NULL, PRIMARY KEY (subject, kind));
CREATE TABLE IF NOT EXISTS positions (partition TEXT PRIMARY KEY, next INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS owners (partition TEXT PRIMARY KEY, epoch INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS poison (partition TEXT NOT NULL, offset INTEGER NOT NULL, value BLOB NOT NULL, PRIMARY KEY (partition, offset));
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value INTEGER NOT NULL);
INSERT OR IGNORE INTO facts VALUES ('as_of', 0);
"""
BATCH = 1_000


@dataclass(frozen=True)
class Interaction:
    """One question and its answer as recorded; `finished` is None while it streams or where it broke off unseen."""

    started: InteractionStarted
    finished: InteractionFinished | None


class Archive:
    """Thread-safe; several processes may hold the same file open."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._lock = threading.RLock()
        try:
            self._db = sqlite3.connect(path, isolation_level=None, timeout=30.0, check_same_thread=False)
            configure(self._db)
            self._db.executescript(SCHEMA)
            settle(self._db)
            report_damage(self._db)
        except sqlite3.Error as exc:
            raise NotDurable(f"the archive {path} cannot be opened: {told(exc)}", retry_after_s=2) from exc
        self._meet_version()

    def _meet_version(self) -> None:
        """Read again what an older version of this code set aside. Raises ConfigError where a newer one has written here."""
        with self._transaction() as db:
            db.execute("INSERT OR IGNORE INTO facts VALUES ('schema_version', ?)", (SCHEMA_VERSION,))
            before = db.execute("SELECT value FROM facts WHERE name = 'schema_version'").fetchone()[0]
            if before > SCHEMA_VERSION:
                raise ConfigError(
                    f"the archive {self.path} holds events of version {before}, this code knows {SCHEMA_VERSION}; "
                    "install the newer version again, or restore a backup from before it",
                    field="feedback.data_dir",
                )
            if before < SCHEMA_VERSION:
                for partition, offset, value in db.execute("SELECT partition, offset, value FROM poison").fetchall():
                    with contextlib.suppress(ValidationError):
                        _keep(db, decode(value))
                        db.execute("DELETE FROM poison WHERE partition = ? AND offset = ?", (partition, offset))
                db.execute("UPDATE facts SET value = ? WHERE name = 'schema_version'", (SCHEMA_VERSION,))

    def close(self) -> None:
        with self._lock:
            self._db.close()

    def ingest(self, log: EventReader, owned: Mapping[str, int] | None = None) -> int:
        """Read the log to its end; how many events were new.

        Readers that meet on one archive do not double anything: a batch counts only if nobody has moved the positions since they
        were read. With `owned` (from `claim`) a reader that was replaced is refused with Conflict.
        """
        new = 0
        while True:
            position = self.positions()
            records = log.read(position, BATCH)
            if not records:
                return new
            try:
                new += self.store(records, position, owned)
            except Conflict:
                if owned is not None:
                    raise
                # Without `owned` it says that another reader stored this batch; go on from where it got to.

    def claim(self, partitions: Iterable[str]) -> dict[str, int]:
        """Become the reader of these partitions; whoever read one before is refused from now on. The epoch of each."""
        with self._transaction() as db:
            claimed = {}
            for partition in partitions:
                db.execute("INSERT INTO owners VALUES (?, 1) ON CONFLICT (partition) DO UPDATE SET epoch = epoch + 1", (partition,))
                claimed[partition] = int(db.execute("SELECT epoch FROM owners WHERE partition = ?", (partition,)).fetchone()[0])
            return claimed

    def positions(self) -> Position:
        return dict(self._rows("SELECT partition, next FROM positions"))

    def as_of(self) -> int:
        """The stamp of the newest event in the archive."""
        return int(self._rows("SELECT value FROM facts WHERE name = 'as_of'")[0][0])

    def store(self, records: Sequence[Record], position: Position, owned: Mapping[str, int] | None = None) -> int:
        """Add a batch that was read from `position` on, rows and positions in one transaction; how many events were new.

        Raises Conflict, and stores nothing, where another reader claimed one of its partitions (with `owned`) or moved its position.
        """
        following = {record.partition: record.offset + 1 for record in records}
        poison = [record for record in records if record.event is None]
        with self._transaction() as db:
            for partition in following:
                owner = db.execute("SELECT epoch FROM owners WHERE partition = ?", (partition,)).fetchone()
                if owned is not None and (owner is None or owner[0] != owned.get(partition)):
                    raise Conflict(f"another reader has taken over partition {partition} of this archive")
                row = db.execute("SELECT next FROM positions WHERE partition = ?", (partition,)).fetchone()
                if (row[0] if row else None) != position.get(partition):
                    raise Conflict(f"another reader has moved the position of partition {partition} in this archive")
            rows = [(record.partition, record.offset, record.value) for record in poison]
            db.executemany("INSERT OR IGNORE INTO poison VALUES (?, ?, ?)", rows)
            new = sum(_keep(db, record.event) for record in records if record.event is not None)
            db.executemany("INSERT OR REPLACE INTO positions VALUES (?, ?)", following.items())
            newest = max((record.event.stamp for record in records if record.event), default=0)
            db.execute("UPDATE facts SET value = max(value, ?) WHERE name = 'as_of'", (newest,))
        if poison:
            first = poison[0]
            log.error(
                "archive.poison",
                messages=len(poison),
                partition=first.partition,
                offset=first.offset,
                next="`plaudit feedback stats` counts them",
            )
        return new

    def keep(self, events: Iterable[Event]) -> int:
        """Add events that have their stamps already, beside what is read from logs; how many were new."""
        with self._transaction() as db:
            return sum(_keep(db, event) for event in events)

    def state(self, target: str) -> dict[tuple[str, str], FeedbackGiven]:
        """What is held about the target now: (rater, slot) -> event."""
        return {(event.rater, event.slot): event for event in self.said_about(target) if isinstance(event, FeedbackGiven)}

    def said_about(self, target: str) -> list[FeedbackGiven | FeedbackCleared]:
        """The last word in each (rater, slot), clearings too."""
        rows = self._rows("SELECT e.value FROM said s JOIN events e USING (event_id) WHERE s.target = ?", target)
        events = [decode(row[0]) for row in rows]
        return [event for event in events if isinstance(event, FeedbackGiven | FeedbackCleared)]

    def interaction(self, interaction_id: str) -> Interaction | None:
        """None where it is not known, was erased or has expired."""
        started: InteractionStarted | None = None
        finished: InteractionFinished | None = None
        for (value,) in self._rows("SELECT value FROM events WHERE about = ? AND type LIKE 'interaction.%'", interaction_id):
            event = decode(value)
            if isinstance(event, InteractionStarted):
                started = event
            elif isinstance(event, InteractionFinished):
                finished = event
        return Interaction(started, finished) if started else None

    def has(self, event_id: str) -> bool:
        """Whether this event is here."""
        return bool(self._rows("SELECT 1 FROM events WHERE event_id = ?", event_id))

    def comparison(self, comparison_id: str) -> dict[str, Interaction]:
        """Its interactions by side."""
        rows = self._rows("SELECT side, interaction_id FROM interactions WHERE comparison_id = ?", comparison_id)
        found = {side: self.interaction(interaction_id) for side, interaction_id in rows}
        return {side: interaction for side, interaction in found.items() if interaction is not None}

    def current(self) -> list[FeedbackGiven]:
        """Everything that is held now, by event_id."""
        rows = self._rows("SELECT e.value FROM said s JOIN events e USING (event_id) WHERE s.cleared = 0 ORDER BY event_id")
        events = [decode(row[0]) for row in rows]
        return [event for event in events if isinstance(event, FeedbackGiven)]

    def events(self, kind: str, after: int = 0, limit: int = BATCH) -> list[Event]:
        """Events of a type, e.g. `interaction.started`, with a stamp above `after`, oldest first."""
        rows = self._rows("SELECT value FROM events WHERE type = ? AND stamp > ? ORDER BY stamp, event_id LIMIT ?", kind, after, limit)
        return [decode(row[0]) for row in rows]

    def withdrawn(self) -> set[str]:
        """Subjects whose words may not train any more: they withdrew and were not erased after that."""
        withdrawn = "SELECT subject FROM farewells w WHERE kind = 'withdrawn' AND NOT EXISTS "
        return {
            row[0]
            for row in self._rows(withdrawn + "(SELECT 1 FROM farewells WHERE subject = w.subject AND kind = 'erased' AND stamp > w.stamp)")
        }

    def erasures(self) -> dict[str, int]:
        """The stamp of every subject's last erasure."""
        return dict(self._rows("SELECT subject, stamp FROM farewells WHERE kind = 'erased'"))

    def heard(self, subject: str, after: int = 0) -> bool:
        """Whether there is anything of this subject with a later stamp."""
        heard = "SELECT 1 FROM events WHERE subject = ? AND stamp > ? AND type != 'subject.erased' LIMIT 1"
        return bool(self._rows(heard, subject, after))

    def tenant(self, subject: str) -> str | None:
        """Whose person the subject is; None where nothing of theirs is here."""
        rows = self._rows("SELECT value FROM events WHERE subject = ? LIMIT 1", subject)
        return decode(rows[0][0]).tenant if rows else None

    def erased(self, subject: str) -> int:
        """The stamp of the subject's last erasure, 0 for none."""
        return max((row[0] for row in self._rows("SELECT stamp FROM farewells WHERE kind = 'erased' AND subject = ?", subject)), default=0)

    def counts(self) -> dict[str, int]:
        """How many events of each type, and under `held:<slot>` how many opinions are held now."""
        counted = dict(self._rows("SELECT type, count(*) FROM events GROUP BY type"))
        counted |= dict(self._rows("SELECT 'held:' || slot, count(*) FROM said WHERE cleared = 0 GROUP BY slot"))
        counted["poison"] = self._rows("SELECT count(*) FROM poison")[0][0]
        return counted

    def expire(self, now_ms: int | None = None, days: int = 30) -> int:
        """Delete interactions older than `days` that nobody holds an opinion about, by themselves or as a side. How many."""
        before = (wall_ms() if now_ms is None else now_ms) - days * 24 * 3600 * 1000
        unrated = (
            "SELECT interaction_id, comparison_id FROM interactions i WHERE started_ms < ? AND NOT EXISTS "
            "(SELECT 1 FROM said WHERE cleared = 0 AND target IN (i.interaction_id, i.comparison_id))"
        )
        with self._transaction() as db:
            found = db.execute(unrated, (before,)).fetchall()
            ids = [(interaction,) for interaction, _ in found]
            db.executemany("DELETE FROM events WHERE about = ?", ids)
            db.executemany("DELETE FROM said WHERE target = ?", ids)
            db.executemany("DELETE FROM interactions WHERE interaction_id = ?", ids)
            # What was said about a comparison and taken back goes with its last side.
            gone = [(each,) for each in {comparison for _, comparison in found if comparison}]
            alone = "NOT EXISTS (SELECT 1 FROM interactions WHERE comparison_id = ?1)"
            db.executemany(f"DELETE FROM events WHERE about = ?1 AND {alone}", gone)
            db.executemany(f"DELETE FROM said WHERE target = ?1 AND {alone}", gone)
        if ids:
            self._rows("PRAGMA wal_checkpoint(TRUNCATE)")  # what was deleted would lie there until other rows overwrite it
        return len(ids)

    def _rows(self, query: str, *arguments: object) -> list[Any]:
        with self._lock:
            try:
                return self._db.execute(query, arguments).fetchall()
            except sqlite3.Error as exc:
                raise NotDurable(f"the archive {self.path} cannot be read: {told(exc)}", retry_after_s=2) from exc

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            try:
                with immediate(self._db) as db:
                    yield db
            except sqlite3.Error as exc:
                raise NotDurable(f"the archive {self.path} could not be written: {told(exc)}", retry_after_s=2) from exc


def _keep(db: sqlite3.Connection, event: Event) -> int:
    """Add one event; 1 if it is new and was not erased before it came."""
    subject = getattr(event, "subject", None) or getattr(event, "rater", None)
    if subject is not None and not isinstance(event, SubjectErased):
        erased = db.execute("SELECT stamp FROM farewells WHERE subject = ? AND kind = 'erased'", (subject,)).fetchone()
        if erased is not None and event.stamp <= erased[0]:
            return 0
    added = db.execute(
        "INSERT OR IGNORE INTO events VALUES (?, ?, ?, ?, ?, ?)",
        (event.event_id, event.type, event.stamp, partition_key(event), subject, encode(event)),
    ).rowcount
    if not added:
        _keep_earlier(db, event)
        return 0
    if isinstance(event, InteractionStarted):
        row = (event.interaction_id, event.comparison_id, event.side, event.stamp >> COUNTER_BITS)
        db.execute("INSERT OR IGNORE INTO interactions VALUES (?, ?, ?, ?)", row)
    elif isinstance(event, FeedbackGiven | FeedbackCleared):
        _say(db, event)
    elif isinstance(event, ConsentWithdrawn | SubjectErased):
        kind = "erased" if isinstance(event, SubjectErased) else "withdrawn"
        db.execute(
            "INSERT INTO farewells VALUES (?, ?, ?) ON CONFLICT (subject, kind) DO UPDATE SET stamp = max(stamp, excluded.stamp)",
            (event.subject, kind, event.stamp),
        )
        if isinstance(event, SubjectErased):
            _erase(db, event.subject, event.stamp)
    return 1


def _keep_earlier(db: sqlite3.Connection, event: Event) -> None:
    """An event that is there already. Two gateways that got the same request gave it two stamps: the lesser one counts (see `fold`),
    whichever arrives first."""
    row = (event.stamp, encode(event), event.event_id, event.stamp)
    changed = db.execute("UPDATE events SET stamp = ?, value = ? WHERE event_id = ? AND stamp > ?", row).rowcount
    if not changed or not isinstance(event, FeedbackGiven | FeedbackCleared):
        return
    db.execute("DELETE FROM said WHERE target = ? AND rater = ? AND slot = ?", (event.target, event.rater, event.slot))
    for (value,) in db.execute("SELECT value FROM events WHERE about = ? AND subject = ?", (event.target, event.rater)).fetchall():
        said = decode(value)
        if isinstance(said, FeedbackGiven | FeedbackCleared) and said.slot == event.slot:
            _say(db, said)


def _say(db: sqlite3.Connection, event: FeedbackGiven | FeedbackCleared) -> None:
    """The last word in its cell, if it is that."""
    db.execute(
        "INSERT INTO said VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (target, rater, slot) DO UPDATE SET "
        "stamp = excluded.stamp, event_id = excluded.event_id, cleared = excluded.cleared "
        "WHERE (excluded.stamp, excluded.event_id) > (said.stamp, said.event_id)",
        (event.target, event.rater, event.slot, event.stamp, event.event_id, isinstance(event, FeedbackCleared)),
    )


def _erase(db: sqlite3.Connection, subject: str, stamp: int) -> None:
    """Delete what the subject asked, read and said up to `stamp`, and what others said about it."""
    gone = (subject, stamp)
    asked = "SELECT about FROM events WHERE subject = ? AND stamp <= ? AND type = 'interaction.started'"
    ids = db.execute(asked, gone).fetchall()
    db.executemany("DELETE FROM said WHERE target = ?", ids)
    db.execute("DELETE FROM said WHERE rater = ? AND stamp <= ?", gone)
    db.executemany("DELETE FROM interactions WHERE interaction_id = ?", ids)
    db.executemany("DELETE FROM events WHERE about = ?", ids)
    db.execute("DELETE FROM events WHERE subject = ? AND stamp <= ? AND type != 'subject.erased'", gone)
