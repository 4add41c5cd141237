"""Opening the database that holds the registry, the API keys and the subjects' keys; and the mode of every SQLite file that must last.

SQLite for one machine, PostgreSQL for several, by SQLAlchemy URL; what the two do differently is written here and nowhere else. Each room
creates its own tables with `create_tables` where `deploy/schema.py`, which brings older ones up to date, has not made them before.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import structlog
from sqlalchemy import Connection, Engine, MetaData, Table, Update, create_engine, event, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from feedback.errors import ConfigError, NotDurable
from feedback.files import sync

LOOKS = 5
COPY_BYTES = 1 << 20
LOCK_TIMEOUT_MS = 5000
"""How long a write waits for the one before it."""
STOPPED_MS = 1000
"""A process that says nothing for so long in the middle of a write was stopped or cut off; writes take milliseconds."""
UPGRADE_TIMEOUT_MS = 60_000
UPGRADE_LOCK = 0x506C6175646974
"""Any number that nothing else in the database locks: "Plaudit" in ASCII."""

log = structlog.get_logger()


def open_database(url: str) -> Engine:
    """An engine whose SQLite connections fsync every commit and overwrite what is deleted. Raises ConfigError."""
    try:
        parsed = make_url(url)
        if parsed.get_backend_name() == "sqlite" and parsed.database and parsed.database != ":memory:":
            Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
        engine = create_engine(parsed, pool_pre_ping=parsed.get_backend_name() != "sqlite")
    except (ArgumentError, ImportError, OSError) as exc:
        raise ConfigError(f"registry.url cannot be used: {exc}", field="registry.url") from exc
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", _configure_sqlite)
        event.listen(engine, "first_connect", _settle_sqlite)
    return engine


def _configure_sqlite(connection: sqlite3.Connection, _record: Any) -> None:
    connection.execute("PRAGMA busy_timeout=5000")
    configure(connection)
    connection.execute("PRAGMA foreign_keys=ON")


def _settle_sqlite(connection: sqlite3.Connection, _record: Any) -> None:
    settle(connection)
    report_damage(connection)


def configure(db: sqlite3.Connection) -> None:
    """The mode of every SQLite file that holds what must not be lost. Raises sqlite3.Error."""
    mode = db.execute("PRAGMA journal_mode=WAL").fetchone()[0]
    if mode not in ("wal", "memory"):  # SQLite says so instead of failing, and would go on less durably
        raise sqlite3.OperationalError(f"it stays in journal mode {mode}, because the disk failed or another process holds it")
    db.execute("PRAGMA synchronous=FULL")
    db.execute("PRAGMA secure_delete=ON")  # a row that is deleted, moved or marked leaves no copy of itself in its page


def settle(db: sqlite3.Connection) -> None:
    """Make durable what a process that died, or whose fsync failed, left in the write-ahead log; once, before anything is built on it.

    The file may show rows that the disk does not hold, and another fsync would not write them: after a failed one the kernel takes them
    for written. So the log is written once more, byte for byte. Its folder is fsynced too, because SQLite passes over a failure of that.
    Raises sqlite3.Error.
    """
    file = db.execute("PRAGMA database_list").fetchone()[2]
    if not file:
        return
    db.execute("BEGIN IMMEDIATE")  # so that nobody else writes the log meanwhile
    try:
        with contextlib.suppress(FileNotFoundError):
            _write_again(Path(f"{file}-wal"))
        sync(Path(file).parent)
    except OSError as exc:
        raise sqlite3.OperationalError(f"what is in its write-ahead log cannot be made durable: {exc.strerror}") from exc
    finally:
        db.execute("ROLLBACK")


def report_damage(db: sqlite3.Connection) -> int:
    """Whether the write-ahead log ends in transactions that SQLite leaves out, because they or something before them is not whole.

    After a crash this may be the one that was being written. More, or one after a power cut, may have been acknowledged: so the log is
    copied before it is written over, and that is said. To be called after `settle`, because it carries the log into the file. How many.
    Raises sqlite3.Error.
    """
    file = db.execute("PRAGMA database_list").fetchone()[2]
    if not file:
        return 0
    wal = Path(f"{file}-wal")
    try:
        for _ in range(LOOKS):
            found = _damage(db, wal)
            if found is not None:
                return found
    except OSError as exc:
        raise sqlite3.OperationalError(f"its write-ahead log cannot be looked at: {exc.strerror}") from exc
    return 0  # others are writing it all the time, so it is whole


def _damage(db: sqlite3.Connection, wal: Path) -> int | None:
    """One look; None where somebody committed meanwhile, which looks like damage."""
    valid = _valid_frames(db)
    db.execute("BEGIN IMMEDIATE")  # so that nobody writes while we read
    try:
        with wal.open("rb") as whole:
            left_out = _left_out(whole, valid)
        kept = wal.with_name(f"{wal.name}.{time.time_ns() // 1_000_000}.damaged")
        if left_out:
            shutil.copyfile(wal, kept)
    except FileNotFoundError:
        return 0
    finally:
        db.execute("ROLLBACK")
    if left_out and _valid_frames(db) != valid:
        kept.unlink()
        return None
    if left_out:
        log.error(
            "the end of a write-ahead log cannot be read",
            file=str(wal),
            transactions=left_out,
            kept=str(kept),
            next_step="if the machine lost power or the disk failed, compare with a backup; otherwise delete the copy",
        )
    return left_out


def _valid_frames(db: sqlite3.Connection) -> int:
    """How many frames of the write-ahead log count. SQLite tells it in passing.

    It stands in the -shm file too, but whoever opens and closes that one, or the database, beside SQLite loses this process's locks on
    it, and the next process to come takes the file for abandoned.
    """
    return max(0, int(db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()[1]))


def _left_out(wal: BinaryIO, valid: int) -> int:
    """Commits of this generation of the log behind its valid frames. Layout: https://www.sqlite.org/walformat.html."""
    header = wal.read(32)
    if len(header) < 32:
        return 0
    page, salts, commits = int.from_bytes(header[8:12], "big"), header[16:24], 0
    wal.seek(32 + valid * (24 + page))
    while len(frame := wal.read(24)) == 24:
        commits += frame[8:16] == salts and frame[4:8] != bytes(4)
        wal.seek(page, os.SEEK_CUR)
    return commits


def told(exc: sqlite3.Error) -> str:
    """SQLite's reason, with the next step where the file itself is broken."""
    broken = "malformed" in str(exc) or "not a database" in str(exc)
    return f"{exc}; the file is damaged: keep a copy of it and bring it back from a backup with `plaudit restore`" if broken else str(exc)


def _write_again(path: Path) -> None:
    descriptor = os.open(path, os.O_RDWR)
    try:
        at = 0
        while data := os.pread(descriptor, COPY_BYTES, at):
            at += os.pwrite(descriptor, data, at)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def immediate(db: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
    """All or nothing on a connection in autocommit mode, with the write lock from the start. Raises sqlite3.Error."""
    db.execute("BEGIN IMMEDIATE")
    try:
        yield db
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:  # a full disk has ended it already, and the error to see is that one
            db.execute("ROLLBACK")
        raise


@contextlib.contextmanager
def transaction(engine: Engine) -> Iterator[Connection]:
    """All or nothing, committed at the end. Raises NotDurable where the database does not answer or takes no more."""
    try:
        with engine.begin() as db:
            yield db
    except SQLAlchemyError as exc:
        raise NotDurable(f"the registry's database does not answer: {exc.__cause__ or exc}", retry_after_s=2) from exc


@contextlib.contextmanager
def moment(engine: Engine) -> Iterator[Connection]:
    """Reads that all see one moment of the database, however many they are. Raises NotDurable where it does not answer.

    By themselves both databases would show each statement what was committed until then: half of a change made meanwhile.
    """
    try:
        with engine.connect() as db:
            if engine.dialect.name == "sqlite":
                db.exec_driver_sql("BEGIN")
            else:
                db = db.execution_options(isolation_level="REPEATABLE READ")
            yield db
    except SQLAlchemyError as exc:
        raise NotDurable(f"the registry's database does not answer: {exc.__cause__ or exc}", retry_after_s=2) from exc


@contextlib.contextmanager
def alone(engine: Engine, lock: Update) -> Iterator[Connection]:
    """A transaction that first updates a row which all of its kind update: they run one after another, so what one reads stays true until
    it commits. SQLite takes its write lock with that statement, PostgreSQL the row's. Raises NotDurable, and then nothing was written.

    PostgreSQL ends the session of a process that was stopped in the middle, so that the others do not wait for it; a process stopped while
    it holds SQLite's lock is waited for until the busy timeout, at every try.
    """
    try:
        with engine.begin() as db:
            if engine.dialect.name == "postgresql":
                db.exec_driver_sql(f"SET LOCAL lock_timeout = {LOCK_TIMEOUT_MS}")
                db.exec_driver_sql(f"SET LOCAL idle_in_transaction_session_timeout = {STOPPED_MS}")
            db.execute(lock)
            yield db
    except SQLAlchemyError as exc:
        raise NotDurable(f"the registry's database could not be written: {exc.__cause__ or exc}", retry_after_s=2) from exc


@contextlib.contextmanager
def upgrading(engine: Engine) -> Iterator[Connection]:
    """A transaction of its own for changing tables: one process at a time, all or nothing. Raises NotDurable."""
    try:
        with engine.begin() as db:
            if engine.dialect.name == "sqlite":
                db.exec_driver_sql("BEGIN IMMEDIATE")
            else:
                db.exec_driver_sql(f"SET LOCAL lock_timeout = {UPGRADE_TIMEOUT_MS}")
                db.exec_driver_sql(f"SELECT pg_advisory_xact_lock({UPGRADE_LOCK})")
            yield db
    except SQLAlchemyError as exc:
        raise NotDurable(f"the registry's database could not be upgraded: {exc.__cause__ or exc}", retry_after_s=2) from exc


def now_ms(db: Connection) -> int:
    """Unix milliseconds by the database's clock, which is one for all processes, whatever their own say."""
    # clock_timestamp() and not now(): a transaction that waited for a lock would see the time before it waited.
    postgres = "SELECT CAST(extract(epoch FROM clock_timestamp()) * 1000 AS BIGINT)"
    sqlite = "SELECT CAST(round((julianday('now') - 2440587.5) * 86400000.0) AS INTEGER)"
    return int(db.exec_driver_sql(sqlite if db.dialect.name == "sqlite" else postgres).scalar_one())


def truncate_wal(db: sqlite3.Connection, what: str, timeout_s: float = 20.0) -> None:
    """Empty the write-ahead log of this SQLite file, where what was deleted would survive until other rows overwrite it.

    Raises NotDurable where other processes keep it busy for so long.
    """
    end = time.monotonic() + timeout_s
    try:
        while db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]:
            if time.monotonic() > end:
                raise NotDurable(f"the write-ahead log of {what} could not be emptied within {timeout_s:g} s; try again", retry_after_s=2)
            time.sleep(0.01)
    except sqlite3.Error as exc:
        raise NotDurable(f"the write-ahead log of {what} could not be emptied: {exc}", retry_after_s=2) from exc


def insert_missing(engine: Engine, table: Table) -> postgresql.Insert | sqlite.Insert:
    """An INSERT that leaves a row alone whose key is there, whichever process wrote it."""
    if engine.dialect.name == "postgresql":
        return postgresql.insert(table).on_conflict_do_nothing()
    return sqlite.insert(table).on_conflict_do_nothing()


def ensure_row(engine: Engine, table: Table, key: str, values: Mapping[str, Any]) -> None:
    """Insert the row unless one with this key is there; looks first, because most often it is. Raises NotDurable."""
    with transaction(engine) as db:
        if db.execute(select(table.c[key]).where(table.c[key] == values[key])).first() is None:
            db.execute(insert_missing(engine, table).values(**values))


def create_tables(engine: Engine, metadata: MetaData) -> None:
    """Create what is missing. Safe when several processes do it at once. Raises ConfigError where the database is not usable."""
    try:
        metadata.create_all(engine)
    except SQLAlchemyError:
        # Another process may have created a table between our look and our CREATE; the second look finds it.
        try:
            metadata.create_all(engine)
        except SQLAlchemyError as exc:
            where = engine.url.render_as_string(hide_password=True)
            raise ConfigError(f"the database {where} cannot be used: {exc.__cause__ or exc}", field="registry.url") from exc
