"""A small world under faults, a hundred times: does every history have an explanation? And are planted bugs found?

    make bench-history             100 seeds, then six bugs, each on a few seeds; an interrupted run goes on
    QUICK=1 make bench-history     2 seeds and all six bugs, in a minute

Two gateway processes with partitions of their own over one data folder, a reader of the archive, people who ask and rate, a trainer that
takes snapshots, an operator who moves `stable`. Meanwhile processes are killed and started again, paused, and one gateway's clock steps
back. Then all comes up again, and the history is checked.
"""

from __future__ import annotations

import asyncio
import random
import signal
import tempfile
import time
from collections import Counter
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import aiohttp

from benchmarks.checker import Anomaly, check
from benchmarks.gateway_process import Child, GatewayProcess, Spec, make_world, promote, running, two_adapters
from benchmarks.harness import FOLDER, Report, quick
from benchmarks.load import Person, Site, ask_routes, collect, pseudonyms, take_snapshot, what_gateways_say
from benchmarks.operations import History, Op, read
from benchmarks.planted import BUGS, Bug
from deploy.registry import Registry
from feedback.archive import Archive
from feedback.config import FeedbackSettings, Settings
from feedback.errors import PlauditError
from feedback.stores import open_stores

SEEDS, QUICK_SEEDS, BUG_SEEDS = 100, 2, 6
SECONDS, QUICK_SECONDS = 1.6, 1.2
PEOPLE = 6
SNAPSHOT_S = 0.12
STEP_BACK_MS = 45_000


class World:
    """The processes and stores of one run."""

    def __init__(self, folder: Path, seed: int, bug: str | None) -> None:
        self.folder, self.seed = folder, seed
        self.bug = BUGS[bug] if bug else Bug()
        data = folder / "data"
        self.adapters = two_adapters(FOLDER / "adapters")
        self.secret = make_world(data, FOLDER / "adapters")
        self.bug.archive(data / "archive.sqlite")
        self.gateways = [GatewayProcess(Spec(data, name, bug)) for name in ("north", "south")]
        self.reader = Child(data / "reader.out", keep_reading, data, bug)
        self.history = History(folder / "history.jsonl")
        self.stores = open_stores(Settings(feedback=FeedbackSettings(data_dir=data)), "operator")
        self.registry = Registry(self.stores.engine)
        # Only a planted bug gives the trainer another archive than everybody's.
        self.archives = [self.stores.archive, Archive(folder / "lagging.sqlite")] if self.bug.lagging else [self.stores.archive]
        self.snapshots = 0

    def ingest(self, archive: Archive | None = None) -> int:
        return (archive or self.stores.archive).ingest(self.bug.reader(self.stores.logs))

    def snapshot(self) -> None:
        """From the archive brought up to date, which the planted bug does once for the other one."""
        archive = self.archives[self.snapshots % len(self.archives)]
        if archive is self.stores.archive or self.snapshots == 1:
            self.ingest(archive)
        self.snapshots += 1
        take_snapshot(self.stores, archive, self.history, self.stores.settings.feedback.data_dir / "snapshots")

    def close(self) -> None:
        self.stores.close()
        self.history.close()
        for archive in self.archives[1:]:
            archive.close()


def keep_reading(ready: Connection, data: Path, bug: str | None) -> None:
    """The archive's reader, a process of its own; the trainer reads too, and both may."""
    stores = open_stores(Settings(feedback=FeedbackSettings(data_dir=data)), "reader")
    logs = (BUGS[bug] if bug else Bug()).reader(stores.logs)
    ready.send(True)
    while True:
        try:
            stores.archive.ingest(logs)
        except PlauditError as error:
            print(error, flush=True)
        time.sleep(0.02)


async def trouble(world: World, until: float) -> None:
    """One fault after the other, drawn by the seed, undone at the end."""
    luck = random.Random(f"trouble {world.seed}")
    faults = ["kill", "kill", "pause", "pause", "step", "reader"]
    luck.shuffle(faults)
    while time.monotonic() < until:
        await asyncio.sleep(luck.uniform(0.02, 0.15))
        gateway = luck.choice(world.gateways)
        fault = faults[0]
        faults.append(faults.pop(0))
        if fault == "kill":
            await asyncio.to_thread(gateway.kill)
            await asyncio.sleep(luck.uniform(0, 0.1))
            await asyncio.to_thread(gateway.start)
        elif fault == "pause":
            gateway.signal(signal.SIGSTOP)
            await asyncio.sleep(luck.uniform(0.1, 0.5))
            gateway.signal(signal.SIGCONT)
        elif fault == "step":
            world.gateways[1].clock_ms.value = -luck.randrange(STEP_BACK_MS)
        else:
            await asyncio.to_thread(world.reader.kill)
            await asyncio.to_thread(world.reader.start)


async def promotion(world: World, seconds: float) -> None:
    """The second adapter becomes the canary, and then stable, while people talk."""
    await asyncio.sleep(seconds * 0.3)
    half = seconds * 0.3
    await asyncio.to_thread(promote, world.registry, world.adapters[1].name, lambda state: time.sleep(half))


async def snapshots(world: World, until: float) -> None:
    while time.monotonic() < until:
        await asyncio.sleep(SNAPSHOT_S)
        await asyncio.to_thread(world.snapshot)


async def live(world: World, seconds: float) -> list[Anomaly]:
    """People, faults, quiet, check."""
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:
        stores, urls = world.stores, {gateway.spec.name: gateway.url for gateway in world.gateways}
        site = Site(lambda: list(urls.values()), world.secret, pseudonyms(stores), world.history, http)
        site.timeout_s, site.lose_share, site.hedge_share, site.leave_share = 0.25, 0.1, 0.15, 0.6
        until = time.monotonic() + seconds
        people = [Person(site, f"person{number}", world.seed) for number in range(PEOPLE)]
        lives = [person.live(lambda: time.monotonic() < until) for person in people]
        await asyncio.gather(*lives, trouble(world, until), promotion(world, seconds), snapshots(world, until))
        await site.settled()
        # A clean end waits for what is under way, so from here on all is quiet.
        await asyncio.gather(*(asyncio.to_thread(gateway.restart) for gateway in world.gateways))
        await asyncio.to_thread(world.ingest)
        await asyncio.to_thread(world.snapshot)
        said = await what_gateways_say(site, urls, list(site.tokens))
        await ask_routes(site, urls, world.registry.routing().stable.adapter)
    ops = read(world.folder / "history.jsonl")
    return check(ops, collect(stores, ops, said, site.tokens))


def run(seed: int, bug: str | None, seconds: float) -> dict[str, Any]:
    """One run in a folder of its own: what was found, and what happened in it."""
    with tempfile.TemporaryDirectory(prefix="plaudit-history-") as name:
        world = World(Path(name), seed, bug)
        try:
            with running(*world.gateways, world.reader):
                found = asyncio.run(live(world, seconds))
            ops = read(world.folder / "history.jsonl")
        finally:
            world.close()
    kinds = Counter(anomaly.kind for anomaly in found)
    return {"anomalies": dict(kinds), "first": [anomaly.what for anomaly in found[:5]], "operations": outcomes(ops)}


def outcomes(ops: list[Op]) -> dict[str, int]:
    return dict(sorted(Counter(f"{op.kind} {op.outcome}" for op in ops).items()))


def main() -> int:
    report = Report("history", seed=0, rooms=("benchmarks", "feedback", "deploy", "serving"))
    seconds, seeds = (QUICK_SECONDS, QUICK_SEEDS) if quick() else (SECONDS, SEEDS)
    anomalies: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for seed in range(seeds):
        cell = report.cells.get({"seed": seed, "seconds": seconds}, partial(run, seed, None, seconds))
        anomalies.update(cell["anomalies"])
        total.update(cell["operations"])
        if cell["anomalies"] or seed % 10 == 9:
            report.say(f"seed {seed}: {cell['anomalies'] or 'no anomaly'} {cell['first']}")
    caught: dict[str, int | None] = {}
    for bug in BUGS:
        caught[bug] = first_seed(report, bug, seconds)
        report.say(f"planted {bug}: {'seed ' + str(caught[bug]) if caught[bug] is not None else 'NOT CAUGHT'}")
    report.check("anomalies", sum(anomalies.values()), at_most=0)
    report.check("seeded runs", seeds, at_least=seeds)
    report.check("planted bugs caught", sum(seed is not None for seed in caught.values()), at_least=len(BUGS))
    report.control("each of six planted bugs is caught by a seed", caught=None not in caught.values())
    return report.finish({"anomalies": dict(anomalies), "operations": dict(total), "caught_by_seed": caught})


def first_seed(report: Report, bug: str, seconds: float) -> int | None:
    """The first seed whose run shows the bug as what it is."""
    for seed in range(BUG_SEEDS):
        cell = report.cells.get({"seed": seed, "bug": bug, "seconds": seconds}, partial(run, seed, bug, seconds))
        if bug in cell["anomalies"]:
            return seed
    return None


if __name__ == "__main__":
    raise SystemExit(main())
