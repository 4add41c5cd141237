"""Who did what: one hash-chained row for each action, written in the transaction of the action.

    digest = SHA-256(canonical JSON of [digest of the row before, row])

The chain's head (how many rows, the last digest) lies beside it, so that rows cut off the end are missed too. Whoever can write the
database can rewrite rows and head together: `plaudit audit verify` prints the head, to be kept where that person cannot write.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import BigInteger, Column, Connection, Engine, Integer, MetaData, String, Table, insert, select, true, update

from feedback.clock import wall_ms
from feedback.database import create_tables, ensure_row, transaction
from feedback.errors import InvalidInput

metadata = MetaData()
rows = Table(
    "audit",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("at_ms", BigInteger, nullable=False),
    Column("actor", String(200), nullable=False),
    Column("action", String(60), nullable=False),
    Column("subject", String(80), nullable=False),
    Column("reason", String, nullable=False),
    Column("digest", String(64), nullable=False),
)
head = Table(
    "audit_head",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("rows", Integer, nullable=False),
    Column("digest", String(64), nullable=False),
)
MAX_REASON_CHARS = 500
EMPTY = "0" * 64
"""The digest before the first row."""


@dataclass(frozen=True)
class Fault:
    """The first row that does not fit, and why."""

    row: int
    reason: str


@dataclass(frozen=True)
class Head:
    """How far the chain goes."""

    rows: int
    digest: str


def open_audit(engine: Engine) -> None:
    """Create what is missing."""
    create_tables(engine, metadata)
    ensure_row(engine, head, "id", {"id": 1, "rows": 0, "digest": EMPTY})


def reason(text: str) -> str:
    """A reason as an operator gives it. Raises InvalidInput where it is not one line of text, which terminals print as it is."""
    if not 1 <= len(text.strip()) <= MAX_REASON_CHARS or not text.isprintable():
        told = f"has {len(text.strip())} characters" if text.isprintable() else "holds line breaks or characters that cannot be printed"
        raise InvalidInput(f"reason: {told}; it goes into the audit as one line of 1 to {MAX_REASON_CHARS} characters", field="reason")
    return text.strip()


def record(db: Connection, actor: str, action: str, subject: str, reason: str) -> None:
    """Add one row inside the caller's transaction. Locks the head, so that two processes cannot both follow the same row."""
    db.execute(update(head).values(rows=head.c.rows + 1))
    number, before = db.execute(select(head.c.rows, head.c.digest)).one()
    values = {"id": number, "at_ms": wall_ms(), "actor": actor, "action": action, "subject": subject, "reason": reason}
    digest = _digest(before, values)
    db.execute(insert(rows).values(**values, digest=digest))
    db.execute(update(head).values(digest=digest))


def read(engine: Engine) -> Iterator[dict[str, Any]]:
    """All rows, oldest first."""
    with transaction(engine) as db:
        for row in db.execute(select(rows).order_by(rows.c.id)):
            yield dict(row._mapping)


def tail(engine: Engine, limit: int, before: int | None = None) -> list[dict[str, Any]]:
    """The last rows, oldest first; those below `before`."""
    last = select(rows).order_by(rows.c.id.desc()).limit(limit)
    with transaction(engine) as db:
        found = db.execute(last if before is None else last.where(rows.c.id < before)).all()
    return [dict(row._mapping) for row in reversed(found)]


def verify(engine: Engine) -> tuple[Head, Fault | None]:
    """Walk the whole chain: its head as computed, and the first row that is not what was written."""
    before, number, stored = EMPTY, 0, (0, EMPTY)
    # One statement, so that head and rows are of one moment while other processes append.
    both = select(head.c.rows.label("head_rows"), head.c.digest.label("head_digest"), rows).outerjoin_from(head, rows, true())
    with transaction(engine) as db:
        for row in db.execute(both.order_by(rows.c.id)):
            values = dict(row._mapping)
            stored = values.pop("head_rows"), values.pop("head_digest")
            digest = values.pop("digest")
            if values["id"] is None:
                break  # there is no row yet
            if values["id"] != number + 1:
                return Head(number, before), Fault(number + 1, f"it is missing: the next row is {values['id']}")
            if digest != _digest(before, values):
                return Head(number, before), Fault(number + 1, "its digest does not fit its content and the row before it")
            number, before = number + 1, digest
    if stored != (number, before):
        return Head(number, before), Fault(number + 1, f"the head counts {stored[0]} rows, ending in {stored[1][:16]}")
    return Head(number, before), None


def _digest(before: str, values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps([before, values], sort_keys=True, separators=(",", ":")).encode()).hexdigest()
