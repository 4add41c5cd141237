"""Backups of running folders, and restores that lose nothing newer and bring nobody back who was erased."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import sqlite3
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from feedback_world import answered, rating, stores_in

from feedback import audit, backup, erasure, restore
from feedback.config import FeedbackSettings, KafkaSettings, Settings
from feedback.errors import ConfigError, Conflict, Gone, InvalidInput, NotDurable, NotFound
from feedback.events import Event, StartedText, encode
from feedback.log import Position, Record
from feedback.sqlite_log import SqliteLog
from feedback.stores import Stores


def settings_of(folder: Path, **kafka: Any) -> Settings:
    return Settings(feedback=FeedbackSettings(data_dir=folder), kafka=KafkaSettings(**kafka))


def ada(_: Stores) -> str:
    return "ada"


def again(stores: Stores, erasures: Mapping[str, int]) -> object:
    return erasure.replay(stores, erasures)


def restored(source: Path, folder: Path, **options: Any) -> restore.Restored:
    return restore.restore(source, settings_of(folder), ada, again, **options)


def asked(stores: Stores, interaction: str) -> str:
    """What a person asked, as the archive has it and their key opens it."""
    found = stores.archive.interaction(interaction)
    if found is None or found.started.sealed is None:
        raise Gone("not there")
    return str(stores.subjects.open(found.started.sealed, StartedText).messages[0]["content"])


@pytest.fixture
def lived(tmp_path: Path) -> Path:
    """A data folder in which Anna and Ben asked and rated, backed up in `backup`."""
    stores = stores_in(tmp_path / "data")
    for who in ("anna", "ben"):
        stores.log.append_sync([*answered(stores, f"of {who}", who, "Thin."), rating(f"of {who}", who, "up", event_id=f"{who} up")])
    stores.ingest()
    (tmp_path / "data" / "adapters" / "x").mkdir(parents=True)
    (tmp_path / "data" / "adapters" / "x" / "weights").write_bytes(b"w" * 3_000_000)
    backup.backup(stores, tmp_path / "backup", "ada")
    stores.close()
    return tmp_path / "data"


def test_a_restored_folder_is_the_one_that_was_backed_up(lived: Path, tmp_path: Path) -> None:
    done = restored(tmp_path / "backup", tmp_path / "new" / "data")
    assert (done.newer, done.erased, done.problems) == (0, (), [])
    stores = stores_in(tmp_path / "new" / "data")
    assert asked(stores, "of anna") == "How do I cut an onion?"
    assert [event.event_id for event in stores.archive.current()] == ["anna up", "ben up"]
    assert (tmp_path / "new" / "data" / "adapters" / "x" / "weights").read_bytes() == b"w" * 3_000_000
    assert stores.ingest() == 0
    stores.log.append_sync([rating("of anna", "anna", "down", event_id="after")])
    assert stores.ingest() == 1 and stores.archive.state("of anna")["anna", "rating"].event_id == "after"
    assert [row["action"] for row in audit.read(stores.engine)] == ["backup.restored"] and audit.verify(stores.engine)[1] is None
    stores.close()


def test_a_backup_is_audited_private_and_has_every_digest(lived: Path, tmp_path: Path) -> None:
    stores = stores_in(lived)
    (row,) = [row for row in audit.read(stores.engine) if row["action"] == "backup.made"]
    manifest = backup.read_manifest(tmp_path / "backup")
    assert row["subject"] == backup.manifest_digest(manifest) and row["actor"] == "ada"
    names = {
        "archive.sqlite",
        "registry.sqlite",
        "log/gateway.sqlite",
        "keys/kek",
        "keys/pseudonym",
        "keys/token.keys",
        "adapters/x/weights",
    }
    assert set(manifest.files) == names
    there = {str(path.relative_to(tmp_path / "backup")) for path in (tmp_path / "backup").rglob("*") if path.is_file()}
    assert there == names | {"backup.json"}
    assert all((tmp_path / "backup" / name).stat().st_mode & 0o77 == 0 for name in names)
    stores.close()


def test_who_was_erased_since_stays_erased_and_newer_events_stay(lived: Path, tmp_path: Path) -> None:
    stores = stores_in(lived)
    stores.log.append_sync([*answered(stores, "newer", "carl", "Thick."), rating("newer", "carl", "up", event_id="carl up")])
    stores.ingest()
    done = erasure.erase(stores, "anna", "ada", "asked")
    stores.log.append_sync(
        [*answered(stores, "back", "anna", "Again."), rating("back", "anna", "up", event_id="anna back")]
    )  # she returned
    stores.close()
    outcome = restored(tmp_path / "backup", lived, replace=True)
    assert outcome.erased == ("anna",) and outcome.problems == []
    stores = stores_in(lived)
    with pytest.raises(Gone):
        asked(stores, "of anna")
    assert stores.archive.erased("anna") == done.stamp == stores.subjects.erased("anna")
    assert (asked(stores, "of ben"), asked(stores, "newer"), asked(stores, "back")) == ("How do I cut an onion?",) * 3
    stores.ingest()
    assert [event.event_id for event in stores.archive.current()] == ["anna back", "ben up", "carl up"]
    # Her question is in no file, and the log's positions go on.
    assert not any(b"started-of anna" in path.read_bytes() for path in lived.rglob("*.sqlite*"))
    stores.log.append_sync([rating("of ben", "ben", "down", event_id="after")])
    assert stores.ingest() == 1
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    stores.close()


def test_a_list_kept_elsewhere_is_enough_where_the_folder_is_lost(lived: Path, tmp_path: Path) -> None:
    stores = stores_in(lived)
    erasure.erase(stores, "anna", "ada", "asked")
    stores.close()
    shutil.copy(lived / "erased.jsonl", tmp_path / "kept.jsonl")
    with (tmp_path / "kept.jsonl").open("a") as file:
        file.write('{"subject": "torn')
    shutil.rmtree(lived)
    assert restored(tmp_path / "backup", lived, lists=[tmp_path / "kept.jsonl"]).erased == ("anna",)
    stores = stores_in(lived)
    with pytest.raises(Gone):
        asked(stores, "of anna")
    assert asked(stores, "of ben") == "How do I cut an onion?"
    # The next restore of the same backup finds her on the list that came along.
    assert erasure.listed(lived / "erased.jsonl").keys() == {"anna"}
    stores.close()


def test_without_the_replay_she_would_be_back(lived: Path, tmp_path: Path) -> None:
    # The control: the same restore with an erasure that nobody knows of any more.
    stores = stores_in(lived)
    erasure.erase(stores, "anna", "ada", "asked")
    stores.close()
    shutil.rmtree(lived)
    assert restored(tmp_path / "backup", lived).erased == ()
    stores = stores_in(lived)
    assert asked(stores, "of anna") == "How do I cut an onion?"
    stores.close()


class Topic:
    """What `restore` reads Kafka's topic with: one partition that holds these events."""

    events: tuple[Event, ...] = ()

    def __init__(self, *_: object) -> None: ...

    def read(self, position: Position, limit: int) -> list[Record]:
        start = position.get("plaudit.events/0", 0)
        return [Record("plaudit.events/0", start + n, event, encode(event)) for n, event in enumerate(self.events[start : start + limit])]

    def close(self) -> None: ...


def test_what_kafka_has_since_comes_back_and_its_erasures_are_made(lived: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stores = stores_in(lived)
    late = stores.log.append_sync([rating("of ben", "ben", "down", event_id="late")])
    stamp = erasure.erase(stores, "anna", "ada", "asked").stamp
    erased = [record.event for record in stores.logs.read({}, 100) if record.event and record.event.type == "subject.erased"]
    Topic.events = (*late, *erased)
    stores.close()
    shutil.rmtree(lived)
    monkeypatch.setattr(restore, "KafkaLog", Topic)
    monkeypatch.setattr("feedback.stores.Relay", lambda *_, **__: None)
    monkeypatch.setattr("feedback.stores.KafkaLog", lambda *_, **__: None, raising=False)
    with_kafka = settings_of(lived, bootstrap="127.0.0.1:1")
    monkeypatch.setattr("feedback.stores.Stores.ingest", lambda self: 0)
    done = restore.restore(tmp_path / "backup", with_kafka, ada, again)
    assert (done.newer, done.erased) == (2, ("anna",))
    stores = stores_in(lived)
    assert stores.archive.state("of ben")["ben", "rating"].event_id == "late" and stores.subjects.erased("anna") == stamp
    stores.close()


def test_a_folder_of_another_deployment_gives_nothing(lived: Path, tmp_path: Path) -> None:
    stores = stores_in(tmp_path / "other")
    stores.log.append_sync([rating("of ben", "ben", "down", event_id="foreign")])
    stores.close()
    done = restored(tmp_path / "backup", tmp_path / "other", replace=True)
    assert done.newer == 0 and "another deployment" in done.problems[0]
    stores = stores_in(tmp_path / "other")
    assert stores.archive.state("of ben")["ben", "rating"].event_id == "ben up"
    stores.close()


def test_a_key_that_was_disabled_since_stays_disabled(tmp_path: Path) -> None:
    stores = stores_in(tmp_path / "data")
    key, _ = stores.api_keys.create("shop", ("chat",))
    backup.backup(stores, tmp_path / "backup", "ada")
    stores.api_keys.disable(key.id)
    stores.close()
    restored(tmp_path / "backup", tmp_path / "data", replace=True)
    stores = stores_in(tmp_path / "data")
    assert [each.disabled for each in stores.api_keys.list()] == [True]
    stores.close()


def test_a_damaged_folder_gives_what_it_can(lived: Path, tmp_path: Path) -> None:
    stores = stores_in(lived)
    stores.log.append_sync([rating("of ben", "ben", "down", event_id="late")])
    stores.close()
    (lived / "archive.sqlite").write_bytes(b"torn" * 4096)
    done = restored(tmp_path / "backup", lived, replace=True)
    assert any("archive.sqlite" in problem for problem in done.problems)
    stores = stores_in(lived)
    assert stores.archive.state("of ben")["ben", "rating"].event_id == "late"
    stores.close()


def spoil(name: str, how: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda folder: how(folder / name)


@pytest.mark.parametrize(
    ("harm", "error", "told"),
    [
        (spoil("backup.json", Path.unlink), NotFound, "not finished"),
        (spoil("backup.json", lambda path: path.write_text("{}")), InvalidInput, "manifest"),
        (spoil("keys/kek", Path.unlink), InvalidInput, "keys/kek is missing"),
        (spoil("adapters/x/weights", lambda path: path.write_bytes(b"v" * 3_000_000)), InvalidInput, "damaged: adapters/x/weights"),
        (spoil("backup.json", lambda path: path.write_text(path.read_text().replace("keys/kek", "../kek"))), InvalidInput, "outside"),
    ],
)
def test_a_backup_that_is_none_is_refused_and_the_folder_stays(
    lived: Path, tmp_path: Path, harm: Callable[[Path], object], error: type[Exception], told: str
) -> None:
    before = sorted(path.name for path in lived.rglob("*"))
    harm(tmp_path / "backup")
    with pytest.raises(error, match=told):
        restored(tmp_path / "backup", lived, replace=True)
    assert sorted(path.name for path in lived.rglob("*")) == before
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_folder_that_is_there_or_in_use_is_not_touched(lived: Path, tmp_path: Path) -> None:
    with pytest.raises(Conflict, match="--replace"):
        restored(tmp_path / "backup", lived)
    running = stores_in(lived)
    with pytest.raises(Conflict, match="'gateway' works on"):
        restored(tmp_path / "backup", lived, replace=True)
    running.close()


def test_nobody_restores_without_a_key_of_the_backup(lived: Path, tmp_path: Path) -> None:
    def refuse(_: Stores) -> str:
        raise ConfigError("no key")

    with pytest.raises(ConfigError, match="no key"):
        restore.restore(tmp_path / "backup", settings_of(tmp_path / "new"), refuse, again)
    assert not (tmp_path / "new").exists()


def test_a_restore_that_fails_on_the_way_leaves_the_folder_as_it_was(lived: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stores = stores_in(lived)
    stores.log.append_sync([rating("of ben", "ben", "down", event_id="late")])
    stores.close()

    def full(*_: object) -> object:
        raise NotDurable("the disk is full")

    def no_rename(self: Path, target: Path) -> Path:
        if ".restored." in self.name:
            raise OSError(5, "Input/output error")
        return rename(self, target)

    rename = Path.rename
    with pytest.raises(NotDurable, match="disk is full"):
        restore.restore(tmp_path / "backup", settings_of(lived), ada, full, replace=True)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", no_rename)
        with pytest.raises(NotDurable, match="it is as it was"):
            restored(tmp_path / "backup", lived, replace=True)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    stores = stores_in(lived)
    stores.ingest()
    assert stores.archive.state("of ben")["ben", "rating"].event_id == "late"
    stores.close()


def test_where_a_backup_may_not_go_and_a_registry_that_is_not_copied(lived: Path, tmp_path: Path) -> None:
    stores = stores_in(lived)
    with pytest.raises(InvalidInput, match="not empty"):
        backup.backup(stores, tmp_path / "backup", "ada")
    with pytest.raises(InvalidInput, match="data folder itself"):
        backup.backup(stores, lived / "backup", "ada")
    foreign = dataclasses.replace(stores, engine=SimpleNamespace(dialect=SimpleNamespace(name="postgresql")))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="pg_dump"):
        backup.backup(foreign, tmp_path / "foreign", "ada")
    assert not (tmp_path / "foreign").exists()
    stores.close()


def test_keys_may_be_kept_apart(lived: Path, tmp_path: Path) -> None:
    stores = stores_in(lived)
    manifest = backup.backup(stores, tmp_path / "bare", "ada", keys=False)
    stores.close()
    assert not any(name.startswith("keys/") for name in manifest.files) and manifest.without == ("keys",)
    shutil.copytree(lived / "keys", tmp_path / "safe")
    with pytest.raises(InvalidInput, match="--keys"):
        restored(tmp_path / "bare", tmp_path / "new")
    restored(tmp_path / "bare", tmp_path / "new", keys=tmp_path / "safe")
    stores = stores_in(tmp_path / "new")
    assert asked(stores, "of anna") == "How do I cut an onion?"
    stores.close()


def test_a_backup_that_breaks_off_is_none(lived: Path, tmp_path: Path) -> None:
    stores = stores_in(lived)
    with sqlite3.connect(lived / "log" / "other.sqlite") as db:
        db.execute("CREATE TABLE events (offset INTEGER)")
    db.close()
    with (lived / "log" / "other.sqlite").open("r+b") as file:  # a page in the middle of the file's structure
        file.seek(100)
        file.write(b"\xff" * 1000)
    with pytest.raises(NotDurable, match=r"other\.sqlite"):
        backup.backup(stores, tmp_path / "half", "ada")
    stores.close()
    with pytest.raises(NotFound, match="not finished"):
        restored(tmp_path / "half", tmp_path / "new")


def with_a_rating_in_between(stores: Stores, partitions_first: bool) -> Callable[[Any, Path, str], None]:
    """Copies databases as `backup` does, or in the wrong order; after the first one a rating comes and is read into the archive."""
    whole, copied = backup._Copy.database, set[str]()

    def copy(self: Any, path: Path, name: str) -> None:
        first = (stores.log.path, "log/gateway.sqlite") if partitions_first and not copied else (path, name)
        for each in (first, (path, name)):
            if each[1] not in copied:
                whole(self, *each)
                copied.add(each[1])
                if len(copied) == 1:
                    stores.log.append_sync([rating("i", "anna", "down", event_id="during")])
                    stores.ingest()

    return copy


@pytest.mark.parametrize(("partitions_first", "skips"), [(False, False), (True, False), (True, True)])
def test_events_committed_while_it_is_copied_are_read_after_the_restore(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, partitions_first: bool, skips: bool
) -> None:
    if not skips:  # the log passes over offsets that the archive has read; the right order needs no such help
        monkeypatch.setattr(SqliteLog, "_skip_archived", lambda *_: None)
    stores = stores_in(tmp_path / "data")
    stores.log.append_sync([rating("i", "anna", "up", event_id="before")])
    stores.ingest()
    monkeypatch.setattr(backup._Copy, "database", with_a_rating_in_between(stores, partitions_first))
    backup.backup(stores, tmp_path / "backup", "ada")
    stores.close()
    restored(tmp_path / "backup", tmp_path / "new")
    there = stores_in(tmp_path / "new")
    there.log.append_sync([rating("j", "ben", "up", event_id="after")])
    there.ingest()
    found = {event.event_id for event in there.archive.current()}
    # In the wrong order the archive has read offset 2, which the copied partition would give out again: `after` would never be read.
    assert found == ({"during"} if partitions_first and not skips else {"during", "after"})
    there.close()


def test_a_backup_of_a_busy_folder_has_everything_acknowledged_before_it(tmp_path: Path) -> None:
    stores = stores_in(tmp_path / "data")
    acknowledged: list[str] = []
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            acknowledged.append(stores.log.append_sync([rating("i", f"r{len(acknowledged)}", "up")])[0].event_id)
            if len(acknowledged) % 7 == 0:
                stores.ingest()

    writer = threading.Thread(target=write)
    writer.start()
    try:
        while len(acknowledged) < 30:
            stop.wait(0.001)
        before = list(acknowledged)
        backup.backup(stores, tmp_path / "backup", "ada")
    finally:
        stop.set()
        writer.join()
    stores.close()
    restored(tmp_path / "backup", tmp_path / "new")
    there = stores_in(tmp_path / "new")
    found = {event.event_id for event in there.archive.current()}
    assert set(before) <= found <= set(acknowledged)
    there.close()


def test_adapters_are_found_in_the_folder_that_was_restored(tmp_path: Path) -> None:
    stores = stores_in(tmp_path / "data")
    with contextlib.closing(sqlite3.connect(tmp_path / "data" / "registry.sqlite")) as db, db:
        db.execute("CREATE TABLE adapters (id TEXT, path TEXT)")
        db.execute("INSERT INTO adapters VALUES ('a', ?), ('b', '/elsewhere/b')", (str(tmp_path / "data" / "adapters" / "a"),))
    backup.backup(stores, tmp_path / "backup", "ada")
    stores.close()
    restored(tmp_path / "backup", tmp_path / "moved")
    with contextlib.closing(sqlite3.connect(tmp_path / "moved" / "registry.sqlite")) as db:
        assert dict(db.execute("SELECT id, path FROM adapters")) == {"a": str(tmp_path / "moved" / "adapters" / "a"), "b": "/elsewhere/b"}


def test_the_list_of_erasures_survives_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "erased.jsonl"
    path.write_text('{"subject": "to')
    erasure._list(path, "anna", 5)
    erasure._list(path, "anna", 7)
    assert erasure.listed(path) == {"anna": 7}
    assert [json.loads(line)["stamp"] for line in path.read_text().splitlines()[1:]] == [5, 7]
    with pytest.raises(NotFound):
        erasure.listed(tmp_path / "nowhere")
