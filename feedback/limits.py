"""How much one caller may ask for in a while: counters that survive a restart, in a file that the gateways of one machine share.

A table of our own, because the stores of the library `limits` are memory or another server. Nothing waits for the disk here: the
file is never fsynced at a commit, so a power cut may forget the last second of counting and nothing else.
"""

from __future__ import annotations

import contextlib
import math
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import structlog

from feedback.config import LimitSettings
from feedback.errors import TooMany

SCHEMA = """
CREATE TABLE IF NOT EXISTS used (
    setting TEXT NOT NULL, who TEXT NOT NULL, ends_ms INTEGER NOT NULL, count INTEGER NOT NULL, PRIMARY KEY (setting, who)
) WITHOUT ROWID;
"""
MINUTE_S, DAY_S, MONTH_S = 60, 24 * 3600, 30 * 24 * 3600
FORGET_EVERY_S = 60.0
UNLIMITED = LimitSettings(chat_per_minute=0, streams_per_key=0, streams_per_user=0, feedback_per_minute=0, feedback_per_day=0, changes=0)
"""For simulated people and benchmarks, which ask faster than people do."""

log = structlog.get_logger()


@dataclass(frozen=True)
class Rule:
    """At most `most` within `window_s`, counted from the first; 0 for no limit."""

    setting: str
    what: str
    most: int
    window_s: int

    def refusal(self, wait_s: float) -> TooMany:
        retry_after_s = max(1, math.ceil(wait_s))
        setting = f"limits.{self.setting}"
        message = f"{self.what}: {self.most} within {_span(self.window_s)} is the limit ({setting}); come back in {retry_after_s} s."
        return TooMany(message, self.most, field=setting, retry_after_s=retry_after_s)


class Limits:
    """Counts in fixed windows. Thread-safe. Blocks for microseconds, or for milliseconds while another gateway writes, so it is called
    off the event loop."""

    def __init__(self, path: Path, settings: LimitSettings, now: Callable[[], float] = time.time) -> None:
        self._chat = Rule("chat_per_minute", "chat requests of one API key", settings.chat_per_minute, MINUTE_S)
        self._said = (
            Rule("feedback_per_minute", "feedback of one person", settings.feedback_per_minute, MINUTE_S),
            Rule("feedback_per_day", "feedback of one person", settings.feedback_per_day, DAY_S),
        )
        self._changes = Rule("changes", "changes of what one person says about one answer", settings.changes, MONTH_S)
        self._wishes = Rule("changes", "erasures and withdrawals that one person asks for", settings.changes, DAY_S)
        self._path = path
        self._now = now
        self._db: sqlite3.Connection | None = None
        self._lock = threading.Lock()
        self._forget_at = 0.0
        self._silent = False

    def chat(self, key: str) -> None:
        """Count one chat request. Raises TooMany."""
        self.take([(self._chat, key)])

    def feedback(self, rater: str, target: str) -> None:
        """Count one change of what the rater says about the target. Raises TooMany."""
        self.take([*((rule, rater) for rule in self._said), (self._changes, f"{rater} {target}")])

    def wish(self, person: str) -> None:
        """Count one erasure or withdrawal that the person asks for, whatever else they said today. Raises TooMany."""
        self.take([(self._wishes, f"{person} themselves")])

    def take(self, wanted: Sequence[tuple[Rule, str]]) -> None:
        """Count one under every rule, or under none and raise TooMany. What cannot be counted is let through, with a warning: a disk
        that takes no counters takes no events either, and says so itself."""
        wanted = [(rule, who) for rule, who in wanted if rule.most]
        if not wanted:
            return
        with self._lock:
            try:
                full = self._count(wanted)
                self._silent = False
            except sqlite3.Error as exc:
                self._give_up(exc)
                return
        if full:
            raise max(full, key=lambda error: error.retry_after_s or 0)

    def close(self) -> None:
        with self._lock:
            if self._db is not None:
                self._db.close()
                self._db = None

    def _count(self, wanted: Sequence[tuple[Rule, str]]) -> list[TooMany]:
        db = self._db = self._db or _open(self._path)
        now_s = self._now()
        now_ms = int(now_s * 1000)
        db.execute("BEGIN IMMEDIATE")
        full: list[TooMany] = []
        for rule, who in wanted:
            row = db.execute("SELECT ends_ms, count FROM used WHERE setting = ? AND who = ?", (rule.setting, who)).fetchone()
            ends_ms, count = row or (0, 0)
            # A window that ends later than it could was begun before the clock was set back.
            if not now_ms < ends_ms <= now_ms + rule.window_s * 1000:
                ends_ms, count = now_ms + rule.window_s * 1000, 0
            if count >= rule.most:
                full.append(rule.refusal((ends_ms - now_ms) / 1000))
            db.execute("REPLACE INTO used VALUES (?, ?, ?, ?)", (rule.setting, who, ends_ms, count + 1))
        # Also after the clock was set back: what was begun before that ends later than anything can.
        if not full and not self._forget_at - FORGET_EVERY_S <= now_s < self._forget_at:
            db.execute("DELETE FROM used WHERE ends_ms <= ? OR ends_ms > ?", (now_ms, now_ms + MONTH_S * 1000))
            self._forget_at = now_s + FORGET_EVERY_S
        db.execute("ROLLBACK" if full else "COMMIT")
        return full

    def _give_up(self, exc: sqlite3.Error) -> None:
        if self._db is not None:
            self._db.close()
            self._db = None
        if not self._silent:  # a failure that lasts is told once
            log.warning("limits are not counted", reason=f"{self._path}: {exc}")
            self._silent = True


class InFlight:
    """Streams that are open in this process, by name. For the event loop's thread alone."""

    def __init__(self, settings: LimitSettings) -> None:
        self._most = {"streams_per_key": settings.streams_per_key, "streams_per_user": settings.streams_per_user}
        self._open: Counter[tuple[str, str]] = Counter()

    def enter(self, key: str, user: str) -> Sequence[tuple[str, str]]:
        """Count one stream; `leave` takes what this returns. Raises TooMany."""
        names = [("streams_per_key", key), ("streams_per_user", user)]
        for name in names:
            most = self._most[name[0]]
            if most and self._open[name] >= most:
                whose = "API key" if name[0] == "streams_per_key" else "person"
                message = f"{most} answers of one {whose} are being written, the limit (limits.{name[0]}); come back when one has ended."
                raise TooMany(message, most, field=f"limits.{name[0]}", retry_after_s=1)
        self._open.update(names)
        return names

    def leave(self, names: Sequence[tuple[str, str]]) -> None:
        self._open.subtract(names)
        for name in names:
            if self._open[name] <= 0:
                del self._open[name]


def _open(path: Path) -> sqlite3.Connection:
    """The file's counters; a file that is none any more is begun anew."""
    for _ in range(2):
        db = sqlite3.connect(path, isolation_level=None, timeout=1.0, check_same_thread=False)
        try:
            db.execute("PRAGMA journal_mode=WAL")
            db.execute("PRAGMA synchronous=NORMAL")  # never fsynced at a commit, and no power cut can break the file
            db.execute("PRAGMA secure_delete=ON")  # a counter that an erasure deletes leaves no older copy of itself
            db.executescript(SCHEMA)
            return db
        except sqlite3.OperationalError:
            db.close()
            raise
        except sqlite3.DatabaseError as exc:
            db.close()
            log.warning("limits are counted anew", reason=f"{path}: {exc}")
            for suffix in ("", "-wal", "-shm"):
                with contextlib.suppress(OSError):
                    path.with_name(path.name + suffix).unlink()
    raise sqlite3.OperationalError(f"{path} cannot be made")


def _span(seconds: int) -> str:
    return {MINUTE_S: "a minute", DAY_S: "a day"}.get(seconds, f"{seconds // DAY_S} days")
