"""For `erase.py`: where copies of what people said lie beside the data folder, and what can be made from them.

Exports, backups, Kafka's segments, an archive made from the topic, what waits for Kafka and what it did not take.
"""

from __future__ import annotations

import re
import shutil
import sqlite3
from collections.abc import Collection, Iterator, Mapping
from contextlib import closing, suppress
from pathlib import Path

from benchmarks.canaries import Person, Search
from benchmarks.erase_world import FORMS, Place
from feedback import outbox
from feedback.archive import Archive
from feedback.clock import HybridClock
from feedback.events import SubjectErased
from feedback.kafka_log import KafkaLog
from feedback.log import EventReader, Position, Record

NAMED = re.compile(rb'"(?:subject|rater)":"(s_[0-9a-f]{32})"')
ERASED = re.compile(rb'"type":"subject\.erased","subject":"(s_[0-9a-f]{32})"')

Hits = Mapping[str, list[str]]


def inside(hits: Hits, *folders: Path) -> dict[str, list[str]]:
    """What of the hits lies in these folders."""
    found = {name: [each for each in where if any(each.startswith(f"{folder}/") for folder in folders)] for name, where in hits.items()}
    return {name: where for name, where in found.items() if where}


def in_every_form(search: Search, folder: Path, people: Collection[Person]) -> int:
    """How many of the people are found in the exported file of every form."""
    found = search.found([folder], people)
    return sum(
        all(any(each.startswith(str(folder / name)) for each in found.get(person.name, [])) for name in FORMS.values()) for person in people
    )


def holding(search: Search, place: Place, person: Person) -> set[Path]:
    """The files that were exported before and hold this person, by brute force."""
    folders = [place.root / "exported", place.root / "exported-named"]
    where = search.found(folders, [person]).get(person.name, [])
    return {path for folder in folders for path in folder.iterdir() if any(each.startswith(str(path)) for each in where)}


def restored(place: Place, name: str, *lists: Path, kafka: bool = False) -> Path:
    """The backup from before the erasures, brought back on a machine that has nothing but lists of erasures, or Kafka's topic."""
    given = [word for path in lists for word in ("--erased", str(path))]
    settings = place.settings(name, kafka)
    place.command("restore", str(place.root / "backup"), "--key", place.keys["data"], *given, settings=settings)
    return place.root / name


def replaced(place: Place) -> Path:
    """The same in the place of the data folder itself, which knows of the erasures."""
    place.command("restore", str(place.root / "backup"), "--replace", "--key", place.keys["data"])
    return place.data


class Forgetful:
    """The topic as a reader sees it that does not know erasures."""

    def __init__(self, log: EventReader) -> None:
        self._log = log

    def read(self, position: Position, limit: int) -> list[Record]:
        return [record for record in self._log.read(position, limit) if not isinstance(record.event, SubjectErased)]


def from_topic(place: Place, name: str, *, forgetful: bool = False) -> Path:
    """An archive that is made from the topic alone, after the one that there was is lost."""
    log, archive = KafkaLog(place.kafka, HybridClock()), Archive(place.root / name / "archive.sqlite")
    try:
        archive.ingest(Forgetful(log) if forgetful else log)
    finally:
        archive.close()
        log.close()
    return place.root / name


def old_keys(place: Place) -> Path:
    """Everybody's keys as they were before: what somebody has who took a copy of them."""
    folder = place.root / "thief"
    folder.mkdir()
    for name in ("registry.sqlite", "registry.sqlite-wal"):
        with suppress(FileNotFoundError):
            shutil.copy(place.root / "before" / name, folder)
    return folder


def in_segments(place: Place) -> tuple[set[str], set[str]]:
    """Whose pseudonyms stand in the topic's segments, and whose erasures."""
    named: set[str] = set()
    erased: set[str] = set()
    for path in (place.root / "kafka" / "data").glob(f"{place.kafka.topic}-*/*.log"):
        data = path.read_bytes()
        named |= {found.decode() for found in NAMED.findall(data)}
        erased |= {found.decode() for found in ERASED.findall(data)}
    return named, erased


def waiting(place: Place) -> set[str]:
    """Whose rows wait for Kafka; the erasures themselves do not count."""
    return _in_partitions(place.data, f"SELECT value FROM events WHERE sent = {outbox.WAITS}")


def dead(place: Place) -> set[str]:
    """Whose rows Kafka did not take."""
    return _in_partitions(place.data, "SELECT value FROM events JOIN dead_letters USING (offset)")


def counted(place: Place) -> set[str]:
    """Of whom a row of `limits.sqlite` names an answer."""
    with closing(sqlite3.connect(f"file:{place.data / 'limits.sqlite'}?mode=ro", uri=True, timeout=10)) as db:
        rows = db.execute("SELECT who FROM used WHERE setting = 'changes' AND who NOT LIKE '% themselves'")
        return {str(row[0]).partition(" ")[0] for row in rows}


def left_in_pages(place: Place) -> set[str]:
    """The same in the bytes of the file and of its write-ahead log, whether a row holds them or not."""
    data = b"".join(path.read_bytes() for path in sorted(place.data.glob("limits.sqlite*")))
    return {found.decode() for found in re.findall(rb"(s_[0-9a-f]{32}) [0-9a-f]{8}-", data)}


def differing(place: Place, made: Path) -> set[str]:
    """The ids of events that only one of the two archives holds; what Kafka did not take cannot be in the made one."""
    one, other = (set(_rows(folder / "archive.sqlite", "SELECT event_id FROM events")) for folder in (place.data, made))
    letters = {letter.event_id for letter in outbox.dead_letters(sorted((place.data / "log").glob("*.sqlite")))}
    return {str(each) for each in (one ^ other)} - letters


def _in_partitions(data: Path, query: str) -> set[str]:
    values = [value for path in sorted((data / "log").glob("*.sqlite")) for value in _rows(path, query)]
    texts = [value for value in values if isinstance(value, bytes) and not ERASED.search(value)]
    return {found.decode() for text in texts for found in NAMED.findall(text)}


def _rows(path: Path, query: str) -> Iterator[object]:
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=10)) as db:
        yield from (row[0] for row in db.execute(query))
