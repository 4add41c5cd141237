"""What the registry hands out: adapters, what was found out about them, and their rollouts."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, JsonValue

from deploy.manifest import Manifest, read_manifest
from feedback.events import Model

Alias = Literal["stable", "canary", "previous"]
State = Literal["candidate", "refused", "canary", "stable", "retired"]


class AdapterRecord(Model):
    """A registered adapter."""

    id: str
    path: Path
    kind: str
    temperature: float
    state: State
    registered_by: str
    registered_ms: int
    reason: str
    """Why it is in this state."""
    manifest_json: dict[str, JsonValue] | None = Field(default=None, exclude=True, repr=False)
    """None where it was registered before the registry kept manifests."""

    @property
    def manifest(self) -> Manifest:
        """What it is. Raises NotFound and Conflict as `read_manifest` does, where only its folder knows."""
        return read_manifest(self.path) if self.manifest_json is None else Manifest.model_validate(self.manifest_json)


class Attestation(Model):
    """Something found out about an adapter after it was made."""

    id: str
    adapter: str
    kind: str
    body: dict[str, JsonValue]
    actor: str
    at_ms: int


class AliasMove(Model):
    """One alias pointed elsewhere, or at nothing."""

    id: int
    name: Alias
    before: str | None
    after: str | None
    actor: str
    reason: str
    at_ms: int
    event_id: str | None
    """The event that tells of it; None where an older version moved it."""


class Replica(Model):
    """A model server and what it holds."""

    replica: str
    names: list[str]
    at_ms: int
    """When it last said so."""
    lives: bool
    """Whether that was recent enough; routes go by living replicas only."""


class RolloutRecord(Model):
    """One adapter's way from candidate to stable, or to its end."""

    id: str
    adapter: str
    stable: str
    """What it is compared with: stable when it began."""
    number: int
    """It would be the i-th canary ever; the win test's threshold grows with it."""
    state: str
    weight: float
    salt: str
    started_ms: int
    canary_ms: int | None
    reason: str
    verdicts: list[dict[str, JsonValue]]
    approved_by: str | None
    since_ms: int | None = None
    """When it came to its state and weight."""
    error_ms: int | None = None
    """Since when it cannot be judged, look after look; None while it can."""
