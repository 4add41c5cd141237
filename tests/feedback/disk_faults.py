"""Makes the k-th operation of a scenario fail, for k = 1, 2, ... until the scenario ends without it, and looks at what is left.

After each run there are two folders to look at: what the process left, and what a power cut would have left of it. In both, everything
that was acknowledged must be there, and every file must be whole.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from feedback_world import answered, rating, stores_in

from feedback import snapshot
from feedback.errors import Gone, PlauditError
from feedback.events import Sealed, StartedText
from feedback.partitions import SqliteLogs

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SHIM = HERE / "faults" / "fail_io.c"
REFUSED = 7
"""The exit code of a run that stopped where it was refused."""


@dataclass(frozen=True)
class Fault:
    """Which calls fail, how, and what becomes of the process."""

    calls: str
    error: int
    for_ever: bool
    stops: bool = False


FAULTS = {
    "disk full": Fault("write", errno.ENOSPC, True),
    "disk read-only": Fault("write", errno.EROFS, True, stops=True),
    "write error": Fault("write", errno.EIO, False),
    "fsync error": Fault("sync", errno.EIO, False),
    "fsync errors": Fault("sync", errno.EIO, True),
    "fsync error, then killed": Fault("sync", errno.EIO, False, stops=True),
    "rename error": Fault("name", errno.EIO, False),
}


@dataclass
class Found:
    """What a sweep came to."""

    runs: int = 0
    """In how many the fault was met."""
    last: int = 0
    """The greatest k that was."""
    refused: int = 0
    """In how many of these runs the process said that something was not durable."""
    problems: list[str] = field(default_factory=list)


def compile_shim(folder: Path) -> Path:
    """fail_io.c as a library."""
    library = folder / "fail_io.so"
    flags = ["-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror", "-ldl", "-lpthread"]
    command = ["cc", "-o", str(library), str(SHIM), *flags]
    subprocess.run(command, check=True)
    return library


class Worker:
    """The process that forks itself for each run, with the shim loaded."""

    def __init__(self, library: Path) -> None:
        paths = (ROOT, HERE)
        environment = os.environ | {"LD_PRELOAD": str(library), "PYTHONPATH": os.pathsep.join(map(str, paths))}
        command = [sys.executable, str(HERE / "disk_scenarios.py")]
        self.process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def run(self, job: dict[str, object]) -> int:
        """The exit code of one run."""
        to, back = self.process.stdin, self.process.stdout
        assert to is not None and back is not None
        to.write(json.dumps(job).encode() + b"\n")
        to.flush()
        return int(back.readline())

    def close(self) -> None:
        streams: tuple[IO[bytes] | None, ...] = (self.process.stdin, self.process.stdout)
        for stream in streams:
            if stream is not None:
                stream.close()
        self.process.wait()


def sweep(worker: Worker, scenario: str, fault: Fault, folder: Path, careless: str = "", step: int = 1) -> Found:
    """Every `step`-th k."""
    begin = folder / "begin"
    prepare(scenario, begin)
    found = Found()
    for k in range(1, 10_000, step):
        here = folder / "run"
        real, disk, said, mark = here / "real", here / "disk", here / "said", here / "mark"
        for place in (real, disk):
            shutil.copytree(begin, place)
        environment = {
            "FAIL_IO_FOLDER": str(real.resolve()),
            "FAIL_IO_DISK": str(disk.resolve()),
            "FAIL_IO_CALLS": fault.calls,
            "FAIL_IO_K": str(k),
            "FAIL_IO_FOR_EVER": "1" if fault.for_ever else "0",
            "FAIL_IO_ERRNO": str(fault.error),
            "FAIL_IO_MARK": str(mark),
        }
        job = {"scenario": scenario, "folder": str(real), "said": str(said), "stops": fault.stops, "careless": careless}
        code = worker.run(job | {"environment": environment})
        if code == REFUSED:
            code = worker.run(job | {"environment": environment | {"FAIL_IO_K": "0"}})
        lines = said.read_text().splitlines() if said.exists() else []
        told = [f"ended with {code}"] if code else []
        for place in (real, disk):
            told += [f"{place.name}: {problem}" for problem in check(scenario, place, lines)]
        found.problems += [f"k={k}: {problem}" for problem in told]
        met = mark.exists()
        shutil.rmtree(here)
        if not met:
            break
        found.runs, found.last = found.runs + 1, k
        found.refused += any(line.startswith("refused") for line in lines)
    return found


def prepare(scenario: str, folder: Path) -> None:
    """What lies on the disk before the scenario begins."""
    folder.mkdir(parents=True)
    if scenario in ("append", "checkpoint"):
        return
    stores = stores_in(folder)
    for who in ("ann", "bob"):
        stores.log.append_sync([*answered(stores, f"i-{who}", who, "Slice it."), rating(f"i-{who}", who, "up", event_id=f"r-{who}")])
    box = stores.subjects.seal(("ann",), StartedText(messages=[{"role": "user", "content": "secret"}]))
    (folder / "sealed").write_text(box.model_dump_json())
    if scenario != "ingest":
        stores.ingest()
    if scenario == "redact":
        snapshot.build(stores.archive, stores.subjects, folder / "snapshots")
    stores.close()


def check(scenario: str, folder: Path, said: list[str]) -> list[str]:
    """What is wrong with what lies in the folder after this was said about it."""
    problems = list(shown_early(said)) if scenario == "append" else []
    problems += [f"{path.name}: {fault}" for path in folder.rglob("*.sqlite") for fault in broken(path)]
    if problems:
        return problems
    promised = [line.split(" ", 1) for line in said if not line.startswith(("refused", "shown"))]
    try:
        return list(CHECKS[scenario](folder, {what: [line[-1] for line in promised if line[0] == what] for what, *_ in promised}))
    except (PlauditError, sqlite3.Error) as exc:
        return [f"cannot be read: {exc!r}"]


def shown_early(said: list[str]) -> Iterator[str]:
    """What a reader could see of what had been refused."""
    acknowledged: set[str] = set()
    for line in said:
        what, *ids = line.split()
        if what == "stored":
            acknowledged |= set(ids)
        elif what == "shown" and not acknowledged.issuperset(ids):
            yield f"{line} was refused and is shown"


def broken(path: Path) -> list[str]:
    with contextlib.closing(sqlite3.connect(path)) as db:
        try:
            return [row[0] for row in db.execute("PRAGMA integrity_check") if row[0] != "ok"]
        except sqlite3.DatabaseError as exc:
            return [str(exc)]


def _stored(folder: Path, said: dict[str, list[str]]) -> Iterator[str]:
    events = [record.event for record in SqliteLogs(folder / "log").read({}, 1000)]
    ids = [event.event_id for event in events if event is not None]
    yield from (f"{event_id} was acknowledged and is not stored" for event_id in said.get("stored", []) if event_id not in ids)
    if len(ids) != len(set(ids)):
        yield f"stored twice: {ids}"
    stamps = [event.stamp for event in events if event is not None]
    if stamps != sorted(set(stamps)):
        yield f"stamps go back: {stamps}"


def _ingested(folder: Path, said: dict[str, list[str]]) -> Iterator[str]:
    stores = stores_in(folder)
    try:
        if "ingested" in said and stores.archive.positions().get("gateway") != 7:
            yield f"it was acknowledged and the archive has come to {stores.archive.positions()} of 6 events"
        stores.ingest()
        counts = stores.archive.counts()
        if (counts["interaction.started"], counts["interaction.finished"], counts["feedback.given"]) != (2, 2, 2):
            yield f"the archive holds {counts}, the log two of each"
    finally:
        stores.close()


def _taken(folder: Path, said: dict[str, list[str]]) -> Iterator[str]:
    snapshots = folder / "snapshots"
    for digest in said.get("built", []):
        if not (snapshots / digest / snapshot.HEAD_FILE).exists():
            yield f"snapshot {digest} was acknowledged and is not there"
    for head in snapshots.glob("[!.]*/snapshot.json"):
        if len(snapshot.load(head.parent).rows) != 2:
            yield f"snapshot {head.parent.name} is not whole"


def _redacted(folder: Path, said: dict[str, list[str]]) -> Iterator[str]:
    with snapshot.locked(folder / "snapshots"):
        paths = snapshot.all_in(folder / "snapshots")
    if len(paths) != 1:
        yield f"{len(paths)} snapshots are left of one"
    for path in paths:
        whose = {row.rater for row in snapshot.load(path).rows}
        if "bob" not in whose or ("redacted" in said and "ann" in whose):
            yield f"rows of {sorted(whose)} are left, after {said}"


def _erased(folder: Path, said: dict[str, list[str]]) -> Iterator[str]:
    if "still" in said:
        yield "the erasure was acknowledged while the process still read"
    stores = stores_in(folder)
    try:
        box = Sealed.model_validate_json((folder / "sealed").read_text())
        stores.subjects.open(box, StartedText)
        if "erased" in said:
            yield "the erasure was acknowledged and the key is still there"
    except Gone:
        pass
    finally:
        stores.close()


CHECKS: dict[str, Callable[[Path, dict[str, list[str]]], Iterator[str]]] = {
    "append": _stored,
    "checkpoint": _stored,
    "ingest": _ingested,
    "take": _taken,
    "redact": _redacted,
    "erase": _erased,
}
