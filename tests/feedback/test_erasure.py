"""Erasing a person: nothing of them is left, nothing of others is missing, and a kill anywhere is mended by saying it again."""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
from feedback_world import answered, rating, stores_in

from feedback import audit, erasure, snapshot
from feedback.errors import Gone, NotDurable, NotFound
from feedback.events import FeedbackGiven, FeedbackText, InteractionFinished, SubjectErased
from feedback.stores import Stores
from feedback.subjects import Subjects


class Killed(BaseException):
    """As if the process had died here."""


def two_people(folder: Path) -> Stores:
    """Anna and Ben each asked, read and rated; a dead gateway wrote half of it, so its write-ahead log still lies there."""
    dead = stores_in(folder)
    dead.log.append_sync([*answered(dead, "i1", "anna", "Anna's answer"), *answered(dead, "i2", "ben", "Ben's answer")])
    stores = stores_in(folder, "operator")
    said = stores.subjects.seal(("anna",), FeedbackText(comment="Anna's comment"))
    stores.log.append_sync([rating("i1", "anna", "up").model_copy(update={"sealed": said}), rating("i2", "ben", "up")])
    stores.ingest()
    snapshot.build(stores.archive, stores.subjects, folder / "snapshots")
    return stores


def left_of_anna(folder: Path) -> list[str]:
    """Files that still hold an answer's event of hers, and snapshots that still hold her row."""
    files = [*folder.glob("log/*.sqlite*"), *folder.glob("archive.sqlite*")]
    held = [path for path in folder.glob("snapshots/*") if snapshot.rows_of(path, {"anna": 2**62})]
    return [path.name for path in files if b"finished-i1" in path.read_bytes()] + [f"{path.name}/rows.parquet" for path in held]


def rows(folder: Path) -> list[str]:
    """Ids of the events in all partitions."""
    found = []
    for path in sorted(folder.glob("log/*.sqlite")):
        with contextlib.closing(sqlite3.connect(path)) as db:
            found += [row[0] for row in db.execute("SELECT event_id FROM events ORDER BY offset")]
    return found


def test_everything_of_one_person_goes_and_everything_of_the_other_stays(tmp_path: Path) -> None:
    stores = two_people(tmp_path)
    (made,) = (tmp_path / "snapshots").iterdir()
    assert {name.rpartition(".")[2] for name in left_of_anna(tmp_path)} >= {"sqlite-wal", "parquet"}  # the search can find it
    sealed = stores.archive.interaction("i1")
    assert sealed and sealed.finished and sealed.finished.sealed
    done = erasure.erase(stores, "anna", "mara", "she asked")
    # started, finished and rating; the subject's key; one snapshot
    assert (done.rows, done.keys, done.snapshots, done.complete) == (3, 1, 1, True)
    kept = [event.event_id for event in stores.archive.current()]
    assert len(kept) == 1 and stores.archive.interaction("i1") is None and stores.archive.interaction("i2") is not None
    assert {"started-i2", "finished-i2", *kept} < set(rows(tmp_path)) and not {"started-i1", "finished-i1"} & set(rows(tmp_path))
    with pytest.raises(Gone):
        stores.subjects.open(sealed.finished.sealed, FeedbackText)
    assert left_of_anna(tmp_path) == []
    after = snapshot.load(made)
    assert after.redacted and [row.rater for row in after.rows] == ["ben"]
    assert erasure.snapshots_of(stores.engine, "anna") == {made.name: 1} and erasure.snapshots_of(stores.engine, "ben") == {}
    told = [row for row in audit.read(stores.engine) if row["action"] == "subject.erased"]
    assert [(row["actor"], row["subject"], row["reason"]) for row in told] == [("mara", "anna", "she asked")]
    assert audit.verify(stores.engine)[1] is None
    stores.close()


def test_copies_of_torn_logs_go_too(tmp_path: Path) -> None:
    stores = two_people(tmp_path)
    copies = [tmp_path / "registry.sqlite-wal.1.damaged", tmp_path / "log" / "gateway.sqlite-wal.2.damaged"]
    for copy in copies:
        copy.write_bytes(b"a wrapped key")
    erasure.erase(stores, "anna", "mara", "she asked")
    assert not any(copy.exists() for copy in copies)
    stores.close()


def test_again_changes_nothing_and_a_returning_person_is_somebody_new(tmp_path: Path) -> None:
    stores = two_people(tmp_path)
    first = erasure.erase(stores, "anna", "mara", "she asked")
    again = erasure.erase(stores, "anna", "mara", "she asked")
    assert (again.stamp, again.rows, again.keys) == (first.stamp, 0, 0)
    stores.log.append_sync([*answered(stores, "i3", "anna", "Back again"), rating("i3", "anna", "down")])
    stores.ingest()
    assert erasure.finish(stores) == []  # what is finished is not finished again, so her new key stays
    assert [row.answer_a for row in snapshot.build(stores.archive, stores.subjects, tmp_path / "snapshots").rows][-1] == "Back again"
    assert erasure.erase(stores, "anna", "mara", "and again").rows == 3
    assert [row["subject"] for row in audit.read(stores.engine)] == ["anna", "anna"]
    stores.close()


STEPS = ("event", "keys", "archive", "partitions", "snapshots", "then")


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("by_finish", [False, True])
def test_killed_anywhere_the_next_call_finishes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, by_finish: bool) -> None:
    stores = two_people(tmp_path)
    acted: list[str] = []

    def killed(*_: object, **__: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        where: dict[str, tuple[object, str]] = {
            "event": (Subjects, "erase"),
            "keys": (erasure, "_scrub_file"),
            "archive": (erasure, "_clean_partitions"),
            "partitions": (erasure, "_remember"),
            "snapshots": (snapshot, "redact"),
        }
        if step in where:
            patch.setattr(*where[step], killed)
        with pytest.raises(Killed):
            erasure.erase(stores, "anna", "mara", "she asked", killed if step == "then" else None)
    stores.close()
    stores = stores_in(tmp_path)
    if by_finish:
        stores.ingest()
        monkeypatch.setattr(erasure, "FOREIGN_MS", 0)
        assert len(erasure.finish(stores, acted.append)) == 1
    else:
        assert erasure.erase(stores, "anna", "mara", "she asked", acted.append).complete
    assert acted == ["anna"] and erasure.finish(stores) == []
    assert left_of_anna(tmp_path) == []
    assert [row["action"] for row in audit.read(stores.engine)] == ["subject.erased"]
    assert erasure.snapshots_of(stores.engine, "anna").keys() == {path.name for path in (tmp_path / "snapshots").iterdir()}
    assert "started-i2" in rows(tmp_path)
    stores.close()


@pytest.mark.parametrize(("left_out", "found"), [("_delete", ".sqlite"), ("truncate_wal", "sqlite-wal"), ("_clean_snapshots", "parquet")])
def test_the_control_a_step_that_is_left_out_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left_out: str, found: str) -> None:
    stores = two_people(tmp_path)
    nothing: dict[str, Callable[..., object]] = {"_clean_snapshots": lambda *_: (0, True), "_delete": lambda *_: 0}
    monkeypatch.setattr(erasure, left_out, nothing.get(left_out, lambda *_: None))
    erasure.erase(stores, "anna", "mara", "she asked")
    assert any(found in name for name in left_of_anna(tmp_path))
    stores.close()


def test_what_a_gateway_whose_clock_is_ahead_wrote_goes_too(tmp_path: Path) -> None:
    ahead = stores_in(tmp_path)
    ahead.clock.observe(ahead.clock.tick() + (60_000 << 16))  # a minute
    stores = stores_in(tmp_path, "operator")
    ahead.log.append_sync([*answered(ahead, "i1", "anna", "Anna's answer"), rating("i1", "anna", "up")])
    assert erasure.erase(stores, "anna", "mara", "she asked").rows == 3
    assert stores.archive.current() == [] and left_of_anna(tmp_path) == []
    ahead.close()
    stores.close()


def test_the_outbox_keeps_the_erasure_and_other_peoples_rows(tmp_path: Path) -> None:
    stores = two_people(tmp_path)
    erasure.erase(stores, "anna", "mara", "she asked")
    waiting = []
    for path in tmp_path.glob("log/*.sqlite"):
        with contextlib.closing(sqlite3.connect(path)) as db:
            waiting += [row[0] for row in db.execute("SELECT value FROM events WHERE sent = 0")]
    assert len(waiting) == 4 and sum(b'"subject.erased"' in value for value in waiting) == 1
    stores.close()


def test_what_others_said_about_an_erased_answer_goes_with_it(tmp_path: Path) -> None:
    stores = two_people(tmp_path)
    stores.log.append_sync([rating("i1", "ben", "down", event_id="about-her-answer")])
    erasure.erase(stores, "anna", "mara", "she asked")
    assert "about-her-answer" not in rows(tmp_path) and all(event.target == "i2" for event in stores.archive.current())
    stores.close()


def test_an_answer_that_ends_after_its_person_was_erased_is_deleted_too(tmp_path: Path) -> None:
    stores = two_people(tmp_path)
    stores.log.append_sync([SubjectErased(event_id="e", subject="anna")])
    late = InteractionFinished(event_id="late", interaction_id="i1", subject="anna", finish_reason="stop")
    stores.log.append_sync([late])
    erasure.erase(stores, "anna", "mara", "she asked")
    assert "late" not in rows(tmp_path)
    stores.close()


def test_a_snapshot_that_is_being_built_holds_nobody_who_was_erased_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stores = two_people(tmp_path)
    other = stores_in(tmp_path, "other")
    read = snapshot._rows

    def slowly(*args: object) -> list[snapshot.Row]:
        rows = list(read(*args))  # type: ignore[arg-type]
        erasure.erase(other, "anna", "mara", "she asked")
        return rows

    with monkeypatch.context() as patch:
        patch.setattr(snapshot, "_rows", slowly)
        made = snapshot.build(stores.archive, stores.subjects, tmp_path / "snapshots")
    assert [row.rater for row in made.rows] == ["ben"] and not made.redacted
    assert not stores.subjects.alive("anna")  # taking a snapshot made her no new key
    for each in (stores, other):
        each.close()


def test_what_a_killed_writer_of_snapshots_left_is_put_right(tmp_path: Path) -> None:
    stores = two_people(tmp_path)
    (made,) = (tmp_path / "snapshots").iterdir()
    half = made.with_name(f".{made.name}.7.abcd")
    half.mkdir()
    (half / "rows.parquet").write_text("Anna's answer")
    made.rename(made.with_name(f".{made.name}.7.old"))  # killed between the two renames of a redaction
    erasure.erase(stores, "anna", "mara", "she asked")
    assert [path.name for path in (tmp_path / "snapshots").iterdir()] == [made.name]
    assert [row.rater for row in snapshot.load(made).rows] == ["ben"]
    stores.close()


@pytest.mark.parametrize("broken", ["erasures", "mark", "snapshots"])
def test_a_folder_that_takes_no_file_is_one_clear_error_and_the_next_call_finishes(tmp_path: Path, broken: str) -> None:
    stores = two_people(tmp_path)
    place = erasure._mark_of(tmp_path, "anna", ".tmp") if broken == "mark" else tmp_path / broken
    if broken == "snapshots":
        shutil.move(place, tmp_path / "moved")
    place.mkdir(parents=True) if broken == "mark" else place.write_text("a file in its place")  # root writes to read-only folders
    with pytest.raises(NotDurable, match=place.name if broken != "mark" else "erasures") as error:
        erasure.erase(stores, "anna", "operator", "asked")
    assert error.value.retry_after_s and "[Errno" not in error.value.message
    place.rmdir() if broken == "mark" else place.unlink()
    if broken == "snapshots":
        shutil.move(tmp_path / "moved", place)
        (place / ".DS_Store").write_text("no folder")  # what other programs put there is left alone
    erasure.erase(stores, "anna", "operator", "asked")
    (tmp_path / "snapshots" / ".DS_Store").unlink(missing_ok=True)
    assert left_of_anna(tmp_path) == []


def test_people_are_named_by_their_id_or_pseudonym(tmp_path: Path) -> None:
    stores = stores_in(tmp_path)
    anna = stores.subjects.pseudonym("default", "anna")
    with pytest.raises(NotFound, match="nothing of 'anna' was ever recorded"):
        erasure.named(stores, "anna")
    stores.subjects.seal((anna,), FeedbackText())
    assert erasure.named(stores, "anna") == erasure.named(stores, anna) == anna
    erasure.erase(stores, anna, "mara", "she asked")
    assert erasure.named(stores, "anna") == anna  # so that it can be said again
    stores.close()


def test_nobody_of_another_tenant_is_erased_by_pseudonym(tmp_path: Path) -> None:
    stores = stores_in(tmp_path)
    theirs = stores.subjects.pseudonym("theirs", "anna")
    stores.log.append_sync([event.model_copy(update={"tenant": "theirs"}) for event in answered(stores, "i1", theirs, "hi")])
    stores.ingest()
    with pytest.raises(NotFound, match="is of tenant 'theirs'"):
        erasure.named(stores, theirs)
    stores.close()


def test_who_withdraws_trains_no_more_until_erased_and_back(tmp_path: Path) -> None:
    stores = two_people(tmp_path)
    for _ in range(2):
        erasure.withdraw(stores, "anna", "the person", "asked for")
    assert [row["action"] for row in audit.read(stores.engine)] == ["consent.withdrawn"]
    assert stores.archive.counts()["consent.withdrawn"] == 1

    def raters() -> list[str]:
        return [row.rater for row in snapshot.build(stores.archive, stores.subjects, tmp_path / "snapshots").rows]

    stores.log.append_sync([*answered(stores, "i3", "anna", "Later"), rating("i3", "anna", "down")])
    stores.ingest()
    assert raters() == ["ben"]  # also not what she says after it
    assert stores.archive.interaction("i1") is not None  # it stays recorded
    erasure.erase(stores, "anna", "the person", "asked for")
    stores.log.append_sync([*answered(stores, "i4", "anna", "New"), rating("i4", "anna", "up")])
    stores.ingest()
    assert sorted(raters()) == ["anna", "ben"]
    stores.close()


def test_a_rating_of_ten_thousand_people_is_found_fast_enough(tmp_path: Path) -> None:
    stores = two_people(tmp_path)
    stores.log.append_sync(
        [FeedbackGiven(event_id=f"e{i}", target=f"t{i}", rater=f"r{i}", slot="rating", value="up") for i in range(10_000)]
    )
    assert erasure.erase(stores, "anna", "mara", "she asked").rows == 3
    assert stores.archive.counts()["feedback.given"] == 10_001
    stores.close()


def test_a_restored_backup_forgets_again_who_was_erased_since(tmp_path: Path) -> None:
    stores = two_people(tmp_path / "data")
    stores.close()
    shutil.copytree(tmp_path / "data", tmp_path / "backup")
    stores = stores_in(tmp_path / "data")
    erasure.erase(stores, "anna", "mara", "she asked")
    since = stores.archive.erasures()
    stores.close()
    stores = stores_in(tmp_path / "backup")
    assert stores.subjects.alive("anna") and left_of_anna(tmp_path / "backup")
    for _ in range(2):
        assert [each.stamp for each in erasure.replay(stores, since)] == list(since.values())
    assert not stores.subjects.alive("anna") and left_of_anna(tmp_path / "backup") == []
    assert stores.archive.erasures() == since and erasure.finish(stores) == []
    assert [row["actor"] for row in audit.read(stores.engine)] == ["system"]
    assert len(rows(tmp_path / "backup")) == 3  # of Ben
    stores.close()
