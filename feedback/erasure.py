"""Erasing a person, and withdrawing their consent. Two verbs: what was said goes, or it stays and trains nothing from now on.

    subject.erased durable ─▶ keys destroyed, audited ─▶ archive ─▶ partitions ─▶ snapshots ─▶ what `then` does ─▶ marked as finished

Every step may be repeated, so a killed erasure is finished by the next call, or by `finish` of any process on the data folder. After the
keys are destroyed no copy of what the person wrote or read can be opened (log, Kafka, backups); the steps behind it take away the rows
and the few places where texts lie open. `then` is what later rooms add: which adapters learned from it (`deploy/lineage.py`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from sqlalchemy import Column, Engine, Integer, MetaData, String, Table, insert, select
from sqlalchemy.exc import IntegrityError

from feedback import audit, snapshot
from feedback.clock import stamp_ms, wall_ms
from feedback.config import FeedbackSettings
from feedback.database import create_tables, immediate, transaction, truncate_wal
from feedback.errors import NotDurable, NotFound
from feedback.events import ConsentWithdrawn, FeedbackCleared, FeedbackGiven, InteractionStarted, SubjectErased, new_id
from feedback.files import locked_folder
from feedback.sqlite_log import open_file, parse
from feedback.stores import Stores

metadata = MetaData()
erased_from = Table(
    "erased_from",
    metadata,
    Column("subject", String(64), primary_key=True),
    Column("snapshot", String(64), primary_key=True),
    Column("rows", Integer, nullable=False),
)
"""Which snapshots an erased person's opinions were in; written before they are taken out, because the snapshot itself cannot tell after."""

PSEUDONYM = re.compile(r"s_[0-9a-f]{32}")
NAMED = re.compile(rb'"(?:subject|rater)":"([^"]*)"')
SYSTEM = "system"
FOREIGN_MS = 30_000
"""How long another machine's erasure is left to that machine to destroy the keys, so that its audit row names who asked for it."""
REST = ".rest"
"""Marks an erasure of which only the snapshots are left."""
BATCH = 500
"""Rows deleted in one transaction, so that the partition's own process never waits long for its lock."""


@dataclass(frozen=True)
class Erasure:
    """What an erasure did in this data folder. A repeated one finds less to do."""

    subject: str
    stamp: int
    """Everything of the subject up to here is gone."""
    keys: int
    rows: int
    """Of the log's partitions."""
    snapshots: int
    """How many were redacted."""
    complete: bool
    """False where snapshots lie here that this process cannot read, because pyarrow (extra `train`) is missing; the trainer finishes it."""


class Asker(NamedTuple):
    """Whose data it is about, and who asks."""

    subject: str
    by: str


Then = Callable[[str], object]
"""Called with the subject after the snapshots were redacted; the erasure counts as finished once it returns."""


def named(stores: Stores, who: str) -> str:
    """The pseudonym of a person, who is given by it or by their external id. Raises NotFound where nothing of theirs was ever here."""
    subject = who if PSEUDONYM.fullmatch(who) else stores.subjects.pseudonym(stores.settings.feedback.tenant, who)
    if not (stores.subjects.known(subject) or stores.archive.heard(subject) or stores.archive.erased(subject)):
        raise NotFound(f"subject: nothing of '{who[:80]}' was ever recorded here; give the id that the application uses", field="subject")
    here, theirs = stores.settings.feedback.tenant, stores.archive.tenant(subject)
    if theirs not in (None, here):
        raise NotFound(f"subject: '{who}' is of tenant '{theirs}', and this is '{here}' (feedback.tenant)", field="subject")
    return subject


def erase(stores: Stores, subject: str, actor: str, reason: str, then: Then | None = None) -> Erasure:
    """Erase everything of the subject up to now, or finish what was begun. Raises NotDurable where it has to be repeated."""
    with _alone(stores.settings.feedback.data_dir):
        stores.archive.ingest(stores.logs)
        stamp = stores.archive.erased(subject)
        if not stamp or stores.subjects.alive(subject) or stores.archive.heard(subject, stamp):
            # What they said by a gateway whose clock is ahead of this one's has to lie before the erasure too.
            stores.clock.observe(stores.archive.as_of())
            event = SubjectErased(event_id=new_id(), tenant=stores.settings.feedback.tenant, subject=subject)
            stamp = stores.log.append_sync([event])[0].stamp
        return _complete(stores, subject, stamp, actor, reason, then)


def finish(stores: Stores, then: Then | None = None, asked: Asker | None = None) -> list[Erasure]:
    """Complete what a killed process began here, and what arrived from other machines or with a backup.

    `asked` is an erasure that is asked for again: that one is left to nobody else."""
    data_dir, finished = stores.settings.feedback.data_dir, []
    if asked is not None:
        stores.archive.ingest(stores.logs)
    for subject, stamp in stores.archive.erasures().items():
        if max(_marked(data_dir, subject), 0 if snapshot.readable() else _marked(data_dir, subject, REST)) >= stamp:
            continue
        again = asked if asked is not None and asked.subject == subject else None
        if again is None and stores.subjects.erased(subject) < stamp and wall_ms() - stamp_ms(stamp) < FOREIGN_MS:
            continue
        actor = again.by if again is not None else SYSTEM
        with _alone(data_dir):
            if _marked(data_dir, subject) < stamp:
                finished.append(_complete(stores, subject, stamp, actor, "an erasure that was begun elsewhere or broke off", then))
    return finished


def replay(stores: Stores, erasures: Mapping[str, int], then: Then | None = None) -> list[Erasure]:
    """After a backup was restored: erase again who was erased since it was taken, by subject and stamp (`Archive.erasures`).

    The stamps are those of the erasures, so what people said after they returned stays."""
    with _alone(stores.settings.feedback.data_dir):
        stores.archive.ingest(stores.logs)
        tenant, content = stores.settings.feedback.tenant, stores.subjects.ids.content
        for subject, stamp in erasures.items():
            event_id = content("erased again", subject, str(stamp))
            stores.archive.keep([SubjectErased(event_id=event_id, tenant=tenant, subject=subject, stamp=stamp)])
        reason = "a backup from before the erasure was restored"
        return [_complete(stores, subject, stamp, SYSTEM, reason, then) for subject, stamp in erasures.items()]


def withdraw(stores: Stores, subject: str, actor: str, reason: str) -> None:
    """Nothing of the subject goes into snapshots from now on, said before or after. Doing it again changes nothing."""
    with _alone(stores.settings.feedback.data_dir):
        stores.archive.ingest(stores.logs)
        audit.open_audit(stores.engine)
        told = audit.rows.c.action == "consent.withdrawn", audit.rows.c.subject == subject
        with transaction(stores.engine) as db:
            known = subject in stores.archive.withdrawn()
            if known and db.execute(select(audit.rows.c.id).where(*told)).first():
                return
            audit.record(db, actor, "consent.withdrawn", subject, reason)
            if not known:  # inside, so that only a kill between the two commits leaves one without the other; the next call mends it
                stores.log.append_sync([ConsentWithdrawn(event_id=new_id(), tenant=stores.settings.feedback.tenant, subject=subject)])
        stores.archive.ingest(stores.logs)


def erased_file(settings: FeedbackSettings) -> Path:
    """The list of erasures, one JSON object a line: which backups of before them must not bring back."""
    return settings.erased_file or settings.data_dir / "erased.jsonl"


def listed(path: Path) -> dict[str, int]:
    """What such a list says, by subject and stamp. A line that is torn or none of ours counts as not there. Raises NotFound."""
    found: dict[str, int] = {}
    try:
        lines = path.read_text("utf-8", "replace").splitlines()
    except OSError as exc:
        raise NotFound(f"the list of erasures {path} cannot be read: {exc.strerror}", field="erased") from exc
    for line in lines:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            entry = json.loads(line)
            found[str(entry["subject"])] = max(found.get(str(entry["subject"]), 0), int(entry["stamp"]))
    return found


def _list(path: Path, subject: str, stamp: int) -> None:
    """Add one line, fsynced. An erasure that is repeated may stand there twice."""
    try:
        with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600), "a+b") as file:
            file.seek(max(0, file.tell() - 1))
            torn = file.read(1) not in (b"", b"\n")  # a kill may have left half a line
            file.write(b"\n" * torn + json.dumps({"subject": subject, "stamp": stamp}).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as exc:
        raise NotDurable(f"the list of erasures {path} could not be written: {exc.strerror}; erase again", retry_after_s=2) from exc


def snapshots_of(engine: Engine, subject: str) -> dict[str, int]:
    """The snapshots that an erased person's opinions were in, and how many."""
    create_tables(engine, metadata)
    with transaction(engine) as db:
        found = db.execute(select(erased_from.c.snapshot, erased_from.c.rows).where(erased_from.c.subject == subject))
        return {row.snapshot: row.rows for row in found}


def _complete(stores: Stores, subject: str, stamp: int, actor: str, reason: str, then: Then | None) -> Erasure:
    data_dir = stores.settings.feedback.data_dir
    keys = stores.subjects.erase(subject, stamp, by=actor, reason=reason)
    _list(erased_file(stores.settings.feedback), subject, stamp)
    stores.subjects.scrub()  # also where a killed call has destroyed them and not come this far
    stores.archive.ingest(stores.logs)
    _scrub_file(stores.archive.path)
    rows = _clean_partitions(stores.logs.partitions(), subject, stamp)
    for copy in (*data_dir.glob("*.damaged"), *(data_dir / "log").glob("*.damaged")):
        copy.unlink(missing_ok=True)  # of a torn log's end (`database.report_damage`); it may hold their key or their rows
    _forget_limits(data_dir / "limits.sqlite", subject)
    redacted, complete = _clean_snapshots(stores.engine, data_dir / "snapshots", {subject: stamp})
    if then is not None:
        then(subject)
    _mark(data_dir, subject, stamp, "" if complete else REST)
    return Erasure(subject, stamp, keys, rows, redacted, complete)


def _clean_partitions(paths: list[Path], subject: str, stamp: int) -> int:
    """Delete what the subject asked, read and said up to the stamp, and what others said about it; how many rows.

    Rows that wait for Kafka go too: every reader would drop them. The erasure itself stays, as does everything of other people."""
    about: set[str] = set()
    offsets: dict[Path, list[int]] = {}
    for path in paths:
        offsets[path] = []
        for offset, value in _rows_naming(path, subject):
            event = parse(value)
            if event is None or isinstance(event, SubjectErased) or event.stamp > stamp:
                continue
            if isinstance(event, FeedbackGiven | FeedbackCleared) and event.rater != subject:
                continue
            offsets[path].append(offset)
            if isinstance(event, InteractionStarted):
                about |= {event.interaction_id, event.comparison_id or event.interaction_id}
    return sum(_delete(path, offsets[path], sorted(about)) for path in paths)


def _rows_naming(path: Path, subject: str) -> Iterator[tuple[int, bytes]]:
    """Rows whose subject or rater this is; the others are not even decoded, because a partition may hold a million."""
    wanted = subject.encode()
    try:
        with contextlib.closing(open_file(path)) as db:
            for offset, value in db.execute("SELECT offset, value FROM events ORDER BY offset"):
                if wanted in NAMED.findall(value):
                    yield offset, value
    except sqlite3.Error as exc:
        raise NotDurable(f"the event log {path} could not be read: {exc}; erase again", retry_after_s=2) from exc


def _delete(path: Path, offsets: list[int], about: list[str]) -> int:
    deleted = 0
    try:
        with contextlib.closing(open_file(path)) as db:
            for start in range(0, len(offsets), BATCH):
                some = [(offset,) for offset in offsets[start : start + BATCH]]
                with immediate(db):
                    deleted += db.executemany("DELETE FROM events WHERE offset = ?", some).rowcount
                    db.executemany("DELETE FROM dead_letters WHERE offset = ?", some)
            for start in range(0, len(about), BATCH):
                keys = [(key,) for key in about[start : start + BATCH]]
                with immediate(db):
                    deleted += db.executemany("DELETE FROM events WHERE partition_key = ?", keys).rowcount
            truncate_wal(db, f"the event log {path.name}")
    except sqlite3.Error as exc:
        raise NotDurable(f"the event log {path} could not be written: {exc}; erase again", retry_after_s=2) from exc
    return deleted


def _clean_snapshots(engine: Engine, folder: Path, erased: Mapping[str, int]) -> tuple[int, bool]:
    """Redact every snapshot that holds rows of the erased, once it is written down that it did. How many; whether that was all."""
    if not folder.exists():
        return 0, True
    if not snapshot.readable():
        return 0, not any(folder.iterdir())
    create_tables(engine, metadata)
    redacted = 0
    with snapshot.locked(folder):
        for path in snapshot.all_in(folder):
            held = snapshot.rows_of(path, erased)
            for subject, rows in held.items():
                _remember(engine, subject, path.name, rows)
            if held:
                snapshot.redact(path, erased)
                redacted += 1
    return redacted, True


def _remember(engine: Engine, subject: str, digest: str, rows: int) -> None:
    with contextlib.suppress(IntegrityError), engine.begin() as db:  # a killed call has written it down
        db.execute(insert(erased_from).values(subject=subject, snapshot=digest, rows=rows))


def _forget_limits(path: Path, subject: str) -> None:
    """Counters that name an answer of the subject's. Those of the person alone stay until they end, or erasing would lift every limit."""
    if path.exists():
        with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(path, isolation_level=None, timeout=5.0)) as db:
            db.execute("PRAGMA secure_delete=ON")
            db.execute("DELETE FROM used WHERE who LIKE ? || ' %' AND who NOT LIKE ? || ' themselves'", (subject, subject))
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def _scrub_file(path: Path) -> None:
    try:
        with contextlib.closing(sqlite3.connect(path, isolation_level=None, timeout=5.0)) as db:
            truncate_wal(db, str(path))
    except sqlite3.Error as exc:
        raise NotDurable(f"{path} cannot be opened: {exc}; erase again", retry_after_s=2) from exc


@contextlib.contextmanager
def _alone(data_dir: Path) -> Iterator[None]:
    """One erasure at a time on a data folder; the kernel frees the lock of a process that dies."""
    with locked_folder(data_dir / "erasures", next_step="; erase again"):
        yield


def _mark_of(data_dir: Path, subject: str, kind: str) -> Path:
    return data_dir / "erasures" / (hashlib.sha256(subject.encode()).hexdigest() + kind)


def _marked(data_dir: Path, subject: str, kind: str = "") -> int:
    """The stamp up to which this folder is known to hold nothing of the subject."""
    try:
        return int(_mark_of(data_dir, subject, kind).read_text())
    except (FileNotFoundError, ValueError):
        return 0


def _mark(data_dir: Path, subject: str, stamp: int, kind: str) -> None:
    # Not fsynced: a mark that is lost only makes the erasure be finished once more.
    temporary = _mark_of(data_dir, subject, ".tmp")
    try:
        temporary.write_text(str(stamp))
        temporary.replace(_mark_of(data_dir, subject, kind))
    except OSError as exc:
        raise NotDurable(f"{temporary.parent} could not be written: {exc.strerror}; erase again", retry_after_s=2) from exc
