"""Opening the database that holds the registry, the API keys and the subjects' keys.

SQLite for one machine, any SQLAlchemy URL (PostgreSQL) for several. Each room creates its own tables with `create_tables`.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, MetaData, Table, create_engine, event, insert, select
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from feedback.errors import ConfigError, NotDurable


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
    return engine


def _configure_sqlite(connection: sqlite3.Connection, _record: Any) -> None:
    for pragma in ("busy_timeout=5000", "journal_mode=WAL", "synchronous=FULL", "secure_delete=ON", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")


@contextmanager
def transaction(engine: Engine) -> Iterator[Connection]:
    """All or nothing, committed at the end. Raises NotDurable where the database does not answer or takes no more."""
    try:
        with engine.begin() as db:
            yield db
    except SQLAlchemyError as exc:
        raise NotDurable(f"the registry's database does not answer: {exc.__cause__ or exc}", retry_after_s=2) from exc


def truncate_wal(db: sqlite3.Connection, what: str, timeout_s: float = 20.0) -> None:
    """Empty the write-ahead log of this SQLite file, where what was deleted would survive until other rows overwrite it.

    Raises NotDurable where other processes keep it busy for so long.
    """
    end = time.monotonic() + timeout_s
    try:
        while db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]:
            if time.monotonic() > end:
                raise NotDurable(
                    f"the write-ahead log of {what} could not be emptied within {timeout_s:g} s; say it again", retry_after_s=2
                )
            time.sleep(0.01)
    except sqlite3.Error as exc:
        raise NotDurable(f"the write-ahead log of {what} could not be emptied: {exc}", retry_after_s=2) from exc


def ensure_row(engine: Engine, table: Table, key: str, values: Mapping[str, Any]) -> None:
    """Insert the row unless one with this key is there. Safe when several processes do it at once. Raises NotDurable."""
    there = select(table.c[key]).where(table.c[key] == values[key])
    try:
        with transaction(engine) as db:
            if db.execute(there).first() is None:
                db.execute(insert(table).values(**values))
    except NotDurable:
        # Another process may have been faster; then the row is there now.
        with transaction(engine) as db:
            if db.execute(there).first() is None:
                raise


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
