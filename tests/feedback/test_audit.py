"""The audit chain: every change of a stored row, every cut and every swap is found, and named by its row."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine, delete, event, insert, select, text, update

from feedback import audit
from feedback.database import open_database, transaction

ROWS = 12
FaultAfter = Callable[..., audit.Fault | None]


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """A chain of rows. Tests that change it do so inside `undone`."""
    engine = open_database(f"sqlite:///{tmp_path_factory.mktemp('audit') / 'registry.sqlite'}")
    audit.open_audit(engine)
    for number in range(ROWS):
        with transaction(engine) as db:
            audit.record(db, "mara", "key.created", f"key{number}", "because")
    yield engine
    engine.dispose()


@pytest.fixture
def fault_after(database: Engine) -> Iterator[FaultAfter]:
    """What `verify` finds after some SQL; the chain is whole again afterwards."""
    with database.connect() as db:
        kept = [dict(row._mapping) for row in db.execute(select(audit.rows))]

    def run(*statements: str) -> audit.Fault | None:
        with transaction(database) as db:
            for statement in statements:
                assert db.execute(text(statement)).rowcount == 1
        return audit.verify(database)[1]

    yield run
    with transaction(database) as db:
        db.execute(delete(audit.rows))
        db.execute(insert(audit.rows), kept)


def test_a_chain_that_nobody_touched_is_whole(database: Engine) -> None:
    head, fault = audit.verify(database)
    assert fault is None and head.rows == ROWS
    assert [row["id"] for row in audit.read(database)] == list(range(1, ROWS + 1))


def test_an_action_that_fails_leaves_no_row(database: Engine) -> None:
    with pytest.raises(RuntimeError), transaction(database) as db:
        audit.record(db, "mara", "key.created", "k", "because")
        raise RuntimeError("the action did not happen")
    head, fault = audit.verify(database)
    assert fault is None and head.rows == ROWS


@pytest.mark.parametrize("column", ["at_ms", "actor", "action", "subject", "reason", "digest"])
@pytest.mark.parametrize("row", [1, 5, ROWS])
def test_every_changed_field_is_found_in_its_row(fault_after: FaultAfter, row: int, column: str) -> None:
    fault = fault_after(f"UPDATE audit SET {column} = {1 if column == 'at_ms' else 9} WHERE id = {row}")
    assert fault is not None and fault.row == row


@pytest.mark.parametrize("row", [1, 5, ROWS])
def test_every_row_that_is_cut_out_is_missed(fault_after: FaultAfter, row: int) -> None:
    fault = fault_after(f"DELETE FROM audit WHERE id = {row}")
    assert fault is not None and fault.row == row


def test_two_rows_that_changed_places_are_found(fault_after: FaultAfter) -> None:
    fault = fault_after(*(f"UPDATE audit SET id = {after} WHERE id = {before}" for before, after in ((4, 99), (7, 4), (99, 7))))
    assert fault is not None and fault.row == 4


def test_a_row_that_comes_while_the_chain_is_walked_is_no_fault(database: Engine) -> None:
    with database.connect() as db:
        kept = [dict(row._mapping) for row in db.execute(select(audit.head))]

    other = open_database(str(database.url))

    def append(*_: object) -> None:  # before every statement of `verify`, as another process may
        with transaction(other) as db:
            audit.record(db, "mara", "key.created", "late", "because")

    event.listen(database, "before_cursor_execute", append)

    event.listen(database, "before_cursor_execute", append)
    try:
        assert audit.verify(database)[1] is None
    finally:
        event.remove(database, "before_cursor_execute", append)
        other.dispose()
        with transaction(database) as db:
            db.execute(delete(audit.rows).where(audit.rows.c.subject == "late"))
            db.execute(update(audit.head).values(kept[0]))


def test_rows_behind_the_head_and_an_empty_chain_are_told_apart(tmp_path: Path) -> None:
    engine = open_database(f"sqlite:///{tmp_path / 'registry.sqlite'}")
    audit.open_audit(engine)
    assert audit.verify(engine) == (audit.Head(0, audit.EMPTY), None)
    with transaction(engine) as db:
        audit.record(db, "mara", "key.created", "k", "because")
        db.execute(update(audit.head).values(rows=0, digest=audit.EMPTY))
    fault = audit.verify(engine)[1]
    assert fault is not None and fault.row == 2
    engine.dispose()
