"""Adapters, what was found out about them, and which of them answers: the truth that every process goes by.

Nothing here decides; `rollout.py` does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import JsonValue
from sqlalchemy import Connection, Engine, func, insert, select, update

from deploy.ledger import Ledger, alias_of
from deploy.manifest import read_manifest, vllm_name
from deploy.records import AdapterRecord, Alias, Attestation, Replica, RolloutRecord, State
from deploy.routing import AdapterRef, RoutingTable
from deploy.store import AdapterStore
from deploy.tables import adapters, alias_history, aliases, attestations, facts, holdings, rollouts
from feedback.database import now_ms
from feedback.errors import Conflict, InvalidInput, NotFound, PromotionRefused
from feedback.events import AdapterEvent, RolloutEvent, new_id

ACTIVE = ("gates", "canary", "awaiting")
HOLDING_AGE_MS = 10_000
"""A replica that has been silent for longer counts as gone."""


class Registry(Ledger):
    """See `Ledger` for what every change promises."""

    def __init__(self, engine: Engine, tenant: str = "default", store: AdapterStore | None = None) -> None:
        """Without a `store`, adapters are found where they were registered from."""
        super().__init__(engine, tenant)
        self._store = store

    # --- adapters ---------------------------------------------------------------------------------------------------

    def register(self, adapter_id: str, path: Path, by: str) -> AdapterRecord:
        """A new candidate, which is in the store before it is one; one that is registered already is returned as it is."""
        there = select(adapters.c.id).where(adapters.c.id == adapter_id)
        with self._read() as db:
            known = db.execute(there).first() is not None
        if not known:
            manifest = read_manifest(path)
            if manifest.adapter_id != adapter_id:
                raise InvalidInput(f"{path} holds adapter {manifest.adapter_id[:16]}, not {adapter_id[:16]}", field="adapter")
            if self._store is not None:
                self._store.put(path)
            about = {"kind": manifest.kind, "temperature": manifest.temperature, "manifest_json": manifest.model_dump(mode="json")}
            state = {"state": "candidate", "reason": "registered", "path": str(path.resolve()), "registered_by": by}
            with self._write() as db:
                if db.execute(there).first() is None:  # nobody was faster
                    db.execute(insert(adapters).values(id=adapter_id, registered_ms=now_ms(db), **about, **state))
                    self._emit(db, AdapterEvent(**self._head(), type="adapter.registered", adapter=adapter_id, actor=by))
                    self._record(db, by, "adapter.registered", adapter_id, manifest.kind)
        return self.adapter(adapter_id)

    def register_stored(self, adapter_id: str, by: str) -> AdapterRecord:
        """The same for one that lies in the store already. Raises NotFound where it does not, Conflict where its files are not its own."""
        if self._store is None:
            raise NotFound("adapter: this process has no store to look into (deploy.store)", field="adapter")
        return self.register(adapter_id, self._store.fetch(adapter_id), by)

    def adapter(self, prefix: str) -> AdapterRecord:
        """By id or its first digits. Raises NotFound, and InvalidInput where several begin so."""
        prefix = prefix.removeprefix("a-")
        rows = self._all(AdapterRecord, select(adapters).where(adapters.c.id.startswith(prefix, autoescape=True)))
        if len(rows) > 1:
            raise InvalidInput(f"adapter: {len(rows)} adapters begin with '{prefix}'; give more digits", field="adapter")
        if not rows or not prefix:
            raise NotFound(f"adapter: there is none with id '{prefix[:64]}'; `plaudit adapters list` shows them", field="adapter")
        return rows[0]

    def adapters(self) -> list[AdapterRecord]:
        """All, oldest first."""
        return self._all(AdapterRecord, select(adapters).order_by(adapters.c.registered_ms, adapters.c.id))

    def next_candidate(self) -> AdapterRecord | None:
        """The newest candidate whose evaluation is there; older ones learned from fewer ratings."""
        waiting = [each for each in self.adapters() if each.state == "candidate" and each.kind == "trained"]
        return next((each for each in reversed(waiting) if self.attestations(each.id, "evaluation")), None)

    def attest(self, adapter_id: str, kind: str, body: Mapping[str, JsonValue], by: str, reason: str | None = None) -> str:
        """Add what was found out; nothing is ever changed. Returns its id. The audit says the kind and, where there is one, the reason."""
        with self._change(by, "adapter.attested", adapter_id, kind if reason is None else f"{kind} {reason}") as db:
            return self._attest(db, adapter_id, kind, body, by)

    def attestation(self, attestation_id: str) -> Attestation:
        """Raises NotFound."""
        if found := self._all(Attestation, select(attestations).where(attestations.c.id == attestation_id)):
            return found[0]
        raise NotFound(f"attestation: there is none with id '{attestation_id[:64]}'", field="attestation")

    def reconsider(self, adapter_id: str, by: str, reason: str) -> None:
        """A refused adapter is a candidate again. Raises Conflict where it is not refused."""
        with self._change(by, "adapter.reconsidered", adapter_id, reason) as db:
            refused = (adapters.c.id == adapter_id) & (adapters.c.state == "refused")
            if db.execute(update(adapters).where(refused).values(state="candidate", reason=reason)).rowcount == 0:
                raise Conflict(f"adapter {adapter_id[:16]} is not refused, so there is nothing to reconsider", field="adapter")

    def attestations(self, adapter_id: str, kind: str | None = None) -> list[Attestation]:
        """Oldest first."""
        query = select(attestations).where(attestations.c.adapter == adapter_id).order_by(attestations.c.at_ms, attestations.c.id)
        return self._all(Attestation, query if kind is None else query.where(attestations.c.kind == kind))

    # --- aliases and routes -----------------------------------------------------------------------------------------

    def alias(self, name: Alias) -> str | None:
        """The adapter that the alias points at."""
        with self._read() as db:
            return alias_of(db, name)

    def aliases(self, limit: int, before: int | None = None) -> dict[str, Any]:
        """Where each alias points and its last moves, of one moment; the moves with an id below `before`."""
        moves = select(alias_history).order_by(alias_history.c.id.desc()).limit(limit)
        with self._read() as db:
            found = db.execute(moves if before is None else moves.where(alias_history.c.id < before)).all()
            now = {name: alias_of(db, name) for name in get_args(Alias)}
        return now | {"history": [dict(row._mapping) for row in reversed(found)]}

    def start_with(self, adapter_id: str, by: str) -> None:
        """The very first stable. Raises Conflict where there is one."""
        with self._change(by, "alias.moved", adapter_id, "first stable") as db:
            self._move(db, {"stable": adapter_id}, {"stable": None}, by, "first stable")
            self._set_state(db, adapter_id, "stable", "first stable")

    def rollback(self, by: str, reason: str, expect: str | None = None) -> str:
        """`previous` answers again and a running rollout ends, in one transaction. Returns the adapter. Raises NotFound, and Conflict
        where `expect` is not stable any more: of two people who roll back the same adapter the second would bring it back."""
        with self._change(by, "adapter.rolled_back", "stable", reason) as db:
            stable, previous = alias_of(db, "stable"), alias_of(db, "previous")
            if expect is not None and stable != expect:
                raise Conflict(f"rollback: stable is {stable}, expected was {expect}: somebody else was first", field="stable")
            if previous is None:
                raise NotFound("rollback: the alias 'previous' points at nothing; nothing was promoted yet", field="previous")
            self._move(db, {"stable": previous, "previous": stable, "canary": None}, {"stable": stable, "previous": previous}, by, reason)
            self._set_state(db, previous, "stable", f"rolled back to by {by}: {reason}")
            if stable is not None:
                self._set_state(db, stable, "retired", f"rolled back by {by}: {reason}")
            for row in db.execute(select(rollouts).where(rollouts.c.state.in_(ACTIVE))).all():
                self._end(db, row.id, row.adapter, "stopped", f"rollback by {by}: {reason}", by)
        return previous

    def routing(self) -> RoutingTable:
        """What gateways go by; no canary while a living replica does not hold it. Raises NotFound as long as there is no stable."""
        with self._read() as db:
            version = int(db.execute(select(facts.c.value).where(facts.c.name == "version")).scalar_one())
            named = {
                row.name: row for row in db.execute(select(aliases.c.name, adapters).join(adapters, adapters.c.id == aliases.c.adapter))
            }
            row = db.execute(select(rollouts).where(rollouts.c.state.in_(("canary", "awaiting")))).first()
            held = _held(db) if row is not None else None
        if "stable" not in named:
            raise NotFound("there is no stable adapter yet", field="stable")

        def ref(name: str) -> AdapterRef | None:
            return AdapterRef(adapter=named[name].id, temperature=named[name].temperature) if name in named else None

        stable = ref("stable")
        assert stable is not None
        table = RoutingTable(version=version, stable=stable, previous=ref("previous"))
        if row is None or "canary" not in named:
            return table
        if held is not None and not arms(row.adapter, row.stable, row.id) <= held:
            return table  # a replica restarts or lost it: these people go on with stable meanwhile
        return table.model_copy(update={"canary": ref("canary"), "rollout": row.id, "weight": row.weight, "salt": row.salt})

    def wanted(self) -> dict[str, Path]:
        """Names that a replica must hold, and the folders of their weights; without those that are still on their way from the store."""
        with self._read() as db:
            paths = {row.id: Path(row.path) for row in db.execute(select(adapters.c.id, adapters.c.path))}
            named = [row.adapter for row in db.execute(select(aliases.c.adapter)) if row.adapter]
            active = db.execute(select(rollouts).where(rollouts.c.state.in_(ACTIVE))).all()
        named += [adapter for row in active for adapter in (row.adapter, row.stable)]
        here = {each: self._store.folder(each, paths[each]) if self._store else paths[each] for each in named}
        names = [(vllm_name(each), each) for each in named] + [(vllm_name(row.stable, row.id), row.stable) for row in active]
        return {name: path for name, each in names if (path := here[each]) is not None}

    def report_held(self, replica: str, names: set[str]) -> None:
        """A replica says what it could answer with now."""
        with self._write() as db:
            values = {"names": sorted(names), "at_ms": now_ms(db)}
            if db.execute(update(holdings).where(holdings.c.replica == replica).values(**values)).rowcount == 0:
                db.execute(insert(holdings).values(replica=replica, **values))

    def replicas(self) -> list[Replica]:
        """All that ever said what they hold, by name."""
        with self._read() as db:
            oldest = now_ms(db) - HOLDING_AGE_MS
            rows = db.execute(select(holdings).order_by(holdings.c.replica)).all()
        return [Replica(**row._mapping, lives=row.at_ms > oldest) for row in rows]

    def held_everywhere(self) -> set[str]:
        """Names that every living replica holds; empty where none lives."""
        with self._read() as db:
            return _held(db) or set()

    # --- rollouts ---------------------------------------------------------------------------------------------------

    def begin_rollout(self, adapter_id: str, by: str, epoch: int | None = None) -> RolloutRecord:
        """Raises Conflict while another one runs."""
        rollout_id = hashlib.sha256(new_id().encode()).hexdigest()[:8]
        with self._change(by, "rollout.started", rollout_id, adapter_id, epoch) as db:
            if running := db.execute(select(rollouts.c.id).where(rollouts.c.state.in_(ACTIVE))).first():
                raise Conflict(f"rollout {running.id} is running; it must end before another begins", field="rollout")
            stable = alias_of(db, "stable")
            if stable is None:
                raise NotFound("there is no stable adapter to compare with", field="stable")
            number = int(db.execute(select(func.count()).select_from(rollouts).where(rollouts.c.canary_ms.is_not(None))).scalar_one()) + 1
            values = {"id": rollout_id, "adapter": adapter_id, "stable": stable, "number": number, "state": "gates", "weight": 0.0}
            now = now_ms(db)
            blank = {"salt": rollout_id, "started_ms": now, "since_ms": now, "reason": "gates are being judged", "verdicts": []}
            db.execute(insert(rollouts).values(**values, **blank))
            self._emit(db, RolloutEvent(**self._head(), type="rollout.started", rollout=rollout_id, adapter=adapter_id, actor=by))
        return self.rollout(rollout_id)

    def rollout(self, rollout_id: str) -> RolloutRecord:
        """Raises NotFound."""
        if found := self._all(RolloutRecord, select(rollouts).where(rollouts.c.id == rollout_id)):
            return found[0]
        raise NotFound(f"rollout: there is none with id '{rollout_id[:16]}'", field="rollout")

    def rollouts(self, adapter_id: str | None = None) -> list[RolloutRecord]:
        """Oldest first."""
        query = select(rollouts).order_by(rollouts.c.started_ms)
        return self._all(RolloutRecord, query if adapter_id is None else query.where(rollouts.c.adapter == adapter_id))

    def active_rollout(self) -> RolloutRecord | None:
        """The one that runs, if any."""
        return next((each for each in self.rollouts() if each.state in ACTIVE), None)

    def start_canary(self, rollout_id: str, weight: float, verdicts: list[dict[str, JsonValue]], by: str, epoch: int) -> None:
        """People begin to be answered by it."""
        with self._step(rollout_id, "gates", by, "canary", epoch) as (db, row):
            now = now_ms(db)
            reason = f"{weight:.0%} of people are answered by it"
            self._arrive(db, rollout_id, verdicts, since_ms=now, state="canary", weight=weight, canary_ms=now, reason=reason)
            self._move(db, {"canary": row.adapter}, {"canary": None}, by, "canary")
            self._set_state(db, row.adapter, "canary", "canary")

    def await_approval(self, rollout_id: str, verdicts: list[dict[str, JsonValue]], reason: str, by: str, epoch: int) -> None:
        """The canary has won; a person decides."""
        with self._step(rollout_id, "canary", by, "awaiting", epoch) as (db, _):
            self._arrive(db, rollout_id, verdicts, since_ms=now_ms(db), state="awaiting", reason=reason)

    def grow_canary(self, rollout_id: str, weight: float, verdicts: list[dict[str, JsonValue]], by: str, epoch: int) -> None:
        """The next step: more people are answered by it, those who were stay. Raises Conflict where the weight would not grow."""
        with self._step(rollout_id, "canary", by, "grown", epoch, f"{weight:.0%} of people") as (db, row):
            if weight <= row.weight:
                raise Conflict(f"rollout {rollout_id} has weight {row.weight:g}, which does not grow to {weight:g}", field="weight")
            self._arrive(db, rollout_id, verdicts, since_ms=now_ms(db), weight=weight, reason=f"{weight:.0%} of people are answered by it")

    def note(
        self, rollout_id: str, reason: str, verdicts: list[dict[str, JsonValue]], epoch: int | None = None, *, error: bool = False
    ) -> None:
        """What the last look showed, for people to read; no transition. `error`: it could not be judged, and since when is kept."""
        with self._write(epoch) as db:
            where = (rollouts.c.id == rollout_id) & rollouts.c.state.in_(ACTIVE)
            since = func.coalesce(rollouts.c.error_ms, now_ms(db)) if error else None
            db.execute(update(rollouts).where(where).values(reason=reason, verdicts=verdicts, error_ms=since))

    def end_rollout(
        self, rollout_id: str, reason: str, by: str, verdicts: list[dict[str, JsonValue]] | None = None, epoch: int | None = None
    ) -> None:
        """Stop: all traffic is stable's again, in one transaction."""
        with self._change(by, "rollout.stopped", rollout_id, reason, epoch) as db:
            row = db.execute(select(rollouts).where(rollouts.c.id == rollout_id)).first()
            if row is None or row.state not in ACTIVE:
                raise Conflict(f"rollout {rollout_id} has ended already", field="rollout")
            if verdicts is not None:
                db.execute(update(rollouts).where(rollouts.c.id == rollout_id).values(verdicts=verdicts))
            if alias_of(db, "canary") is not None:
                self._move(db, {"canary": None}, {"canary": row.adapter}, by, reason)
            self._end(db, rollout_id, row.adapter, "stopped", reason, by)

    def promote(self, rollout_id: str, by: str) -> None:
        """The canary becomes stable, stable becomes previous. Raises Conflict where it does not wait for approval, and PromotionRefused
        where what is stored does not say that it won and that nothing is wrong."""
        with self._step(rollout_id, "awaiting", by, "promoted", None) as (db, row):
            if (lacking := _unproven(row)) is not None:
                raise PromotionRefused(f"approval: {row.adapter[:16]}: {lacking}", field="adapter")
            stable = alias_of(db, "stable")
            before: dict[Alias, str | None] = {"stable": row.stable, "canary": row.adapter}
            self._move(db, {"stable": row.adapter, "previous": stable, "canary": None}, before, by, "approved")
            self._set_state(db, row.adapter, "stable", f"approved by {by}")
            self._set_state(db, row.stable, "retired", f"followed by {row.adapter[:16]}")
            values = {"state": "promoted", "weight": 0.0, "approved_by": by, "reason": f"approved by {by}"}
            db.execute(update(rollouts).where(rollouts.c.id == rollout_id).values(**values))

    def withhold(self, adapter_id: str, body: Mapping[str, JsonValue], by: str, *, retire: bool, fallback: str | None) -> None:
        """Never promote it again: an attestation `erasure`, which gates and approvals go by, and the end of its rollout. With `retire`
        it also leaves every alias, `fallback` answers in its place, and it is retired. One transaction. Raises Conflict without one."""
        reason = str(body["reason"])
        with self._change(by, "adapter.retired" if retire else "adapter.blocked", adapter_id, reason) as db:
            self._attest(db, adapter_id, "erasure", body, by)
            stable = alias_of(db, "stable")
            moved: dict[Alias, str | None] = {"previous": None} if retire and alias_of(db, "previous") == adapter_id else {}
            if retire and stable == adapter_id:
                if fallback is None:
                    raise Conflict(f"adapter {adapter_id[:16]} is stable and there is nothing to answer in its place", field="stable")
                moved |= {"stable": fallback, "previous": None}
                self._set_state(db, fallback, "stable", f"answers in place of {adapter_id[:16]}: {reason}")
            for row in db.execute(select(rollouts).where(rollouts.c.state.in_(ACTIVE))).all():
                if row.adapter == adapter_id or (retire and row.stable == adapter_id):
                    moved |= {"canary": None} if alias_of(db, "canary") is not None else {}
                    self._end(db, row.id, row.adapter, "stopped", reason, by)
            self._move(db, moved, {"stable": stable} if "stable" in moved else {}, by, reason)
            if retire:
                self._set_state(db, adapter_id, "retired", reason)
                self._emit(
                    db, AdapterEvent(**self._head(), type="adapter.retired", adapter=adapter_id, actor=by, detail={"reason": reason})
                )

    def stand_by(self, adapter_id: str, by: str, reason: str) -> None:
        """Make it `previous`, so that replicas load it before people are sent there."""
        with self._change(by, "alias.moved", adapter_id, reason) as db:
            self._move(db, {"previous": adapter_id}, {}, by, reason)

    # --- inside a transaction ---------------------------------------------------------------------------------------

    @contextmanager
    def _step(
        self, rollout_id: str, state: str, by: str, to: str, epoch: int | None, reason: str | None = None
    ) -> Iterator[tuple[Connection, RolloutRecord]]:
        """A transition, refused unless the rollout is in `state` and, for the controller, its epoch is the newest."""
        with self._change(by, f"rollout.{to}", rollout_id, reason or to, epoch) as db:
            row = db.execute(select(rollouts).where(rollouts.c.id == rollout_id)).first()
            if row is None or row.state != state:
                found = "unknown" if row is None else row.state
                raise Conflict(f"rollout {rollout_id} is {found}; only one that is {state} can become {to}", field="rollout")
            record = RolloutRecord.model_validate(dict(row._mapping))
            yield db, record
            kind: Literal["rollout.approved", "rollout.stepped"] = "rollout.approved" if to == "promoted" else "rollout.stepped"
            self._emit(db, RolloutEvent(**self._head(), type=kind, rollout=rollout_id, adapter=record.adapter, actor=by, detail={"to": to}))

    def _arrive(self, db: Connection, rollout_id: str, verdicts: list[dict[str, JsonValue]], **values: float | str) -> None:
        """It is somewhere else now, and can be judged."""
        db.execute(update(rollouts).where(rollouts.c.id == rollout_id).values(verdicts=verdicts, error_ms=None, **values))

    def _attest(self, db: Connection, adapter_id: str, kind: str, body: Mapping[str, JsonValue], by: str) -> str:
        values = {"id": new_id(), "adapter": adapter_id, "kind": kind, "body": dict(body), "actor": by, "at_ms": now_ms(db)}
        db.execute(insert(attestations).values(**values))
        detail: dict[str, JsonValue] = {"kind": kind, "id": str(values["id"])}
        self._emit(db, AdapterEvent(**self._head(), type="adapter.attested", adapter=adapter_id, actor=by, detail=detail))
        return str(values["id"])

    def _set_state(self, db: Connection, adapter_id: str, state: State, reason: str) -> None:
        db.execute(update(adapters).where(adapters.c.id == adapter_id).values(state=state, reason=reason))

    def _end(self, db: Connection, rollout_id: str, adapter_id: str, state: str, reason: str, by: str) -> None:
        db.execute(update(rollouts).where(rollouts.c.id == rollout_id).values(state=state, weight=0.0, reason=reason))
        if adapter_id not in (alias_of(db, "stable"), alias_of(db, "previous")):
            self._set_state(db, adapter_id, "refused", reason)
        detail: dict[str, JsonValue] = {"reason": reason}
        self._emit(db, RolloutEvent(**self._head(), type="rollout.ended", rollout=rollout_id, adapter=adapter_id, actor=by, detail=detail))


def _unproven(row: RolloutRecord) -> str | None:
    """What keeps these verdicts from being a proof; None where they are one."""
    for each in row.verdicts:
        if each.get("verdict") in ("fail", "error"):
            return f"{each.get('name')}: {each.get('reason')}"
    won = any(each.get("name") == "wins" and each.get("verdict") == "pass" for each in row.verdicts)
    return None if won else "no passing verdict 'wins' is stored, so nobody has shown that people prefer it"


def arms(adapter: str, stable: str, rollout: str) -> set[str]:
    """The names that a replica must hold for a canary: its own, and stable's for the baseline."""
    return {vllm_name(adapter), vllm_name(stable, rollout)}


def _held(db: Connection) -> set[str] | None:
    """What every living replica holds; None where none reports."""
    rows = db.execute(select(holdings.c.names).where(holdings.c.at_ms > now_ms(db) - HOLDING_AGE_MS)).all()
    return set.intersection(*(set(row.names) for row in rows)) if rows else None
