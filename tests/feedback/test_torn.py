"""The last page is torn, or bytes behind it are lost: what was acknowledged is there, or what is missing is said, with the next step."""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from feedback_world import rating, stores_in
from structlog.testing import capture_logs

from feedback.clock import COUNTER_BITS, HybridClock
from feedback.database import configure, report_damage
from feedback.errors import NotDurable
from feedback.events import Event
from feedback.partitions import SqliteLogs
from feedback.sqlite_log import SqliteLog

ROOT = Path(__file__).parents[2]
EVENTS = 12
FRAME = 24 + 4096


def as_killed(folder: Path, into: Path) -> Path:
    """The log of a process that was killed after it had acknowledged EVENTS events, one commit each; its folder."""
    log = SqliteLog(folder / "gateway.sqlite", HybridClock())
    for number in range(EVENTS):
        log.append_sync([rating("i", "r", "up", event_id=f"e{number}")])
    into.mkdir()
    for path in folder.iterdir():
        if not path.name.endswith("-shm"):  # whoever opens the files first after a crash makes this one anew
            shutil.copy(path, into)
    log.close()
    return into


def reopened(folder: Path) -> tuple[int, list[dict[str, object]]]:
    """How many of the events are there, which must be the first ones, and what was said on opening."""
    with capture_logs() as said:
        log = SqliteLog(folder / "gateway.sqlite", HybridClock())
        log.append_sync([rating("i", "r", "down", event_id="new")])
        log.close()
    found = [record.event.event_id for record in SqliteLogs(folder).read({}, 1000) if record.event]
    assert found == [f"e{number}" for number in range(len(found) - 1)] + ["new"]
    return len(found) - 1, [dict(line) for line in said]


def test_a_log_that_is_whole_opens_without_a_word(tmp_path: Path) -> None:
    assert reopened(as_killed(tmp_path / "a", tmp_path / "b")) == (EVENTS, [])


@pytest.mark.parametrize("back", [1, 100, FRAME - 24, FRAME, 3 * FRAME + 7, 20 * FRAME])
def test_a_garbled_tail_is_said_and_kept(tmp_path: Path, back: int) -> None:
    folder = as_killed(tmp_path / "a", tmp_path / "b")
    wal = folder / "gateway.sqlite-wal"
    torn = bytearray(wal.read_bytes())
    torn[-back] ^= 0xFF
    wal.write_bytes(torn)
    there, said = reopened(folder)
    assert there < EVENTS
    (line,) = said
    assert line["log_level"] == "error" and line["file"] == str(wal) and "backup" in str(line["next_step"])
    assert line["transactions"] >= 1 and Path(str(line["kept"])).read_bytes() == bytes(torn)  # type: ignore[operator]


@pytest.mark.parametrize("cut", [1, 4000, FRAME - 24])
def test_a_last_frame_that_is_cut_is_said(tmp_path: Path, cut: int) -> None:
    folder = as_killed(tmp_path / "a", tmp_path / "b")
    wal = folder / "gateway.sqlite-wal"
    os.truncate(wal, wal.stat().st_size - cut)
    there, said = reopened(folder)
    assert there == EVENTS - 1 and [line["transactions"] for line in said] == [1]


def test_what_the_archive_has_read_already_is_missed_and_no_offset_is_given_twice(tmp_path: Path) -> None:
    stores = stores_in(tmp_path / "a")
    for number in range(EVENTS):
        stores.log.append_sync([rating(f"i{number}", "r", "up")])
    stores.ingest()
    last = stores.archive.as_of()
    stores.close()
    for path in (tmp_path / "a" / "log").glob("gateway.sqlite*"):
        path.unlink()
    with capture_logs() as said:
        stores = stores_in(tmp_path / "a")
    assert [(line["event"], line["lost"]) for line in said] == [("an event log lost what the archive has read from it", EVENTS)]
    new = stores.log.append_sync([rating("new", "r", "up")])[0]
    assert new.stamp > last
    assert stores.ingest() == 1 and len(stores.archive.current()) == EVENTS + 1
    stores.close()
    with capture_logs() as said:
        stores_in(tmp_path / "a").close()
    assert said == []


@pytest.mark.parametrize("seed", range(9))
def test_a_broken_database_is_named_or_whole(tmp_path: Path, seed: int) -> None:
    """After everything was checkpointed a page is overwritten with noise, or half of one with zeros, or the end is cut off."""
    chance = random.Random(seed)
    log = SqliteLog(tmp_path / "gateway.sqlite", HybridClock())
    for number in range(100):
        log.append_sync([rating(f"i{number % 10}", "r", "up", event_id=f"e{number}")])
    log.close()
    path = tmp_path / "gateway.sqlite"
    whole = bytearray(path.read_bytes())
    page = len(whole) - 4096 * (1 if seed < 3 else chance.randrange(1, len(whole) // 4096))
    if seed % 3 == 0:
        whole[page : page + 4096] = chance.randbytes(4096)
    elif seed % 3 == 1:
        whole[page : page + 2048] = bytes(2048)
    else:
        del whole[page + 512 :]
    path.write_bytes(whole)
    try:
        log = SqliteLog(path, HybridClock())
        log.close()
        records = SqliteLogs(tmp_path).read({}, 1000)
        about = [event for number in range(10) for event in SqliteLogs(tmp_path).about(f"i{number}")]
        assert len(records) == len(about) == 100
    except NotDurable as exc:
        assert str(path) in exc.message and "plaudit restore" in exc.message


def test_the_clock_goes_back_an_hour_and_the_last_word_still_counts(tmp_path: Path) -> None:
    now = [10 * 3_600_000]
    stores = stores_in(tmp_path)
    stores.clock._wall = lambda: now[0]
    said: list[Event] = []
    for number, value in enumerate(["up", "down", "up", "down"]):
        if number == 2:
            now[0] -= 3_600_000
        said += stores.log.append_sync([rating("i", "r", value, stamp=said[-1].stamp if said else 0)])
    stamps = [event.stamp for event in said]
    assert stamps == sorted(set(stamps)) and stamps[-1] >> COUNTER_BITS == 10 * 3_600_000  # it stands still until time has caught up
    stores.ingest()
    assert [event.value for event in stores.archive.current()] == ["down"]
    stores.close()

    stores = stores_in(tmp_path)  # the process starts anew, the clock still an hour back
    stores.clock._wall = lambda: now[0]
    (later,) = stores.log.append_sync([rating("i", "r", "up")])
    assert later.stamp > stamps[-1]
    stores.ingest()
    assert [event.value for event in stores.archive.current()] == ["up"]
    stores.close()


BESIDE = """
import subprocess, sys
from pathlib import Path
from feedback.database import report_damage, settle
from feedback.sqlite_log import open_file
path = Path(sys.argv[1])
first, second = open_file(path), open_file(path)
for db in (first, second):
    settle(db)
    report_damage(db)
# Byte 128 of the index is locked by everybody who has it open: https://www.sqlite.org/walformat.html
other = f"import fcntl; fcntl.lockf(open({str(path)!r} + '-shm', 'r+b'), fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 128)"
print(subprocess.run([sys.executable, "-c", other], capture_output=True, text=True).stderr)
"""


def test_looking_for_damage_keeps_this_process_its_locks(tmp_path: Path) -> None:
    """Without them the next process to open the file takes its index for abandoned and cuts it short under whoever has it mapped."""
    done = subprocess.run(
        [sys.executable, "-c", BESIDE, str(tmp_path / "log.sqlite")], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and "BlockingIOError" in done.stdout, (done.stdout, done.stderr)


WRITING = """
import sqlite3, sys, time
db = sqlite3.connect(sys.argv[1], isolation_level=None, timeout=5)
db.execute("INSERT INTO t VALUES (0)")
print(flush=True)
for _ in range(2000):
    db.execute("INSERT INTO t VALUES (1)")
    time.sleep(0.002)
"""


def test_a_log_that_another_process_writes_is_not_called_damaged(tmp_path: Path) -> None:
    path = tmp_path / "shared.sqlite"
    with closing(sqlite3.connect(path, isolation_level=None, timeout=5)) as db:
        configure(db)
        db.execute("CREATE TABLE t (x)")
        with subprocess.Popen([sys.executable, "-c", WRITING, str(path)], stdout=subprocess.PIPE) as child:
            assert child.stdout is not None and child.stdout.readline()
            found = sum(report_damage(db) for _ in range(20))
            child.kill()
    assert found == 0 and list(tmp_path.glob("*.damaged")) == []
