"""Six bugs that the history checker has to catch, each as a small subclass of what it breaks."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from feedback.archive import Archive
from feedback.events import ConsentWithdrawn, Event, FeedbackGiven, InteractionStarted, StartedText, SubjectErased
from feedback.log import Position, Record
from feedback.partitions import SqliteLogs
from feedback.sqlite_log import SqliteLog
from feedback.stores import Stores
from feedback.tokens import Claims
from serving.chat import Gateway
from serving.record import Recorder
from serving.standing import Standing, Standings

LATE_S = 0.3


def _nothing(_: Any) -> None:
    return None


@dataclass(frozen=True)
class Bug:
    """What is done to the parts before they run."""

    stores: Callable[[Stores], None] = _nothing
    """To a gateway's stores."""
    gateway: Callable[[Gateway], None] = _nothing
    archive: Callable[[Path], None] = _nothing
    """To the file of a new archive."""
    reader: Callable[[SqliteLogs], SqliteLogs] = lambda logs: logs
    """To what the archive reads."""
    lagging: bool = False
    """Every second snapshot is built from another archive, which is not brought up to date first."""


class HastyLog:
    """Acknowledges before it writes."""

    def __init__(self, log: SqliteLog) -> None:
        self._log = log
        self._writing: set[asyncio.Task[None]] = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._log, name)

    async def append(self, events: Sequence[Event]) -> list[Event]:
        stamped = [event.model_copy(update={"stamp": self._log.clock.tick(event.stamp)}) for event in events]
        task = asyncio.create_task(self._write(stamped))
        self._writing.add(task)
        task.add_done_callback(self._writing.discard)
        return stamped

    async def _write(self, events: Sequence[Event]) -> None:
        await asyncio.sleep(LATE_S)
        await self._log.append(events)


class OneSided(Recorder):
    """Records the first side of a comparison only."""

    async def begin(self, started: Sequence[InteractionStarted], text: StartedText) -> bool:
        return await super().begin(started[:1], text)


class Deaf(SqliteLogs):
    """Does not hear that somebody is erased or has withdrawn."""

    def read(self, position: Position, limit: int) -> list[Record]:
        records = super().read(position, limit)
        gone = (SubjectErased, ConsentWithdrawn)
        return [Record(r.partition, r.offset, None, r.value) if isinstance(r.event, gone) else r for r in records]


class ByArrival(Standings):
    """Takes for the last word what lies last in the partition of its own gateway, and not what has the greatest stamp."""

    own = ""

    def of(self, claims: Claims) -> Standing:
        standing = super().of(claims)
        paths = sorted(self._logs.partitions(), key=lambda path: path.stem == self.own)
        events = [record.event for path in paths for record in SqliteLogs.read(_Only(path), {}, 1_000_000) if record.event]
        given = dict(standing.given)
        for event in events:
            if isinstance(event, FeedbackGiven) and (event.target, event.rater) == (claims.target, claims.subject):
                given[event.slot] = event
        return replace(standing, given=given)


class _Only(SqliteLogs):
    """One partition."""

    def __init__(self, path: Path) -> None:
        super().__init__(path.parent)
        self._path = path

    def partitions(self) -> list[Path]:
        return [self._path]


def hasten(stores: Stores) -> None:
    stores.log = HastyLog(stores.log)  # type: ignore[assignment]


def drop_sides(gateway: Gateway) -> None:
    gateway.recorder.__class__ = OneSided


def fold_by_arrival(gateway: Gateway) -> None:
    gateway.standings.__class__ = ByArrival
    gateway.standings.own = gateway.stores.log.partition  # type: ignore[attr-defined]


def without_key(path: Path) -> None:
    """The archive's table of events takes an event as often as it comes."""
    Archive(path).close()
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.executescript("CREATE TABLE loose AS SELECT * FROM events WHERE 0; DROP TABLE events; ALTER TABLE loose RENAME TO events;")


BUGS = {
    "lost write": Bug(stores=hasten),
    "duplicate": Bug(archive=without_key),
    "aborted read": Bug(reader=lambda logs: Deaf(logs.folder)),
    "half a comparison": Bug(gateway=drop_sides),
    "stale snapshot": Bug(lagging=True),
    "split brain": Bug(gateway=fold_by_arrival),
}
