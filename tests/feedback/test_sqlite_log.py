"""The embedded log: durable, idempotent, ordered, and usable again after the disk was full."""

from __future__ import annotations

import asyncio
import os
import sqlite3
from pathlib import Path

import pytest
from feedback_world import clearing, rating, stores_in
from hypothesis import given, settings
from hypothesis import strategies as st

from feedback.clock import COUNTER_BITS, HybridClock
from feedback.errors import ConfigError, IdempotencyMismatch, InvalidInput, NotDurable
from feedback.partitions import SqliteLogs, prune
from feedback.sqlite_log import SqliteLog
from feedback.stores import open_stores


def test_what_was_appended_is_read_in_order(tmp_path: Path) -> None:
    log = SqliteLog(tmp_path / "one.sqlite", HybridClock())
    stored = log.append_sync([rating("i", "r", "up"), rating("i", "r", "down")])
    records = log.read({}, 10)
    assert [record.event for record in records] == stored
    assert stored[0].stamp < stored[1].stamp
    assert [record.event for record in log.read({"one": records[1].offset}, 10)] == stored[1:]
    assert log.read({"one": records[1].offset + 1}, 10) == []
    log.close()


def test_many_waiters_are_committed_together_and_each_gets_its_own(tmp_path: Path) -> None:
    log = SqliteLog(tmp_path / "one.sqlite", HybridClock())

    async def go() -> None:
        said = [rating(f"i{n}", "r", "up") for n in range(300)]
        stored = await asyncio.gather(*(log.append([event]) for event in said))
        assert [one[0].event_id for one in stored] == [event.event_id for event in said]
        assert len({one[0].stamp for one in stored}) == 300

    asyncio.run(go())
    log.close()


def test_a_stored_event_id_gives_back_what_is_stored(tmp_path: Path) -> None:
    log = SqliteLog(tmp_path / "one.sqlite", HybridClock())
    first = log.append_sync([rating("i", "r", "up", event_id="same")])
    again = log.append_sync([rating("i", "r", "down", event_id="same")])
    assert again == first
    assert len(log.read({}, 10)) == 1
    log.close()


def test_an_idempotency_key_with_another_body_is_refused_and_its_batch_too(tmp_path: Path) -> None:
    log = SqliteLog(tmp_path / "one.sqlite", HybridClock())
    log.append_sync([rating("i", "r", "up").model_copy(update={"idempotency": "k"})])
    with pytest.raises(IdempotencyMismatch, match="Idempotency-Key"):
        log.append_sync([rating("other", "r", "up"), rating("i", "r", "down").model_copy(update={"idempotency": "k"})])
    assert len(log.read({}, 10)) == 1
    log.close()


def test_a_version_from_the_future_is_refused_and_a_seen_one_is_passed(tmp_path: Path) -> None:
    clock = HybridClock(wall=lambda: 1_000_000)
    log = SqliteLog(tmp_path / "one.sqlite", clock)
    ahead = (1_000_000 + 60_000) << COUNTER_BITS  # one minute
    assert log.append_sync([rating("i", "r", "up", stamp=ahead)])[0].stamp == ahead + 1
    with pytest.raises(InvalidInput, match="version"):
        log.append_sync([rating("i", "r", "up", stamp=(1_000_000 + 2 * 3_600_000) << COUNTER_BITS)])
    log.close()


def test_stamps_go_on_above_what_is_stored_when_the_wall_clock_was_set_back(tmp_path: Path) -> None:
    log = SqliteLog(tmp_path / "one.sqlite", HybridClock(wall=lambda: 2_000_000))
    last = log.append_sync([rating("i", "r", "up")])[0].stamp
    log.close()
    log = SqliteLog(tmp_path / "one.sqlite", HybridClock(wall=lambda: 1_000_000))
    assert log.append_sync([rating("i", "r", "down")])[0].stamp == last + 1
    log.close()


def test_a_full_disk_says_not_durable_and_the_log_goes_on_when_there_is_room(tmp_path: Path) -> None:
    log = SqliteLog(tmp_path / "one.sqlite", HybridClock())
    kept = log.append_sync([rating("i", "r", "up")])
    blocker = sqlite3.connect(tmp_path / "one.sqlite", isolation_level=None)
    pages = blocker.execute("PRAGMA page_count").fetchone()[0]
    assert log._db is not None
    log._db.execute(f"PRAGMA max_page_count={pages}")  # SQLite answers SQLITE_FULL, as for a full disk
    with pytest.raises(NotDurable, match="full") as caught:
        log.append_sync([rating(f"i{n}", "r", "up" * 200) for n in range(200)])
    assert caught.value.retry_after_s == 2
    assert [record.event for record in log.read({}, 1000)] == kept
    blocker.close()
    assert len(log.append_sync([rating("later", "r", "up")])) == 1  # the connection was opened anew, without the limit
    assert len(log.read({}, 1000)) == 2
    log.close()


def test_an_empty_append_asks_the_disk(tmp_path: Path) -> None:
    log = SqliteLog(tmp_path / "one.sqlite", HybridClock())
    watcher = sqlite3.connect(tmp_path / "one.sqlite")
    before = watcher.execute("PRAGMA data_version").fetchone()
    assert log.append_sync([]) == [] and log.read({}, 10) == []
    assert watcher.execute("PRAGMA data_version").fetchone() != before  # a transaction without a write would succeed on a full disk
    watcher.close()
    log.close()


def test_bytes_that_are_no_event_are_handed_on_as_such(tmp_path: Path) -> None:
    log = SqliteLog(tmp_path / "one.sqlite", HybridClock())
    log.append_sync([rating("i", "r", "up")])
    other = sqlite3.connect(tmp_path / "one.sqlite")
    other.execute("INSERT INTO events (event_id, partition_key, value) VALUES ('x', 'x', ?)", (b"{}",))
    other.commit()
    other.close()
    assert [record.event is None for record in log.read({}, 10)] == [False, True]
    log.close()


def test_processes_of_one_name_write_partitions_of_their_own(tmp_path: Path) -> None:
    first, second = stores_in(tmp_path), stores_in(tmp_path)
    assert (first.log.partition, second.log.partition) == ("gateway", "gateway-1")
    first.log.append_sync([rating("i", "r", "up")])
    second.log.append_sync([clearing("i", "r")])
    assert {record.partition for record in first.logs.read({}, 10)} == {"gateway", "gateway-1"}
    assert len(first.logs.about("i")) == 2
    first.close()
    again = open_stores(second.settings)
    assert again.log.partition == "gateway"  # free again
    assert (tmp_path / "keys" / "kek").stat().st_mode & 0o777 == 0o600
    again.close()
    second.close()


def test_pruning_keeps_what_is_young_or_unread_or_unsent(tmp_path: Path) -> None:
    wall = [1_000]
    log = SqliteLog(tmp_path / "one.sqlite", HybridClock(wall=lambda: wall[0]))
    log.append_sync([rating("old", "r", "up")])
    wall[0] = 5_000
    log.append_sync([rating("young", "r", "up")])
    log.close()
    path = tmp_path / "one.sqlite"
    assert prune(path, archived=1, before_ms=2_000, only_sent=False) == 0  # offset 1 is not archived yet
    assert prune(path, archived=3, before_ms=2_000, only_sent=True) == 0
    assert prune(path, archived=3, before_ms=2_000, only_sent=False) == 1
    left = [record.event for record in SqliteLogs(tmp_path).read({}, 10)]
    assert [event.target for event in left if event is not None and event.type == "feedback.given"] == ["young"]


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2**41), st.integers(0, 2**40)), min_size=1, max_size=50))
def test_stamps_always_increase_and_pass_what_was_seen(steps: list[tuple[int, int]]) -> None:
    now = [0]
    clock, last = HybridClock(wall=lambda: now[0]), 0
    for wall, seen in steps:
        now[0] = wall  # the wall clock may jump anywhere
        stamp = clock.tick(after=seen << COUNTER_BITS)
        assert stamp > last and stamp > seen << COUNTER_BITS
        assert stamp >= wall << COUNTER_BITS
        last = stamp


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(ConfigError, match=r"feedback\.data_dir"):
        stores_in(blocked)
    assert os.listdir(tmp_path) == ["file"]
