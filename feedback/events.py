"""What can happen, and the only place where a field of an event is named.

SQLite columns, Kafka values, API bodies and Parquet columns are rendered from these classes. An event is a fact: it is
never changed, only followed by another one. Everything derived from what a person wrote or read travels in a `Sealed`
box under that person's key (`feedback/subjects.py`), so that destroying the key erases it wherever a copy lies.

`stamp` is a hybrid logical clock (`feedback/clock.py`), given by the log at commit; 0 means "not committed yet".
"""

from __future__ import annotations

import os
import time
import uuid
from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, JsonValue, TypeAdapter

SCHEMA_VERSION = 2

Arm = Literal["stable", "canary", "baseline"]
Side = Literal["a", "b"]
Slot = Literal["rating", "choice", "comment", "correction", "signal"]
Source = Literal["person", "simulated", "import"]


def new_id(unix_ms: int | None = None) -> str:
    """A UUIDv7 (RFC 9562): sortable by its milliseconds, 74 random bits."""
    ms = time.time_ns() // 1_000_000 if unix_ms is None else unix_ms
    random = int.from_bytes(os.urandom(10), "big")
    value = (ms & (2**48 - 1)) << 80 | 0x7 << 76 | (random >> 62 & 0xFFF) << 64 | 0b10 << 62 | random & (2**62 - 1)
    return str(uuid.UUID(int=value))


class Model(BaseModel):
    """Frozen, and an unknown field is an error. What stands under a field is its description in `json_schema`."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Sealed(Model):
    """AES-GCM box. Which classes go in: `StartedText`, `FinishedText`, `FeedbackText`."""

    subjects: tuple[str, ...]
    """Whose keys open it, outermost first; a correction needs two."""
    box: str
    """Base64 of nonce and ciphertext."""


class StartedText(Model):
    """What the person asked."""

    messages: list[dict[str, JsonValue]]
    tools: list[dict[str, JsonValue]] = []
    metadata: dict[str, str] = {}


class FinishedText(Model):
    """What the person read."""

    answer: str
    tool_calls: list[dict[str, JsonValue]] = []
    token_ids: list[int] = []
    logprobs: list[float] = []


class FeedbackText(Model):
    """What the person wrote about it."""

    comment: str | None = None
    correction: str | None = None


class EventBase(Model):
    event_id: str
    schema_version: int = Field(default=SCHEMA_VERSION, ge=1, le=SCHEMA_VERSION)
    """A newer one is no event that this code knows: it may mean something else by the same field."""
    stamp: int = 0
    tenant: str = "default"


class InteractionStarted(EventBase):
    type: Literal["interaction.started"] = "interaction.started"
    interaction_id: str
    subject: str
    """Keyed pseudonym of the person."""
    subject_kind: Literal["named", "session", "single"]
    """`single` was drawn for this interaction alone and counts in no per-person statistic."""
    cohorts: tuple[str, ...] = ()
    source: Source = "person"
    comparison_id: str | None = None
    side: Side | None = None
    model: str
    """The alias that was asked for."""
    adapter: str
    """SHA-256 of the adapter's manifest, 64 hex digits; empty for imported pairs."""
    arm: Arm = "stable"
    rollout: str | None = None
    propensity: float = 1.0
    sampling: dict[str, JsonValue] = {}
    key_id: str | None = None
    sealed: Sealed | None = None


class InteractionFinished(EventBase):
    type: Literal["interaction.finished"] = "interaction.finished"
    interaction_id: str
    subject: str
    finish_reason: str
    """`stop`, `length`, `tool_calls`, or what broke it off: `error`, `client_closed`."""
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    first_token_ms: float | None = None
    total_ms: float | None = None
    sealed: Sealed | None = None


class InteractionScored(EventBase):
    type: Literal["interaction.scored"] = "interaction.scored"
    interaction_id: str
    reward_model: str
    score: float


class FeedbackGiven(EventBase):
    type: Literal["feedback.given"] = "feedback.given"
    target: str
    """An interaction's id, or a comparison's for the slot `choice`."""
    rater: str
    slot: Slot
    value: str | None = None
    reasons: tuple[str, ...] = ()
    source: Source = "person"
    idempotency: str | None = None
    """Keyed hash of tenant, rater, slot and Idempotency-Key: the same one with another body is refused."""
    sealed: Sealed | None = None


class FeedbackCleared(EventBase):
    type: Literal["feedback.cleared"] = "feedback.cleared"
    target: str
    rater: str
    slot: Slot
    idempotency: str | None = None


class ConsentWithdrawn(EventBase):
    type: Literal["consent.withdrawn"] = "consent.withdrawn"
    subject: str


class SubjectErased(EventBase):
    type: Literal["subject.erased"] = "subject.erased"
    subject: str


class AdapterEvent(EventBase):
    type: Literal["adapter.registered", "adapter.attested", "adapter.aliased", "adapter.unaliased", "adapter.retired"]
    adapter: str
    """With `adapter.unaliased`: what the alias pointed at; it points at nothing now."""
    actor: str
    alias: str | None = None
    detail: dict[str, JsonValue] = {}


class RolloutEvent(EventBase):
    type: Literal["rollout.started", "rollout.stepped", "rollout.judged", "rollout.approved", "rollout.ended"]
    rollout: str
    adapter: str
    actor: str
    detail: dict[str, JsonValue] = {}


Event = (
    InteractionStarted
    | InteractionFinished
    | InteractionScored
    | FeedbackGiven
    | FeedbackCleared
    | ConsentWithdrawn
    | SubjectErased
    | AdapterEvent
    | RolloutEvent
)

TYPES = frozenset(kind for each in get_args(Event) for kind in get_args(each.model_fields["type"].annotation))
"""Every `type` there is."""

_adapter: TypeAdapter[Event] = TypeAdapter(Annotated[Event, Field(discriminator="type")])


def encode(event: Event) -> bytes:
    """The event as JSON, the form in which every log stores it."""
    return _adapter.dump_json(event, exclude_defaults=False)


def decode(value: bytes | str) -> Event:
    """The event that `encode` wrote. Raises pydantic's ValidationError, which the log's reader sets aside as poison."""
    return _adapter.validate_json(value)


def json_schema() -> dict[str, JsonValue]:
    """JSON Schema (2020-12) of what `encode` writes and has written, for other consumers of the topic. `sealed` stays closed to them."""
    schema = _adapter.json_schema(mode="validation")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "Value of an event of Plaudit", **schema}


def partition_key(event: Event) -> str:
    """What keeps its order: everything about one interaction or comparison lies in one partition."""
    for name in ("interaction_id", "target", "subject", "rollout", "adapter"):
        if value := getattr(event, name, None):
            return str(value)
    return event.event_id
