"""Which adapter answers whom: the routing table, and the arm that a person is in."""

from __future__ import annotations

import hashlib

from pydantic import BaseModel, ConfigDict

from deploy.manifest import vllm_name
from feedback.events import Arm


class AdapterRef(BaseModel):
    """An adapter as a gateway needs it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    adapter: str
    """Its id, 64 hex digits."""
    temperature: float
    """The default of requests that name none."""

    @property
    def name(self) -> str:
        """What the model server calls it."""
        return vllm_name(self.adapter)


class RoutingTable(BaseModel):
    """What the registry's database says now; gateways read it every 200 ms."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: int
    """Grows with every change."""
    stable: AdapterRef
    previous: AdapterRef | None = None
    canary: AdapterRef | None = None
    rollout: str | None = None
    """The rollout that the canary belongs to."""
    weight: float = 0.0
    """Share of users on the canary; as many are the baseline."""
    salt: str = ""
    """New for every rollout, so that the same people are not the canary's every time."""

    @property
    def baseline_name(self) -> str | None:
        """What the server calls stable's weights for the baseline arm."""
        return vllm_name(self.stable.adapter, self.rollout) if self.rollout else None

    def without_canary(self) -> RoutingTable:
        """What a gateway goes by while it cannot read the table: stable only."""
        return self.model_copy(update={"canary": None, "rollout": None, "weight": 0.0})


class Assignment(BaseModel):
    """Which arm somebody is in, and what answers there."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    arm: Arm
    adapter: AdapterRef
    name: str
    rollout: str | None = None
    propensity: float
    """The probability with which a person is given this arm."""


def position(subject: str, salt: str) -> float:
    """Where in [0, 1) a person lies: the same place for the whole rollout, another one in the next."""
    digest = hashlib.sha256(f"{salt}\0{subject}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def assign(subject: str, table: RoutingTable) -> Assignment:
    """People in [0, w) get the canary, in [1 - w, 1) the baseline, the rest stable."""
    weight = table.weight
    if table.canary is None or table.rollout is None or weight <= 0:
        return Assignment(arm="stable", adapter=table.stable, name=table.stable.name, propensity=1.0)
    place = position(subject, table.salt)
    if place < weight:
        return Assignment(arm="canary", adapter=table.canary, name=table.canary.name, rollout=table.rollout, propensity=weight)
    if place >= 1 - weight:
        name = vllm_name(table.stable.adapter, table.rollout)
        return Assignment(arm="baseline", adapter=table.stable, name=name, rollout=table.rollout, propensity=weight)
    return Assignment(arm="stable", adapter=table.stable, name=table.stable.name, rollout=table.rollout, propensity=1 - 2 * weight)
