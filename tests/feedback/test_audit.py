"""The audit chain: every change of a stored row, every cut and every swap is found, and named by its row."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine, text

from feedback import audit
from feedback.database import open_database, transaction

ROWS = 12


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Engine]:
    engine = open_database(f"sqlite:///{tmp_path / 'registry.sqlite'}")
    audit.open_audit(engine)
    for number in range(ROWS):
        with transaction(engine) as db:
            audit.record(db, "mara", "key.created", f"key{number}", "because")
    yield engine
    engine.dispose()


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


@pytest.mark.parametrize("row", range(1, ROWS + 1))
@pytest.mark.parametrize("column", ["at_ms", "actor", "action", "subject", "reason", "digest"])
def test_every_changed_field_is_found_in_its_row(database: Engine, row: int, column: str) -> None:
    value = "1" if column == "at_ms" else "'changed'"
    with transaction(database) as db:
        db.execute(text(f"UPDATE audit SET {column} = {value} WHERE id = {row}"))
    fault = audit.verify(database)[1]
    assert fault is not None and fault.row == row


@pytest.mark.parametrize("row", range(1, ROWS + 1))
def test_every_row_that_is_cut_out_is_missed(database: Engine, row: int) -> None:
    with transaction(database) as db:
        db.execute(text(f"DELETE FROM audit WHERE id = {row}"))
    fault = audit.verify(database)[1]
    assert fault is not None and fault.row == row


def test_two_rows_that_changed_places_are_found(database: Engine) -> None:
    with transaction(database) as db:
        db.execute(text("UPDATE audit SET id = 99 WHERE id = 4"))
        db.execute(text("UPDATE audit SET id = 4 WHERE id = 7"))
        db.execute(text("UPDATE audit SET id = 7 WHERE id = 99"))
    fault = audit.verify(database)[1]
    assert fault is not None and fault.row == 4
