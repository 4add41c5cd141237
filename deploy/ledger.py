"""How the registry writes: one change after another, each with its audit row and its event, the leader's only while it leads.

Every change is one transaction that bumps the version, moves aliases by compare-and-swap, writes a hash-chained audit
row and puts the event into the outbox. What the leader writes names its epoch and is refused once another leads. Times are the
database's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal, TypeVar

from pydantic import JsonValue
from sqlalchemy import Connection, Engine, Select, insert, select, update

from deploy.records import Alias
from deploy.schema import upgrade
from deploy.tables import alias_history, aliases, facts, leases, outbox
from feedback import audit
from feedback.database import alone, ensure_row, moment, now_ms
from feedback.errors import Conflict
from feedback.events import AdapterEvent, Event, Model, decode, encode, new_id

M = TypeVar("M", bound=Model)


class Ledger:
    """Transactions, the lease, the outbox. Thread-safe. Raises NotDurable where the database does not answer."""

    def __init__(self, engine: Engine, tenant: str) -> None:
        upgrade(engine)
        audit.open_audit(engine)
        self._engine = engine
        self._tenant = tenant
        for name in ("version", "epoch"):
            ensure_row(engine, facts, "name", {"name": name, "value": 0})

    def lease(self, name: str, holder: str, ttl_s: float) -> int | None:
        """Take or renew it; its epoch, or None while somebody else holds it. A process whose clock is wrong neither takes it too early nor
        keeps it too long."""
        with self._write() as db:
            now = now_ms(db)
            row = db.execute(select(leases).where(leases.c.name == name)).first()
            expires = now + int(ttl_s * 1000)
            if row is None:
                db.execute(insert(leases).values(name=name, holder=holder, epoch=1, expires_ms=expires))
                return 1
            if row.holder != holder and row.expires_ms > now:
                return None
            epoch: int = row.epoch + (row.holder != holder)
            db.execute(update(leases).where(leases.c.name == name).values(holder=holder, epoch=epoch, expires_ms=expires))
            return epoch

    def clock_ms(self) -> int:
        """Unix milliseconds by the database's clock."""
        with self._read() as db:
            return now_ms(db)

    def unsent(self, limit: int = 100) -> list[Event]:
        """Events of changes that are not in the event log yet."""
        with self._read() as db:
            waiting = select(outbox.c.value).where(outbox.c.sent.is_(False)).order_by(outbox.c.event_id).limit(limit)
            return [decode(row.value) for row in db.execute(waiting)]

    def mark_sent(self, events: list[Event], epoch: int | None = None) -> None:
        with self._write(epoch) as db:
            db.execute(update(outbox).where(outbox.c.event_id.in_([event.event_id for event in events])).values(sent=True))

    def _read(self) -> AbstractContextManager[Connection]:
        return moment(self._engine)

    def _all(self, model: type[M], query: Select[Any]) -> list[M]:
        with self._read() as db:
            return [model.model_validate(dict(row._mapping)) for row in db.execute(query)]

    @contextmanager
    def _write(self, epoch: int | None = None) -> Iterator[Connection]:
        """One after another; the leader's only as long as it leads. Raises Conflict."""
        with alone(self._engine, update(facts).where(facts.c.name == "epoch").values(value=facts.c.value + 1)) as db:
            if epoch is not None and db.execute(select(leases.c.epoch).where(leases.c.name == "controller")).scalar() != epoch:
                raise Conflict(f"another controller has taken over: epoch {epoch} is over", field="epoch")
            yield db

    @contextmanager
    def _change(self, actor: str, action: str, subject: str, reason: str, epoch: int | None = None) -> Iterator[Connection]:
        """A change with its audit row."""
        with self._write(epoch) as db:
            yield db
            self._record(db, actor, action, subject, reason)

    def _record(self, db: Connection, actor: str, action: str, subject: str, reason: str) -> None:
        db.execute(update(facts).where(facts.c.name == "version").values(value=facts.c.value + 1))
        audit.record(db, actor, action, subject, reason)

    def _move(self, db: Connection, to: Mapping[Alias, str | None], expect: Mapping[Alias, str | None], by: str, reason: str) -> None:
        """Compare-and-swap of several aliases at once, with history and events."""
        for name, adapter_id in to.items():
            before = alias_of(db, name)
            if name in expect and before != expect[name]:
                raise Conflict(f"alias {name} points at {before}, expected was {expect[name]}: somebody else was first", field=name)
            if before == adapter_id:
                continue
            if db.execute(update(aliases).where(aliases.c.name == name).values(adapter=adapter_id)).rowcount == 0:
                db.execute(insert(aliases).values(name=name, adapter=adapter_id))
            kind: Literal["adapter.aliased", "adapter.unaliased"] = "adapter.unaliased" if adapter_id is None else "adapter.aliased"
            detail: dict[str, JsonValue] = {"before": before, "reason": reason}
            moved = adapter_id or before
            assert moved is not None, "they differ"
            event = AdapterEvent(**self._head(), type=kind, adapter=moved, actor=by, alias=name, detail=detail)
            self._emit(db, event)
            values = {"name": name, "before": before, "after": adapter_id, "actor": by, "reason": reason, "at_ms": now_ms(db)}
            db.execute(insert(alias_history).values(**values, event_id=event.event_id))

    def _head(self) -> dict[str, str]:
        return {"event_id": new_id(), "tenant": self._tenant}

    def _emit(self, db: Connection, event: Event) -> None:
        db.execute(insert(outbox).values(event_id=event.event_id, value=encode(event).decode(), sent=False))


def alias_of(db: Connection, name: str) -> str | None:
    """The adapter that the alias points at."""
    found: str | None = db.execute(select(aliases.c.adapter).where(aliases.c.name == name)).scalar()
    return found
