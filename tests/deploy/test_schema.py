"""The database's version: revisions make what the rooms declare, one process at a time, all or nothing, and never a newer one's tables."""

from __future__ import annotations

import runpy
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Column, Engine, Integer, MetaData, Table, event, insert, inspect, text

from deploy import tables
from deploy.registry import Registry
from deploy.schema import MIGRATIONS, upgrade
from feedback import audit, erasure, keys, subjects
from feedback.database import open_database
from feedback.errors import ConfigError, NotDurable

NEWEST = "0004"
ROOMS = [tables.metadata, audit.metadata, keys.metadata, subjects.metadata, erasure.metadata]


def declared(rooms: list[MetaData]) -> MetaData:
    """The tables of all rooms as one."""
    merged = MetaData()
    for room in rooms:
        for table in room.tables.values():
            table.to_metadata(merged)
    return merged


def revision(database: Engine) -> list[str]:
    with database.connect() as db:
        return [row[0] for row in db.execute(text("SELECT version_num FROM alembic_version"))]


def test_revisions_make_what_the_rooms_declare(database: Engine) -> None:
    upgrade(database)
    with database.connect() as db:
        context = MigrationContext.configure(db, opts={"compare_type": True})
        assert compare_metadata(context, declared(ROOMS)) == []
        # Negative control: a column and a table that no revision makes are seen.
        more = declared(ROOMS)
        Table("more", more, Column("id", Integer, primary_key=True))
        more.tables["outbox"].append_column(Column("late", Integer))
        assert sorted(change[0] for change in compare_metadata(context, more)) == ["add_column", "add_table"]


def test_a_database_from_before_revisions_keeps_what_it_holds(
    database: Engine, tmp_path: Path, tiny_policy: Path, make_adapter: Callable[[Path, Path, int], tuple[str, Path]]
) -> None:
    adapter, path = make_adapter(tiny_policy, tmp_path / "adapters", 1)
    first = runpy.run_path(str(MIGRATIONS / "versions" / "r0001_tables.py"))["metadata"]
    first.create_all(database, tables=[table for name, table in first.tables.items() if name not in audit.metadata.tables])
    with database.begin() as db:
        db.execute(text("INSERT INTO registry_facts VALUES ('version', 41)"))
        row = {"id": adapter, "path": str(path), "kind": "trained", "temperature": 1.0, "state": "candidate"}
        db.execute(insert(first.tables["adapters"]).values(**row, registered_by="trainer", registered_ms=1, reason="registered"))
    registry = Registry(database)
    assert revision(database) == [NEWEST]
    record = registry.adapter(adapter)
    assert record.registered_by == "trainer" and record.manifest.adapter_id == adapter, "its manifest is read from its folder"
    registry.attest(adapter, "note", {}, "trainer")
    with database.connect() as db:
        assert db.execute(text("SELECT value FROM registry_facts WHERE name = 'version'")).scalar_one() == 42
    assert {table for metadata in ROOMS for table in metadata.tables} <= set(inspect(database).get_table_names())


def test_a_newer_versions_database_is_refused_by_name(database: Engine) -> None:
    Registry(database)
    with database.begin() as db:
        db.execute(text("UPDATE alembic_version SET version_num = '0042_from_tomorrow'"))
    with pytest.raises(
        ConfigError, match=rf"of revision 0042_from_tomorrow, this version of Plaudit knows up to {NEWEST}: a newer one has"
    ):
        Registry(database)


def test_processes_that_start_at_once_upgrade_once(database_url: str) -> None:
    problems: list[Exception] = []
    together = threading.Barrier(4)

    def start() -> None:
        engine = open_database(database_url)
        try:
            together.wait()
            Registry(engine)
        except Exception as exc:  # noqa: BLE001  the main thread tells it
            problems.append(exc)
        finally:
            engine.dispose()

    threads = [threading.Thread(target=start) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    engine = open_database(database_url)
    assert problems == [] and revision(engine) == [NEWEST]
    engine.dispose()


def test_an_upgrade_that_fails_in_the_middle_leaves_nothing(database: Engine) -> None:
    def full(conn: object, cursor: object, statement: str, *_: object) -> tuple[str, object]:
        # As on a full disk, after some tables are there.
        return ("SELECT nothing" if "CREATE TABLE outbox" in statement else statement, _[0])

    event.listen(database, "before_cursor_execute", full, retval=True)
    with pytest.raises(NotDurable, match="could not be upgraded"):
        upgrade(database)
    assert inspect(database).get_table_names() == []
    event.remove(database, "before_cursor_execute", full)
    upgrade(database)
    assert revision(database) == [NEWEST]
