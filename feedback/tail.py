"""Events as they arrive, one JSON line each: `plaudit feedback tail`. Sealed texts stay sealed unless `Subjects` are given to open them."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from feedback.errors import Gone, NotDurable
from feedback.events import Event, FeedbackGiven, FeedbackText, FinishedText, InteractionFinished, InteractionStarted, StartedText, encode
from feedback.log import Position
from feedback.partitions import SqliteLogs
from feedback.sqlite_log import open_to_read, read_file
from feedback.subjects import Subjects

POLL_S = 0.2
BATCH = 1_000
TEXTS: dict[str, type[BaseModel]] = {
    "interaction.started": StartedText,
    "interaction.finished": FinishedText,
    "feedback.given": FeedbackText,
}


def last(logs: SqliteLogs, count: int, kinds: Collection[str] = ()) -> tuple[list[Event], Position]:
    """The last events of all partitions by stamp, and where to read on."""
    position: Position = {}
    found: list[Event] = []
    for path in logs.partitions():
        position[path.stem] = start = _end(path)
        here: list[Event] = []
        while len(here) < count and start > 0:  # backwards, a batch at a time, until there are enough of the wanted types
            start, stop = max(0, start - BATCH), start
            events = [record.event for record in read_file(path, start, stop - start) if record.offset < stop]
            here += [event for event in events if event is not None and (not kinds or event.type in kinds)]
        found += here
    found.sort(key=lambda event: (event.stamp, event.event_id))
    return found[max(0, len(found) - count) :], position


def follow(logs: SqliteLogs, position: Position, kinds: Collection[str] = ()) -> Iterator[Event | None]:
    """Events from this position on, for ever; None whenever there is nothing new, after which it looks again."""
    while True:
        records = logs.read(position, BATCH)
        for record in records:
            position[record.partition] = record.offset + 1
            if record.event is not None and (not kinds or record.event.type in kinds):
                yield record.event
        if not records:
            yield None
            time.sleep(POLL_S)


def line(event: Event, subjects: Subjects | None = None) -> str:
    """One JSON object. With `subjects` the sealed texts stand open under `text`, null where the person was erased."""
    if subjects is None:
        return encode(event).decode()
    shown: dict[str, Any] = json.loads(encode(event))
    if isinstance(event, InteractionStarted | InteractionFinished | FeedbackGiven) and event.sealed is not None:
        del shown["sealed"]
        shown["text"] = None
        with contextlib.suppress(Gone):
            shown["text"] = subjects.open(event.sealed, TEXTS[event.type]).model_dump(mode="json", exclude_defaults=True)
    return json.dumps(shown, ensure_ascii=False)


def _end(path: Path) -> int:
    """The offset of the next event of a partition."""
    try:
        with contextlib.closing(open_to_read(path)) as db:
            return int(db.execute("SELECT coalesce(max(offset), 0) + 1 FROM events").fetchone()[0])
    except sqlite3.Error as exc:
        raise NotDurable(f"the event log {path} cannot be read: {exc}", retry_after_s=2) from exc
