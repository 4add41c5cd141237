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
    event: Event | None
    """None: these bytes are no event that this version knows. The archive sets them aside."""
    value: bytes
    """The event as stored."""


class EventReader(Protocol):
    """What the archive reads from."""

    def read(self, position: Position, limit: int) -> list[Record]:
        """At most `limit` records from `position` on, in order within each partition. Blocks on disk or network."""


class EventLog(EventReader, Protocol):
    """An append-only set of partitions, ordered within each."""

    async def append(self, events: Sequence[Event]) -> list[Event]:
        """Commit the events together and return them with their stamps. Durable when it returns.

        A stamp that an event already has is a lower bound: the new one is greater (pass a client's `version` so).
        Where the log can look it up (SQLite), an event whose `event_id` is stored is not stored again and the stored one
        is returned in its place, and IdempotencyMismatch is raised where the same `idempotency` is stored with another
        `event_id`. Kafka may hold an event twice; whoever reads de-duplicates by `event_id`.
        Raises NotDurable where the events could not be committed; then none of them counts as stored. Should the process die before
        it writes again, they may be there all the same, and whoever asks again with the same `event_id` is given those.
        """

    def close(self) -> None:
        """Release files and threads. Nothing durable depends on it."""
