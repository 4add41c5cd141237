"""What an operator may ask for, each once: its route, its scope, what it takes and what it does.

Gateways serve the table as `/ops/v1`; the command line asks a gateway or, where none runs, does the same here. So every refusal is raised
in one place and reads the same everywhere. A change that depends on what its operator saw says so (`expect`, or the rollout's id), and is
refused where somebody else was first: repeating it never does it twice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, Field
from sqlalchemy import Engine

from deploy import approval, overrides
from deploy.card import Card, card_of
from deploy.config import RolloutSettings
from deploy.manifest import Manifest
from deploy.records import AdapterRecord, AliasMove, Attestation, Replica, RolloutRecord
from deploy.registry import Registry
from deploy.routing import RoutingTable
from feedback import audit
from feedback.events import Model
from feedback.keys import ApiKey, Scope

PREFIX = "/ops/v1"
READ: Scope = "adapters:read"
MOST = 1000
RUNNING = "running"
"""In place of a rollout's id: whichever runs."""


@dataclass(frozen=True)
class Desk:
    """What the operations work on."""

    registry: Registry
    database: Engine
    settings: RolloutSettings


# --- what they take ---------------------------------------------------------------------------------------------------


class Nothing(Model):
    """No field."""


class OfAdapter(Model):
    adapter: str = Field(max_length=80)
    """Its id, or enough of its first digits."""


class OfRollout(Model):
    rollout: str = Field(max_length=16)


class NewAdapter(Model):
    adapter: str = Field(pattern="^[0-9a-f]{64}$")
    """The id of an adapter that lies in the store (`deploy.store`); its files are checked against it."""


class Override(OfAdapter):
    gate: str = Field(max_length=80)
    reason: str
    """Goes into the audit and beside the gate's verdict."""


class Stop(OfRollout):
    """`rollout` may be `running`: whichever runs."""

    reason: str
    """Goes into the audit."""


class Rollback(Model):
    expect: str = Field(max_length=80)
    """The adapter that is stable now. Of two people who take the same one back, the second would otherwise bring it back."""
    reason: str
    """Goes into the audit."""


class Last(Model):
    limit: int = Field(default=100, ge=1, le=MOST)
    """How many rows, the newest ones."""
    before: int | None = Field(default=None, ge=1)
    """Only rows with a smaller id, to go further back."""


# --- what they give ---------------------------------------------------------------------------------------------------


class Adapters(Model):
    adapters: list[AdapterRecord]
    """Oldest first."""


class AdapterView(Model):
    adapter: AdapterRecord
    manifest: Manifest
    attestations: list[Attestation]
    """Oldest first."""
    rollouts: list[RolloutRecord]
    """Oldest first."""


class Rollouts(Model):
    rollouts: list[RolloutRecord]
    """Oldest first."""


class Aliases(Model):
    stable: str | None
    canary: str | None
    previous: str | None
    history: list[AliasMove]
    """Oldest first."""


class Routing(Model):
    table: RoutingTable
    replicas: list[Replica]


class AuditRows(Model):
    records: list[dict[str, Any]]
    """Oldest first."""


class RolledBack(Model):
    stable: str
    """The adapter that answers again."""


# --- what they do -----------------------------------------------------------------------------------------------------


def _adapters(desk: Desk, _key: ApiKey | None, _asked: Nothing) -> Adapters:
    return Adapters(adapters=desk.registry.adapters())


def _adapter(desk: Desk, _key: ApiKey | None, asked: OfAdapter) -> AdapterView:
    record = desk.registry.adapter(asked.adapter)
    found, rollouts = desk.registry.attestations(record.id), desk.registry.rollouts(record.id)
    return AdapterView(adapter=record, manifest=record.manifest, attestations=found, rollouts=rollouts)


def _card(desk: Desk, _key: ApiKey | None, asked: OfAdapter) -> Card:
    return card_of(desk.registry, asked.adapter)


def _register(desk: Desk, key: ApiKey, asked: NewAdapter) -> AdapterRecord:
    return desk.registry.register_stored(asked.adapter, key.owner)


def _approve_adapter(desk: Desk, key: ApiKey, asked: OfAdapter) -> RolloutRecord:
    return approval.approve(desk.registry, desk.settings, asked.adapter, key)


def _override(desk: Desk, key: ApiKey, asked: Override) -> AdapterRecord:
    record = desk.registry.adapter(asked.adapter)
    overrides.override(desk.registry, record.id, asked.gate, asked.reason, key, two_people=desk.settings.two_people)
    return desk.registry.adapter(record.id)


def _rollouts(desk: Desk, _key: ApiKey | None, _asked: Nothing) -> Rollouts:
    return Rollouts(rollouts=desk.registry.rollouts())


def _rollout(desk: Desk, _key: ApiKey | None, asked: OfRollout) -> RolloutRecord:
    return desk.registry.rollout(asked.rollout)


def _approve(desk: Desk, key: ApiKey, asked: OfRollout) -> RolloutRecord:
    record = desk.registry.rollout(asked.rollout)
    return approval.approve(desk.registry, desk.settings, record.adapter, key, record.id)


def _stop(desk: Desk, key: ApiKey, asked: Stop) -> RolloutRecord:
    reason = audit.reason(asked.reason)
    return approval.stop(desk.registry, reason, key, None if asked.rollout == RUNNING else asked.rollout)


def _aliases(desk: Desk, _key: ApiKey | None, asked: Last) -> Aliases:
    return Aliases.model_validate(desk.registry.aliases(asked.limit, asked.before))


def _rollback(desk: Desk, key: ApiKey, asked: Rollback) -> RolledBack:
    key.require("adapters:promote")
    reason = audit.reason(asked.reason)
    return RolledBack(stable=desk.registry.rollback(key.owner, reason, desk.registry.adapter(asked.expect).id))


def _routing(desk: Desk, _key: ApiKey | None, _asked: Nothing) -> Routing:
    return Routing(table=desk.registry.routing(), replicas=desk.registry.replicas())


def _audit(desk: Desk, _key: ApiKey | None, asked: Last) -> AuditRows:
    return AuditRows(records=audit.tail(desk.database, asked.limit, asked.before))


@dataclass(frozen=True)
class Operation:
    """`run(desk, key, asked)`; the key is None only where somebody reads the registry's database itself."""

    method: Literal["GET", "POST"]
    path: str
    """Below PREFIX. Its parts in braces are fields of `asks`; the others are the query's, or the body's of a POST."""
    scope: Scope
    run: Callable[..., BaseModel]
    asks: type[Model]
    gives: type[BaseModel]

    @property
    def parts(self) -> tuple[str, ...]:
        """The fields that stand in the path."""
        return tuple(name for name in self.asks.model_fields if f"{{{name}}}" in self.path)


LIST_ADAPTERS = Operation("GET", "/adapters", READ, _adapters, Nothing, Adapters)
REGISTER = Operation("POST", "/adapters", "adapters:write", _register, NewAdapter, AdapterRecord)
SHOW_ADAPTER = Operation("GET", "/adapters/{adapter}", READ, _adapter, OfAdapter, AdapterView)
SHOW_CARD = Operation("GET", "/adapters/{adapter}/card", READ, _card, OfAdapter, Card)
APPROVE_ADAPTER = Operation("POST", "/adapters/{adapter}/approve", "adapters:promote", _approve_adapter, OfAdapter, RolloutRecord)
OVERRIDE = Operation("POST", "/adapters/{adapter}/override", overrides.SCOPE, _override, Override, AdapterRecord)
ALIASES = Operation("GET", "/aliases", READ, _aliases, Last, Aliases)
ROLLBACK = Operation("POST", "/aliases/rollback", "adapters:promote", _rollback, Rollback, RolledBack)
LIST_ROLLOUTS = Operation("GET", "/rollouts", READ, _rollouts, Nothing, Rollouts)
SHOW_ROLLOUT = Operation("GET", "/rollouts/{rollout}", READ, _rollout, OfRollout, RolloutRecord)
APPROVE = Operation("POST", "/rollouts/{rollout}/approve", "adapters:promote", _approve, OfRollout, RolloutRecord)
STOP = Operation("POST", "/rollouts/{rollout}/stop", "adapters:promote", _stop, Stop, RolloutRecord)
ROUTING = Operation("GET", "/routing", READ, _routing, Nothing, Routing)
AUDIT = Operation("GET", "/audit", "audit", _audit, Last, AuditRows)

OPERATIONS = (
    LIST_ADAPTERS,
    REGISTER,
    SHOW_ADAPTER,
    SHOW_CARD,
    APPROVE_ADAPTER,
    OVERRIDE,
    ALIASES,
    ROLLBACK,
    LIST_ROLLOUTS,
    SHOW_ROLLOUT,
    APPROVE,
    STOP,
    ROUTING,
    AUDIT,
)
