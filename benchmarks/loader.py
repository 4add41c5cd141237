"""Does anything reach the model server that is not an honest adapter, or not the bytes that were hashed?

    make bench-loader              every hostile adapter, 200 single-byte flips, 100 exchanges of each kind
    QUICK=1 make bench-loader      40 flips, 10 exchanges of each kind

The server is a double that reads the files of the path that it is told, as vLLM does, and remembers what it read. The exchanges come from
a thread that swaps a file, the folder, or a link to it at random moments while the agent works. Controls: an agent that only looks at
names, and one that hashes a folder and then has the server load that folder.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import random
import shutil
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import structlog

from benchmarks.harness import Report, quick
from benchmarks.hostile import CASES
from benchmarks.sealed import MAX_RANK, honest, make_policy
from deploy.engine import Scripted
from deploy.loading import FILES, Intake
from deploy.manifest import CONFIG, WEIGHTS, read_manifest, verify, vllm_name
from deploy.replica import ReplicaAgent
from feedback.errors import EngineRefused, PlauditError

SEED = 0
FLIPS, EXCHANGES, HONEST = 200, 100, 20
KINDS = ("file", "folder", "link", "the private copy")
REQUEST_S = 0.003
"""From the agent's request to the server's first look at the files. vLLM hands it on to its engine's process first."""
LATEST_S = 0.004
"""The exchanging thread waits at most so long between two exchanges."""
COPY_LATEST_S = 0.06
"""With the private copy longer, or it would never be left alone while it is checked and loaded."""


class Reading(Scripted):
    """A server that reads what it is told to load, from the path, when it is told."""

    def __init__(self) -> None:
        super().__init__(lambda name, messages: "")
        self.read: dict[str, dict[str, str]] = {}
        """For each loaded name the digests of the files that were read."""

    async def load(self, name: str, path: Path) -> None:
        await asyncio.sleep(REQUEST_S)
        try:
            self.read[name] = await asyncio.to_thread(lambda: {file: _digest(path / file) for file in (CONFIG, WEIGHTS)})
        except OSError as exc:
            raise EngineRefused(f"the model server refused with 500: {exc}") from exc
        self.loaded.setdefault(name, path)

    async def unload(self, name: str) -> None:
        await super().unload(name)
        self.read.pop(name, None)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Trial:
    """One agent, one server, one adapter that is wanted."""

    def __init__(self, policy: Path, folder: Path, source: Path) -> None:
        self.source, self.name = source, vllm_name(source.name)
        self.engine = Reading()
        self.held: set[str] = set()
        self.intake = Intake.of(policy, folder / "private", MAX_RANK)
        self.agent = ReplicaAgent(self.engine, None, lambda: {self.name: source}, self._hear, 0.0, self.intake)

    def _hear(self, names: set[str]) -> None:
        self.held = names

    @property
    def problem(self) -> str | None:
        return self.agent.problems.get(self.name)

    def step(self) -> None:
        asyncio.run(self.agent.step())


def hostile(policy: Path, folder: Path) -> dict[str, Any]:
    """Every hostile adapter to an agent as it is, and to one that looks at names only."""
    let_through, by_names, odd = [], [], []
    for number, (what, (make, reason)) in enumerate(CASES.items()):
        place = folder / str(number)
        source = make(honest(policy, place / "store"))
        trial = Trial(policy, place, source)
        trial.step()
        if trial.engine.loaded or trial.held:
            let_through.append(what)
        elif reason not in (trial.problem or ""):
            odd.append(f"{what}: {trial.problem}")
        by_names += [what] if only_names(source) else []
        shutil.rmtree(place)
    return {
        "tried": len(CASES),
        "let_through": let_through,
        "other_reason": odd,
        "by_names": len(by_names),
        "by_names_examples": by_names[:3],
    }


def only_names(source: Path) -> bool:
    """The control: takes whatever has the right names."""
    return source.is_dir() and {path.name for path in source.iterdir()} == set(FILES) and (source / WEIGHTS).exists()


def flips(policy: Path, folder: Path, count: int) -> dict[str, Any]:
    """One byte of one file changed, every file as often as the others; all of an honest adapter."""
    draw = random.Random(SEED)
    taken, files = [], Counter[str]()
    for number in range(count):
        place = folder / str(number)
        source = honest(policy, place / "store").seal()
        path = source / FILES[number % len(FILES)]
        raw = bytearray(path.read_bytes())
        at = draw.randrange(len(raw))
        raw[at] ^= draw.randrange(1, 256)
        path.write_bytes(raw)
        trial = Trial(policy, place, source)
        trial.step()
        files[path.name] += 1
        if trial.engine.loaded or trial.held:
            taken.append(f"{path.name} at {at}")
        shutil.rmtree(place)
    return {"tried": count, "files": dict(files), "taken": taken}


class Exchanger(threading.Thread):
    """Swaps two paths of one folder again and again at random moments."""

    def __init__(self, swap: Callable[[], None], draw: random.Random, latest_s: float) -> None:
        super().__init__()
        self._swap, self._draw, self._latest_s = swap, draw, latest_s
        self._done = threading.Event()
        self.swaps = 0

    def run(self) -> None:
        while not self._done.is_set():
            with contextlib.suppress(OSError):
                self._swap()
                self.swaps += 1
            self._done.wait(self._draw.random() * self._latest_s)

    def end(self) -> None:
        self._done.set()
        self.join()


def swapper(kind: str, trial_root: Path, source: Path, other: Path) -> Callable[[], None]:
    """What the thread does once: a rename is atomic, so a reader finds the one or the other."""
    if kind == "the private copy":
        return lambda: _exchange_copies(trial_root, other)
    if kind == "file":
        spare = source.parent / "spare"
        shutil.copyfile(other / WEIGHTS, spare)
        return lambda: _exchange(source / WEIGHTS, spare)
    if kind == "folder":
        return lambda: _exchange(source, other)
    link = source.parent / "link"
    link.symlink_to(other)
    return lambda: _exchange(source, link)


def _exchange(one: Path, other: Path) -> None:
    away = one.parent / ".away"
    one.rename(away)
    try:
        other.rename(one)
    finally:
        away.rename(other if not other.exists() and not other.is_symlink() else one)


def _exchange_copies(root: Path, other: Path) -> None:
    """What somebody with the agent's own rights could do: other weights into the private copy, and the right ones back."""
    for folder in root.glob("*-*"):
        if not (spare := root.parent / "spare").exists():
            shutil.copyfile(other / WEIGHTS, spare)
        _exchange(folder / WEIGHTS, spare)


@contextlib.contextmanager
def exchanging(swap: Callable[[], None], draw: random.Random, latest_s: float = LATEST_S) -> Iterator[Exchanger]:
    thread = Exchanger(swap, draw, latest_s)
    thread.start()
    try:
        yield thread
    finally:
        thread.end()


def exchange(policy: Path, folder: Path, kind: str, count: int) -> dict[str, Any]:
    """How often the agent refused, held what was hashed, or held something else; and what the control's server read."""
    draw = random.Random(f"{SEED} {kind}")
    outcomes: Counter[str] = Counter()
    swaps = 0
    for number in range(count):
        place = folder / str(number)
        source = honest(policy, place / "store").seal()
        other = honest(policy, place / "store", seed=1).seal()
        right = read_manifest(source).files
        trial = Trial(policy, place, source)
        latest_s = COPY_LATEST_S if kind == KINDS[-1] else LATEST_S
        with exchanging(swapper(kind, trial.intake.root, source, other), draw, latest_s) as thread:
            time.sleep(draw.random() * LATEST_S)
            trial.step()
            # What is held now is what people would be answered with; the look at it comes first.
            held, read = trial.name in trial.held, trial.engine.read.get(trial.name)
        swaps += thread.swaps
        outcomes["refused" if not held else "as hashed" if read == right else "something else"] += 1
        shutil.rmtree(place)
    return {"kind": kind, "tried": count, "swaps": swaps, **{each: outcomes[each] for each in ("refused", "as hashed", "something else")}}


def fooled(policy: Path, folder: Path, kind: str, count: int) -> dict[str, Any]:
    """The control: how often an agent that hashes the folder and then has the server load that folder holds something else."""
    draw = random.Random(f"{SEED} control {kind}")
    found = 0
    for number in range(count):
        place = folder / str(number)
        source = honest(policy, place / "store").seal()
        other = honest(policy, place / "store", seed=1).seal()
        right, engine = read_manifest(source).files, Reading()
        with exchanging(swapper(kind, place, source, other), draw), contextlib.suppress(PlauditError, OSError):
            time.sleep(draw.random() * LATEST_S)
            verify(source)
            asyncio.run(engine.load("it", source))
            found += engine.read["it"] != right
        shutil.rmtree(place)
    return {"tried": count, "something else": found}


def honest_ones(policy: Path, folder: Path, count: int) -> dict[str, Any]:
    """Honest adapters are held, each as it was hashed; milliseconds of one take."""
    held, took_ms = 0, []
    for seed in range(count):
        source = honest(policy, folder / "store", seed).seal()
        trial = Trial(policy, folder / str(seed), source)
        began = time.perf_counter()
        trial.step()
        took_ms.append(1000 * (time.perf_counter() - began))
        held += trial.name in trial.held and trial.engine.read[trial.name] == read_manifest(source).files
    return {"tried": count, "held": held, "median_ms": round(sorted(took_ms)[count // 2], 1)}


def main() -> int:
    structlog.configure(processors=[_quiet])
    report = Report("loader", seed=SEED, rooms=("deploy", "benchmarks/hostile.py", "benchmarks/sealed.py"))
    count_flips, count_exchanges = (40, 10) if quick() else (FLIPS, EXCHANGES)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        policy = make_policy(folder / "policy")
        good = report.cells.get({"what": "honest", "count": HONEST}, lambda: honest_ones(policy, folder / "honest", HONEST))
        report.check("honest adapters held, of all", good["held"] / good["tried"], at_least=1)
        bad = report.cells.get({"what": "hostile"}, lambda: hostile(policy, folder / "hostile"))
        report.say(f"hostile: {bad['tried']} tried, {len(bad['let_through'])} let through")
        report.check("kinds of hostile adapters", bad["tried"], at_least=40)
        report.check("hostile adapters that reached the server", len(bad["let_through"]), at_most=0)
        report.check("hostile adapters refused for another reason than theirs", len(bad["other_reason"]), at_most=0)
        flipped = report.cells.get({"what": "flips", "count": count_flips}, lambda: flips(policy, folder / "flips", count_flips))
        report.check(f"single-byte changes of {flipped['tried']} that reached the server", len(flipped["taken"]), at_most=0)
        rows, controls = [], {}
        for kind in KINDS:
            key = {"what": "exchange", "kind": kind, "count": count_exchanges}
            row = report.cells.get(key, partial(exchange, policy, folder / kind, kind, count_exchanges))
            rows.append({each: row[each] for each in ("kind", "tried", "swaps", "refused", "as hashed", "something else")})
            report.say(str(rows[-1]))
            if kind != KINDS[-1]:  # the control has no copy
                key = {"what": "control", "kind": kind, "count": count_exchanges}
                naive = report.cells.get(key, partial(fooled, policy, folder / f"control-{kind}", kind, count_exchanges))
                controls[kind] = naive["something else"]
        report.check("exchanges after which something else than was hashed was held", sum(row["something else"] for row in rows), at_most=0)
    report.control(
        f"an agent that looks at names lets {bad['by_names']} of {bad['tried']} through; one that hashes and then has that folder loaded "
        f"holds something else in {sum(controls.values())} of {3 * count_exchanges} exchanges",
        caught=bad["by_names"] > 0 and all(controls.values()),
    )
    figures = {"table": rows, "hostile": bad, "flips": flipped, "honest": good, "control": controls, "user": os.geteuid()}
    return report.finish(figures)


def _quiet(*_: object) -> Any:
    raise structlog.DropEvent


if __name__ == "__main__":
    raise SystemExit(main())
