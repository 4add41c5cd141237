"""Events of every version that was ever stored are read by today's code; those of a version to come are set aside and counted."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import jsonschema
import pytest
from feedback_world import rating
from golden_world import FOLDER, golden_stores, one_of_each, put

from feedback import snapshot
from feedback.archive import Archive
from feedback.errors import ConfigError
from feedback.events import SCHEMA_VERSION, TYPES, FeedbackText, decode, encode, json_schema
from feedback.fold import fold
from feedback.sqlite_log import parse
from feedback.stores import Stores

HELD = {
    ("pair", "anna", "choice"): "choice 2",
    ("alone", "ben", "rating"): "thumb",
    ("alone", "ben", "correction"): "correction",
    ("alone", "ben", "signal"): "cleared",
    ("withdrawn", "carl", "rating"): "thumb of carl",
    ("erased", "dora", "rating"): "thumb of dora",
}
DIGESTS = dict.fromkeys((1, 2), "783298fc50e014dbb69dbd03f5be871fe26eb979afe0424590aba6382c6f9538")
"""The snapshot of each golden file. One that changes needs a new `snapshot.ROW_VERSION`, because it names another set."""


def golden(version: int) -> list[bytes]:
    return (FOLDER / f"v{version}.jsonl").read_bytes().splitlines()


@pytest.fixture
def stores(tmp_path: Path) -> Iterator[Stores]:
    stores = golden_stores(tmp_path)
    yield stores
    stores.close()


def test_there_is_a_golden_file_of_every_version_with_every_type() -> None:
    assert sorted(path.name for path in FOLDER.iterdir()) == [f"v{version}.jsonl" for version in range(1, SCHEMA_VERSION + 1)]
    for version in range(1, SCHEMA_VERSION + 1):
        events = [json.loads(line) for line in golden(version)]
        assert {event["schema_version"] for event in events} == {version}
    assert {decode(line).type for line in golden(SCHEMA_VERSION)} == TYPES


def test_todays_version_writes_the_golden_bytes() -> None:
    # Whoever adds, drops or renames a field breaks this: it needs the next schema_version and a golden file of it.
    for line in golden(SCHEMA_VERSION):
        assert encode(decode(line)) == line


@pytest.mark.parametrize("version", range(1, SCHEMA_VERSION + 1))
def test_a_golden_file_gives_the_same_fold_and_the_same_snapshot(stores: Stores, version: int) -> None:
    put(stores, golden(version))
    events = [decode(line) for line in golden(version)]
    assert {cell: event.event_id for cell, event in fold(events).items()} == HELD
    assert stores.ingest() == len(events)
    # Dora was erased: her question, answer and thumb are gone. Carl withdrew: kept, and not in the snapshot.
    assert [event.event_id for event in stores.archive.current()] == ["choice 2", "correction", "thumb", "thumb of carl"]
    taken = snapshot.build(stores.archive, stores.subjects, stores.settings.feedback.data_dir / "snapshots")
    assert [(row.event_id, row.answer_a, row.outcome) for row in taken.rows] == [
        ("choice 2", "With a knife.", "b"),
        ("thumb", "Slowly.", "down"),
    ]
    assert taken.digest == DIGESTS[version]
    correction = next(event for event in stores.archive.current() if event.event_id == "correction")
    assert correction.sealed and stores.subjects.open(correction.sealed, FeedbackText).correction == "Halve it."


def test_a_version_to_come_is_set_aside_and_the_rest_goes_on(stores: Stores) -> None:
    known = encode(rating("alone", "ben", "up", event_id="known", stamp=5))
    newer = json.loads(known) | {"event_id": "newer", "schema_version": SCHEMA_VERSION + 1}
    fielded = json.loads(known) | {"event_id": "fielded", "mood": "good"}
    kind = json.loads(known) | {"event_id": "kind", "type": "feedback.sung"}
    put(stores, [json.dumps(each).encode() for each in (newer, fielded, kind)] + [b"\x00 torn", known])
    assert stores.ingest() == 1 and stores.archive.counts()["poison"] == 4
    assert [event.event_id for event in stores.archive.current()] == ["known"]
    assert stores.ingest() == 0 and stores.archive.counts()["poison"] == 4
    # What the first line says in fields that this code knows may mean something else there, so it is not taken for a rating.
    assert parse(json.dumps(newer).encode()) is None


def test_what_was_set_aside_counts_after_the_upgrade_and_a_downgrade_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "archive.sqlite"
    Archive(path).close()
    with sqlite3.connect(path) as db:  # as an older reader left it
        db.execute("INSERT INTO poison VALUES ('old', 1, ?)", (encode(rating("alone", "ben", "up", event_id="late", stamp=5)),))
        db.execute("INSERT INTO poison VALUES ('old', 2, ?)", (b"\x00 torn",))
        db.execute("UPDATE facts SET value = ? WHERE name = 'schema_version'", (SCHEMA_VERSION - 1,))
    db.close()
    archive = Archive(path)
    assert [event.event_id for event in archive.current()] == ["late"] and archive.counts()["poison"] == 1
    archive.close()
    with sqlite3.connect(path) as db:
        db.execute("UPDATE facts SET value = ? WHERE name = 'schema_version'", (SCHEMA_VERSION + 1,))
    db.close()
    with pytest.raises(ConfigError, match="install the newer version"):
        Archive(path)


def test_the_schema_takes_every_event_and_refuses_others(stores: Stores) -> None:
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    check = jsonschema.Draft202012Validator(schema)
    values = [json.loads(encode(event)) for event in one_of_each(stores)] + [json.loads(line) for line in golden(1)]
    assert {value["type"] for value in values} == TYPES
    assert [list(check.iter_errors(value)) for value in values] == [[]] * len(values)
    thumb = next(value for value in values if value["event_id"] == "thumb")
    for wrong in ({"slot": "mood"}, {"type": "feedback.sung"}, {"schema_version": SCHEMA_VERSION + 1}, {"extra": 1}, {"stamp": "now"}):
        assert list(check.iter_errors(thumb | wrong))
