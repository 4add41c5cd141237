"""What a data folder holds, in figures: `plaudit feedback stats`. Reads beside the running processes and changes nothing."""

from __future__ import annotations

import contextlib
import sqlite3

from feedback import outbox
from feedback.clock import stamp_ms
from feedback.errors import NotDurable
from feedback.events import Model
from feedback.stores import Stores

HELD = """
SELECT json_extract(CAST(e.value AS TEXT), '$.slot'), coalesce(json_extract(CAST(e.value AS TEXT), '$.value'), 'text'), count(*)
FROM said s JOIN events e USING (event_id) WHERE s.cleared = 0 GROUP BY 1, 2 ORDER BY 1, 2
"""
SOURCES = """
SELECT json_extract(CAST(e.value AS TEXT), '$.source'), count(*)
FROM said s JOIN events e USING (event_id) WHERE s.cleared = 0 GROUP BY 1 ORDER BY 1
"""
COHORTS = """
SELECT c.value, count(*) FROM events e, json_each(CAST(e.value AS TEXT), '$.cohorts') c
WHERE e.type = 'interaction.started' GROUP BY 1 ORDER BY 1
"""


class Statistics(Model):
    """Figures of one data folder."""

    events: dict[str, int]
    """In the archive, by type."""
    held: dict[str, dict[str, int]]
    """Opinions held now: slot -> value -> how many; what is only written counts as `text`."""
    raters: int
    """People who hold an opinion."""
    sources: dict[str, int]
    """Opinions held now, by where they come from."""
    cohorts: dict[str, int]
    """Interactions, by the tags that applications gave."""
    oldest_ms: int | None
    newest_ms: int | None
    """Unix milliseconds of the oldest and the newest event."""
    poison: int
    """Stored bytes that are no event which this version knows."""
    unsent: int | None
    """Events that wait for Kafka; None where no Kafka is set."""
    dead_letters: int
    """Events that Kafka will never take."""


def statistics(stores: Stores) -> Statistics:
    """Count. Raises NotDurable where a file cannot be read."""
    path = stores.archive.path
    try:
        with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=5.0)) as db:
            held: dict[str, dict[str, int]] = {}
            for slot, value, count in db.execute(HELD):
                held.setdefault(slot, {})[value] = count
            oldest, newest = db.execute("SELECT min(stamp), max(stamp) FROM events WHERE stamp > 0").fetchone()
            found = {
                "events": dict(db.execute("SELECT type, count(*) FROM events GROUP BY type")),
                "held": held,
                "raters": db.execute("SELECT count(DISTINCT rater) FROM said WHERE cleared = 0").fetchone()[0],
                "sources": dict(db.execute(SOURCES)),
                "cohorts": dict(db.execute(COHORTS)),
                "oldest_ms": stamp_ms(oldest) if oldest else None,
                "newest_ms": stamp_ms(newest) if newest else None,
                "poison": db.execute("SELECT count(*) FROM poison").fetchone()[0],
            }
    except sqlite3.Error as exc:
        raise NotDurable(f"{path} cannot be read: {exc}", retry_after_s=2) from exc
    partitions = stores.logs.partitions()
    unsent = outbox.count(partitions, outbox.WAITS) if stores.settings.kafka.bootstrap is not None else None
    return Statistics.model_validate(found | {"unsent": unsent, "dead_letters": outbox.count(partitions, outbox.DEAD)})
