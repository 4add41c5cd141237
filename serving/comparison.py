"""Two answers side by side: who is compared with whom, and deltas that leave in lock-step."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, Protocol, TypeVar

from deploy.routing import AdapterRef, RoutingTable, assign
from feedback.events import Arm, Side


@dataclass(frozen=True)
class Seat:
    """Which adapter gives one choice of a reply, and why."""

    ref: AdapterRef
    name: str
    """What the engine calls it."""
    arm: Arm
    rollout: str | None
    propensity: float
    """The probability that this adapter was given this place."""
    side: Side | None = None


def seats(subject: str, table: RoutingTable, choices: int, compare: bool, chance: random.Random) -> list[Seat]:
    """One seat a choice. Without `compare` all are of the person's arm; with it they are sides a and b of a comparison.

    People of the canary's and the baseline's arms compare stable with the canary, sides drawn at random; stable then goes by the
    baseline's name, whose cache is as young as the canary's. Everybody else compares two samples of stable.
    """
    mine = assign(subject, table)
    if not compare:
        return [Seat(mine.adapter, mine.name, mine.arm, mine.rollout, mine.propensity) for _ in range(choices)]
    if table.canary is None or mine.arm == "stable":
        return [Seat(table.stable, table.stable.name, "stable", mine.rollout, 1.0, side) for side in ("a", "b")]
    rollout = table.rollout
    old = Seat(table.stable, table.baseline_name or table.stable.name, "baseline", rollout, 0.5)
    new = Seat(table.canary, table.canary.name, "canary", rollout, 0.5)
    first, second = (old, new) if chance.random() < 0.5 else (new, old)
    return [replace(first, side="a"), replace(second, side="b")]


class Talker(Protocol):
    """What says one thing after the other, then None."""

    async def next(self) -> dict[str, Any] | None: ...


T = TypeVar("T", bound=Talker)


class Round(list[tuple[T, dict[str, Any]]], Generic[T]):
    """What everybody who still talks said next."""


async def lockstep(talkers: Sequence[T]) -> AsyncIterator[Round[T]]:
    """Rounds of one chunk from each talker that still goes on, in their order.

    A round leaves when the slowest has spoken, so that when a chunk comes says nothing about whose it is. With one talker it is
    a plain relay.
    """
    going = list(talkers)
    while going:
        said = await asyncio.gather(*(talker.next() for talker in going)) if len(going) > 1 else [await going[0].next()]
        spoken = Round((talker, choice) for talker, choice in zip(going, said, strict=True) if choice is not None)
        going = [talker for talker, choice in zip(going, said, strict=True) if choice is not None]
        if spoken:
            yield spoken
