"""A disk that is really full, and one that is really read-only: nothing is acknowledged that is not stored, and afterwards all goes on."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from serving_world import World, serve
from waiting import until

from feedback.config import FeedbackSettings, Settings
from feedback.errors import ConfigError, NotDurable
from feedback.events import Event, FeedbackGiven
from feedback.partitions import SqliteLogs
from feedback.stores import open_stores
from serving.config import RecordSettings

SIZE = "1m"
Disk = Callable[[str], None]
"""Mounts the disk anew with these options."""


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[tuple[Path, Disk]]:
    """1 MiB that is a disk of its own."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SIZE},mode=700", "plaudit-test", str(place)]
    if os.geteuid() != 0 or shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small tmpfs needs root and the right to mount")
    try:
        yield place, lambda options: _remount(place, options)
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def _remount(place: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(place)], check=True)


def fill(place: Path) -> Path:
    """Write until nothing more fits."""
    filler = place / "filler"
    with filler.open("ab", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"x" * 1024)
    with filler.open("ab", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"x")
    return filler


def rate_until_refused(world: World, token: str) -> tuple[list[str], int]:
    """Comment again and again, as the log may have room left in files that it has; what was acknowledged, and the refusal's status."""
    acknowledged: list[str] = []
    for number in range(400):
        said = {"kind": "comment", "comment": f"{number} " + "x" * 2_000}
        reply = world.feedback(token, said)
        if reply.status_code != 200:
            assert reply.headers["retry-after"] == "2" and reply.json()["error"]["code"] == "not_durable"
            return acknowledged, reply.status_code
        acknowledged.append(reply.json()["feedback_id"])
    raise AssertionError("a full disk took everything")


def stored(place: Path) -> list[str]:
    records = SqliteLogs(place / "log").read({}, 100_000)
    return [record.event.event_id for record in records if isinstance(record.event, FeedbackGiven)]


def assert_whole(place: Path) -> None:
    for path in place.rglob("*.sqlite"):
        with contextlib.closing(sqlite3.connect(path)) as db:
            assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)], path


@pytest.mark.slow
def test_a_full_disk_refuses_feedback_and_takes_it_again_once_there_is_room(disk: tuple[Path, Disk]) -> None:
    place, _ = disk
    with serve(place) as world:
        token = world.chat().headers["plaudit-feedback-token"]
        before = world.feedback(token, {"kind": "rating", "value": "up"}).json()["feedback_id"]
        world.stores.ingest()
        filler = fill(place)
        acknowledged, status = rate_until_refused(world, token)
        assert status == 503
        assert world.chat("x" * 400).status_code == 503  # recording is required
        refused = world.feedback(token, {"kind": "rating", "value": "down"}, **{"Idempotency-Key": "once"})
        with contextlib.suppress(NotDurable):
            world.stores.ingest()
        assert world.state(token).json()["state"]["rating"] == ("down" if refused.status_code == 200 else "up")

        filler.unlink()
        again = world.feedback(token, {"kind": "rating", "value": "down"}, **{"Idempotency-Key": "once"})
        assert again.status_code == 200 and world.chat().status_code == 200
        assert world.state(token).json()["state"]["rating"] == "down"
        world.stores.ingest()
        acknowledged += [before, again.json()["feedback_id"]]
        counted = world.stores.archive.counts()["feedback.given"]
    ids = stored(place)
    assert set(acknowledged) <= set(ids) and len(ids) == len(set(ids)) == counted
    assert_whole(place)


@pytest.mark.slow
def test_a_full_disk_with_best_effort_answers_without_a_token(disk: tuple[Path, Disk]) -> None:
    place, _ = disk
    with serve(place, record=RecordSettings(recording="best_effort")) as world:
        token = world.chat(user="ann").headers["plaudit-feedback-token"]
        filler = fill(place)
        rate_until_refused(world, token)
        reply = world.chat("x" * 400, user="ann")
        assert reply.status_code == 200 and "plaudit-feedback-token" not in reply.headers
        assert reply.headers["plaudit-recorded"] == "false"
        filler.unlink()
        until(lambda: "plaudit-feedback-token" in world.chat(user="ann").headers)
    assert_whole(place)


@pytest.mark.slow
def test_a_read_only_disk_is_named_at_start_and_what_it_holds_is_served_again(disk: tuple[Path, Disk]) -> None:
    place, remount = disk
    with serve(place) as world:
        token = world.chat().headers["plaudit-feedback-token"]
        kept = world.feedback(token, {"kind": "rating", "value": "up"}).json()["feedback_id"]
    remount("ro")
    with pytest.raises((ConfigError, NotDurable), match=str(place)):
        open_stores(Settings(feedback=FeedbackSettings(data_dir=place)))
    remount("rw")
    with serve(place) as world:
        assert world.state(token).json()["state"]["rating"] == "up"
        assert world.feedback(token, {"kind": "rating", "value": "down"}).status_code == 200
    assert stored(place)[0] == kept
    assert_whole(place)


@pytest.mark.slow
def test_the_control_that_takes_a_full_disk_for_a_success_is_caught(disk: tuple[Path, Disk], monkeypatch: pytest.MonkeyPatch) -> None:
    place, _ = disk
    with serve(place) as world:
        append = world.stores.log.append

        async def hopeful(events: list[Event]) -> list[Event]:
            try:
                return await append(events)
            except NotDurable:
                return events

        monkeypatch.setattr(world.stores.log, "append", hopeful)
        token = world.chat().headers["plaudit-feedback-token"]
        fill(place)
        with pytest.raises(AssertionError, match="took everything"):
            rate_until_refused(world, token)
