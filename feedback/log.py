"""The seam behind which events are kept: `SqliteLog` and `KafkaLog`, one contract test for both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from feedback.events import Event

Position = dict[str, int]
"""For each partition the offset of the next event to read; a partition that is not named starts at its beginning."""


@dataclass(frozen=True)
class Record:
    """One stored event and where it lies."""

    partition: str
    offset: int
    event: Event


class EventLog(Protocol):
    """An append-only set of partitions, ordered within each."""

    async def append(self, events: Sequence[Event]) -> list[Event]:
        """Commit the events together and return them with their stamps. Durable when it returns.

        An event whose `event_id` is stored already is not stored again: the stored one is returned in its place.
        Raises NotDurable where the events could not be committed, IdempotencyMismatch where the same `idempotency`
        is stored with another `event_id`.
        """

    def read(self, position: Position, limit: int) -> list[Record]:
        """At most `limit` records from `position` on, in order within each partition. Blocks on disk or network."""

    def close(self) -> None:
        """Release files and threads. Nothing durable depends on it."""
