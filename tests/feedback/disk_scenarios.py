"""What the sweep does while the disk fails. Runs with fail_io.c loaded and forks itself for every job that comes on its standard input.

A scenario may be begun again from the start: it says what was acknowledged, asks again for what was refused, and never says otherwise.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pyarrow.dataset  # here, so that no fork has to import them
import pyarrow.parquet  # noqa: F401
from disk_faults import REFUSED
from feedback_world import rating, stores_in

import feedback.sqlite_log as sqlite_log
from feedback import snapshot
from feedback.clock import HybridClock
from feedback.database import truncate_wal
from feedback.errors import ConfigError, Gone, NotDurable
from feedback.events import Sealed, StartedText
from feedback.partitions import SqliteLogs
from feedback.sqlite_log import SqliteLog
from feedback.stores import Stores

T = TypeVar("T")


@dataclass(frozen=True)
class Run:
    """One fork."""

    folder: Path
    said: Path
    stops: bool
    """Whether it dies where it is refused; otherwise it goes on once the disk works again."""
    careless: str = ""
    """Which planted bug it has."""

    def say(self, what: str) -> None:
        """Tell whoever checks; it goes past the shim, because the file lies elsewhere."""
        with self.said.open("a") as file:
            file.write(what + "\n")

    def insist(self, what: Callable[[], T]) -> T:
        """Do it; where it is refused, twice if the disk goes on failing, do it once more when the disk works again."""
        for last in (False, True):
            try:
                return what()
            except (NotDurable, ConfigError) as refusal:
                self.say(f"refused {refusal.message}")
                self.look()
                if self.stops:
                    os._exit(REFUSED)
                if last or os.environ["FAIL_IO_FOR_EVER"] != "1":
                    break
        os.environ["FAIL_IO_K"] = "0"
        return what()

    def look(self) -> None:
        """What another process would find in the log after a refusal, and could take for stored."""
        with contextlib.suppress(NotDurable):
            seen = SqliteLogs(self.folder / "log").read({}, 1000)
            self.say("shown " + " ".join(record.event.event_id for record in seen if record.event))

    def stores(self) -> Stores:
        return self.insist(lambda: stores_in(self.folder))


def append(run: Run) -> None:
    """Four ratings, the last two of them in one batch, into a log that does not exist yet."""
    log = run.insist(lambda: SqliteLog(run.folder / "log" / "gateway.sqlite", HybridClock()))
    for ids in (("e0",), ("e1",), ("e2", "e3")):
        events = [rating("i", f"r-{event_id}", "up", event_id=event_id) for event_id in ids]
        if run.careless == "hasty":
            run.say("\n".join(f"stored {event_id}" for event_id in ids))
            with contextlib.suppress(NotDurable):
                log.append_sync(events)
            continue
        for event in run.insist(lambda events=events: log.append_sync(events)):  # type: ignore[misc]
            run.say(f"stored {event.event_id}")


def checkpoint(run: Run) -> None:
    """Ratings in a log that is checkpointed after each commit, then emptied, then closed."""
    log = run.insist(lambda: SqliteLog(run.folder / "log" / "gateway.sqlite", HybridClock()))

    def commit(event_id: str) -> None:
        assert log._db is not None or log.append_sync([]) == []  # opens the file again after a failure
        assert log._db is not None
        log._db.execute("PRAGMA wal_autocheckpoint=1")
        log.append_sync([rating("i", "r", "up", event_id=event_id)])

    for number in range(3):
        run.insist(lambda number=number: commit(f"c{number}"))  # type: ignore[misc]
        run.say(f"stored c{number}")
    with contextlib.closing(sqlite_log.open_file(log.path)) as db:
        run.insist(lambda: truncate_wal(db, log.path.name))
    run.say("emptied")
    log.close()


def ingest(run: Run) -> None:
    """What lies in the log goes into the archive."""
    stores = run.stores()
    run.insist(stores.ingest)
    run.say("ingested")


def take(run: Run) -> None:
    """A snapshot is built."""
    stores = run.stores()
    built = run.insist(lambda: snapshot.build(stores.archive, stores.subjects, run.folder / "snapshots"))
    run.say(f"built {built.digest}")


def redact(run: Run) -> None:
    """One of two people is taken out of a snapshot."""
    with run.insist(lambda: _locked(run.folder / "snapshots")):
        for path in run.insist(lambda: snapshot.all_in(run.folder / "snapshots")):
            run.insist(lambda path=path: snapshot.redact(path, {"ann": 2**62}))  # type: ignore[misc]
            run.say(f"redacted {path.name}")


def _locked(folder: Path) -> contextlib.ExitStack:
    stack = contextlib.ExitStack()
    stack.enter_context(snapshot.locked(folder))
    return stack


def erase(run: Run) -> None:
    """A person's key is destroyed, and can be seen to be so while it was not."""
    stores = run.stores()
    sealed = run.folder / "sealed"
    box = Sealed.model_validate_json(sealed.read_text())
    with contextlib.suppress(Gone):
        stores.subjects.open(box, StartedText)  # the key is in this process's cache now
    run.insist(lambda: stores.subjects.erase("ann", 5, by="tests"))
    try:
        stores.subjects.open(box, StartedText)
    except Gone:
        run.say("erased")
    else:
        run.say("still readable")


SCENARIOS: dict[str, Callable[[Run], None]] = {f.__name__: f for f in (append, checkpoint, ingest, take, redact, erase)}


def plant(careless: str) -> None:
    """Break what this run stands on."""
    if careless == "unsynced":
        opened = sqlite_log.open_file

        def lightly(path: Path) -> Any:
            db = opened(path)
            db.execute("PRAGMA synchronous=OFF")
            return db

        vars(sqlite_log).update(open_file=lightly)
    elif careless == "unsettled":
        vars(sqlite_log).update(settle=lambda db: None, report_damage=lambda db: 0)
    elif careless == "forthcoming":
        SqliteLog._abandon = _close  # type: ignore[method-assign,assignment]
    elif careless == "undurable mode":
        vars(sqlite_log).update(settle=lambda db: None)

        def without_asking(db: sqlite3.Connection) -> None:
            for pragma in ("journal_mode=WAL", "synchronous=FULL"):
                db.execute(f"PRAGMA {pragma}")

        vars(sqlite_log).update(configure=without_asking)


def _close(log: SqliteLog) -> None:
    if log._db is not None:
        log._db.close()
        log._db = None


def work(job: dict[str, Any]) -> int:
    """Run one job in a fork of this process; the exit code."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        os.environ.update(job["environment"])
        plant(job["careless"])
        SCENARIOS[job["scenario"]](Run(Path(job["folder"]), Path(job["said"]), job["stops"], job["careless"]))
        code = 0
    finally:
        if code:
            traceback.print_exc()
        os._exit(code)  # without closing anything: nothing durable may hang on it


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the scenarios log goes elsewhere
    for line in sys.stdin:
        print(work(json.loads(line)), file=answers, flush=True)
