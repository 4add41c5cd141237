"""Limits: what is counted, what a window is, and that a restart, another gateway and a broken file change nothing of it."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from pathlib import Path

import pytest

from feedback.config import LimitSettings
from feedback.errors import TooMany
from feedback.limits import UNLIMITED, InFlight, Limits

SETTINGS = LimitSettings(chat_per_minute=3, feedback_per_minute=2, feedback_per_day=3, changes=2, streams_per_key=2, streams_per_user=1)


class Clock:
    """Seconds that a test sets."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


def refused(what: Callable[[], object]) -> TooMany:
    with pytest.raises(TooMany) as caught:
        what()
    return caught.value


def test_a_window_begins_with_the_first_request_and_ends_a_minute_later(tmp_path: Path) -> None:
    clock = Clock()
    limits = Limits(tmp_path / "limits.sqlite", SETTINGS, clock)
    for second in (0, 10, 20):
        clock.now = 1_000_000.0 + second
        limits.chat("app")
    clock.now = 1_000_000.0 + 47.5
    error = refused(lambda: limits.chat("app"))
    assert (error.field, error.limit, error.retry_after_s) == ("limits.chat_per_minute", 3, 13)  # 12.5 s are left
    assert "3 within a minute" in error.message and "13 s" in error.message
    limits.chat("another app")
    clock.now = 1_000_000.0 + 60
    limits.chat("app")
    limits.close()


def test_what_one_limit_refuses_counts_under_no_other(tmp_path: Path) -> None:
    clock = Clock()
    limits = Limits(tmp_path / "limits.sqlite", SETTINGS, clock)
    limits.feedback("ann", "i1")
    limits.feedback("ann", "i1")
    for _ in range(5):
        assert refused(lambda: limits.feedback("ann", "i2")).field == "limits.feedback_per_minute"
    clock.now += 60
    limits.feedback("ann", "i2")  # the third of the day: the five refused ones were none
    error = refused(lambda: limits.feedback("ann", "i2"))
    assert (error.field, error.retry_after_s) == ("limits.feedback_per_day", 24 * 3600 - 60)
    clock.now += 24 * 3600
    assert refused(lambda: limits.feedback("ann", "i1")).field == "limits.changes"
    limits.feedback("ben", "i1")
    limits.close()


def test_a_restart_forgets_nothing_and_a_clock_that_steps_back_locks_nobody_out(tmp_path: Path) -> None:
    clock = Clock()
    for _ in range(3):
        limits = Limits(tmp_path / "limits.sqlite", SETTINGS, clock)
        limits.chat("app")
        limits.close()
    limits = Limits(tmp_path / "limits.sqlite", SETTINGS, clock)
    refused(lambda: limits.chat("app"))
    clock.now -= 3600
    limits.chat("app")
    limits.close()


def _take(path: Path, times: int) -> int:
    limits = Limits(path, LimitSettings(chat_per_minute=100), Clock())
    taken = 0
    for _ in range(times):
        try:
            limits.chat("app")
        except TooMany:
            continue
        taken += 1
    limits.close()
    return taken


def test_gateways_of_one_machine_count_together(tmp_path: Path) -> None:
    path = tmp_path / "limits.sqlite"
    assert _take(path, 1) == 1
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        taken = pool.starmap(_take, [(path, 80), (path, 80)])
    assert sum(taken) == 99  # of 100, one was taken before


def test_without_limits_no_file_is_made_and_a_broken_one_is_begun_anew(tmp_path: Path) -> None:
    path = tmp_path / "limits.sqlite"
    free = Limits(path, UNLIMITED)
    for _ in range(100):
        free.chat("app")
    assert not path.exists()
    path.write_bytes(b"this is no database" * 100)
    limits = Limits(path, SETTINGS, Clock())
    for _ in range(3):
        limits.chat("app")
    refused(lambda: limits.chat("app"))
    limits.close()


def test_what_cannot_be_counted_is_let_through(tmp_path: Path) -> None:
    limits = Limits(tmp_path / "no such folder" / "limits.sqlite", SETTINGS)
    for _ in range(10):
        limits.chat("app")
    assert not (tmp_path / "no such folder").exists()
    limits.close()


def test_windows_that_ended_are_forgotten(tmp_path: Path) -> None:
    clock = Clock()
    limits = Limits(tmp_path / "limits.sqlite", SETTINGS, clock)
    for number in range(50):
        limits.chat(f"app {number}")
    clock.now += 61
    limits.chat("app")
    assert limits._db is not None and limits._db.execute("SELECT COUNT(*) FROM used").fetchone() == (1,)
    limits.close()


def test_a_clock_that_was_far_ahead_leaves_nothing_for_good(tmp_path: Path) -> None:
    clock = Clock()
    limits = Limits(tmp_path / "limits.sqlite", SETTINGS, clock)
    clock.now += 365 * 24 * 3600
    limits.chat("app of next year")
    clock.now -= 365 * 24 * 3600
    limits.chat("app")
    assert limits._db is not None and limits._db.execute("SELECT who FROM used").fetchall() == [("app",)]
    limits.close()


def test_who_has_said_much_may_still_ask_for_erasure(tmp_path: Path) -> None:
    clock = Clock()
    limits = Limits(tmp_path / "limits.sqlite", SETTINGS, clock)
    for _ in range(2):
        limits.feedback("ann", "i1")
    refused(lambda: limits.feedback("ann", "i2"))
    for _ in range(2):
        limits.wish("ann")
    error = refused(lambda: limits.wish("ann"))
    assert error.retry_after_s == 24 * 3600 and error.message.startswith(
        "erasures and withdrawals that one person asks for: 2 within a day"
    )
    clock.now += 24 * 3600
    limits.wish("ann")
    limits.close()


def test_streams_in_flight_come_and_go() -> None:
    streams = InFlight(SETTINGS)
    ann = streams.enter("app", "ann")
    assert refused(lambda: streams.enter("app", "ann")).field == "limits.streams_per_user"
    ben = streams.enter("app", "ben")
    assert refused(lambda: streams.enter("app", "cyd")).field == "limits.streams_per_key"
    streams.leave(ann)
    streams.leave(streams.enter("app", "ann"))
    streams.leave(ben)
    assert not streams._open
