"""kill -9, ninety times, under load: is anything lost that was acknowledged, or counted twice? And what if Kafka is away for ten minutes?

    make bench-kill             five rounds of 18 kills, the control, the outage; an interrupted run goes on
    QUICK=1 make bench-kill     12 kills, the control, a short outage, in a minute

Two gateways with partitions of their own, a relay that carries them to a real Kafka broker, two archive readers that share its topic.
People chat, rate while the answer streams, change their minds, clear, compare and choose. Everything is killed and started again, in an
order drawn by the seed. The control is a gateway that acknowledges before it writes. The outage is compressed in time: as many events as
ten minutes bring at 50/s, as fast as two gateways take them.
"""

from __future__ import annotations

import asyncio
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import aiohttp

from benchmarks.checker import check
from benchmarks.gateway_process import Child, GatewayProcess, Spec, make_world, running
from benchmarks.harness import FOLDER, Report, quick
from benchmarks.history import keep_reading as read_partitions
from benchmarks.load import Person, Site, collect, pseudonyms, take_snapshot, what_gateways_say
from benchmarks.operations import History, Op, read
from deploy.broker import Broker, missing
from feedback import outbox
from feedback.archive import Archive
from feedback.clock import HybridClock
from feedback.config import FeedbackSettings, KafkaSettings, Settings
from feedback.errors import NotDurable, PlauditError
from feedback.kafka_log import KafkaLog
from feedback.readers import GroupReader
from feedback.relay import Relay
from feedback.sqlite_log import open_file
from feedback.stores import open_stores

ROUNDS = 5
VICTIMS = {"gateway": 10, "relay": 2, "broker": 2, "reader": 4}
QUICK_VICTIMS = {"gateway": 7, "relay": 2, "broker": 1, "reader": 2}
CONTROL_KILLS, QUICK_CONTROL_KILLS = 10, 4
PEOPLE, THINK_S, HEDGE_SHARE = 8, 0.05, 0.05
ASKED = 200
"""Cells that each gateway is asked about in the end."""
INTAKE, OUTAGE_S, FASTER = 50, 600, 10
"""Events a second, seconds of outage, and how many times faster than that it has to drain."""
QUICK_OUTAGE_S = 20
DRAIN_S = 120.0


class System:
    """All processes over one data folder; without a broker the archive's reader reads the partitions themselves."""

    def __init__(self, folder: Path, broker: Broker | None, *, bug: str | None = None, token_s: float = 0.002) -> None:
        data = folder / "data"
        self.secret = make_world(data, FOLDER / "adapters")
        self.broker = broker
        self.gateways = [GatewayProcess(Spec(data, name, bug, token_s)) for name in ("north", "south")]
        self.relays, self.readers = list[Child](), [Child(data / "reader.out", read_partitions, data, None)]
        if broker is not None:
            names = {"topic": f"kill-{time.time_ns()}", "group": f"kill-{time.time_ns()}"}
            self.kafka = KafkaSettings(bootstrap=broker.bootstrap, session_timeout_s=2.0, delivery_timeout_s=5.0, **names)
            self.relays = [Child(data / "relay.out", keep_relaying, data, self.kafka)]
            self.readers = [Child(data / f"{name}.out", keep_reading, data, self.kafka, name) for name in ("reader-a", "reader-b")]
        self.history_path = folder / "history.jsonl"
        self.history = History(self.history_path)
        self.stores = open_stores(Settings(feedback=FeedbackSettings(data_dir=data)), "operator")

    @contextmanager
    def up(self) -> Iterator[None]:
        """Everything but the broker runs; ended in the end."""
        try:
            with running(*self.gateways, *self.relays, *self.readers):
                yield
        finally:
            self.stores.close()
            self.history.close()

    def site(self, http: aiohttp.ClientSession) -> Site:
        return Site(lambda: [gateway.url for gateway in self.gateways], self.secret, pseudonyms(self.stores), self.history, http)

    def waiting(self) -> int:
        """Rows that Kafka does not have yet."""
        return outbox.count(self.stores.logs.partitions(), outbox.WAITS) if self.broker else 0

    def unread(self) -> int:
        """Events that lie in a partition and not in the archive."""
        written: set[str] = set()
        for path in self.stores.logs.partitions():
            with closing(open_file(path)) as db:
                written |= {row[0] for row in db.execute("SELECT event_id FROM events")}
        counts = self.stores.archive.counts()
        return len(written) - sum(number for kind, number in counts.items() if "." in kind)


def keep_relaying(ready: Connection, data: Path, settings: KafkaSettings) -> None:
    """`plaudit relay`."""
    relay = Relay(data / "log", settings)
    ready.send(True)
    while True:
        time.sleep(1)
        print(relay.sent, relay.dead, relay.problem, flush=True)


def keep_reading(ready: Connection, data: Path, settings: KafkaSettings, member: str) -> None:
    """`plaudit archive`."""
    archive = Archive(data / "archive.sqlite")
    reader = GroupReader(archive, settings, member)
    ready.send(True)
    while True:
        try:
            reader.catch_up()
        except PlauditError as error:
            print(error, flush=True)
            time.sleep(0.5)


def kill_one(system: System, victim: str, luck: random.Random) -> None:
    """And start it again."""
    if victim == "broker" and system.broker is not None:
        system.broker.kill()
        time.sleep(luck.uniform(0, 0.5))
        system.broker.start()
        return
    those: dict[str, Sequence[Child]] = {"gateway": system.gateways, "relay": system.relays, "reader": system.readers}
    child = luck.choice(those[victim])
    child.kill()
    time.sleep(luck.uniform(0, 0.2))
    child.start()


async def killing(system: System, victims: list[str], luck: random.Random) -> None:
    """One after the other; while the broker starts again, which takes seconds, others are killed."""
    starting: asyncio.Future[None] | None = None
    for victim in victims:
        await asyncio.sleep(luck.uniform(0.05, 0.4))
        if victim != "broker":
            await asyncio.to_thread(kill_one, system, victim, luck)
            continue
        if starting is not None:
            await starting
        starting = asyncio.ensure_future(asyncio.to_thread(kill_one, system, victim, luck))
    if starting is not None:
        await starting


@contextmanager
def a_broker() -> Iterator[tuple[Path, Broker]]:
    """A folder for a system, and a broker of its own."""
    with tempfile.TemporaryDirectory(prefix="plaudit-kill-") as name:
        broker = Broker(Path(name) / "kafka")
        broker.start()
        try:
            yield Path(name), broker
        finally:
            broker.kill()


def kills(folder: Path, broker: Broker | None, seed: int, victims: Mapping[str, int], bug: str | None = None) -> dict[str, Any]:
    """Kill so many of each kind under load: what was killed, what happened, and every anomaly."""
    luck = random.Random(f"kills {seed}")
    order = [victim for victim, times in victims.items() for _ in range(times)]
    luck.shuffle(order)
    system = System(folder, broker, bug=bug)
    with system.up():
        found = asyncio.run(under_load(system, seed, partial(killing, system, order, luck)))
    return {**found, "killed": dict(Counter(order)), "topic": system.kafka.topic if broker else ""}


def one_round(seed: int, victims: Mapping[str, int]) -> dict[str, Any]:
    with a_broker() as (folder, broker):
        found = kills(folder, broker, seed, victims)
        return {**found, "sent_again": sent_again(KafkaSettings(bootstrap=broker.bootstrap, topic=found["topic"]))}


def control(times: int) -> dict[str, Any]:
    """Gateways that acknowledge before they write, and no Kafka: the checker has to miss something."""
    with tempfile.TemporaryDirectory(prefix="plaudit-kill-") as name:
        return kills(Path(name), None, 0, {"gateway": times}, bug="lost write")


def outage(seconds: int) -> dict[str, Any]:
    """Kafka goes away, as much happens as in so many seconds at INTAKE, Kafka comes back."""
    with a_broker() as (folder, broker):
        system = System(folder, broker, token_s=0.0)
        with system.up():
            return asyncio.run(without_kafka(system, broker, INTAKE * seconds))


async def without_kafka(system: System, broker: Broker, events: int) -> dict[str, Any]:
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:
        site = system.site(http)
        site.timeout_s = 10.0
        await asyncio.to_thread(broker.kill)
        began = time.monotonic()

        async def enough() -> None:
            while await asyncio.to_thread(system.waiting) < events:
                await asyncio.sleep(0.2)

        filling = asyncio.create_task(enough())
        await asyncio.gather(filling, *(Person(site, f"person{number}", 0).hurry(filling.done) for number in range(PEOPLE)))
        took, backlog = time.monotonic() - began, system.waiting()
        await asyncio.to_thread(broker.start)
        back = time.monotonic()
        while (left := await asyncio.to_thread(system.waiting)) == backlog:
            await asyncio.sleep(0.01)
        noticed = time.monotonic()
        while await asyncio.to_thread(system.waiting):
            await asyncio.sleep(0.01)
        drained = time.monotonic() - noticed
        found = await at_rest(system, site)
        rates = {"intake_per_s": round(backlog / took, 1), "drained_per_s": round(left / drained, 1)}
        return {
            **found,
            "events": backlog,
            **rates,
            "intake_s": round(took, 1),
            "noticed_s": round(noticed - back, 2),
            "drained_s": round(drained, 2),
        }


async def under_load(system: System, seed: int, trouble: Callable[[], Any]) -> dict[str, Any]:
    """People act as long as the trouble lasts; then all comes to rest and is checked."""
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:
        site = system.site(http)
        site.think_s, site.hedge_share = THINK_S, HEDGE_SHARE
        going = asyncio.create_task(trouble())
        people = [Person(site, f"person{number}", seed) for number in range(PEOPLE)]
        await asyncio.gather(going, *(person.live(lambda: not going.done()) for person in people))
        return await at_rest(system, site)


async def at_rest(system: System, site: Site) -> dict[str, Any]:
    """Wait until everything has arrived, then look for anomalies."""
    await site.settled()
    await asyncio.gather(*(asyncio.to_thread(gateway.restart) for gateway in system.gateways))
    await asyncio.to_thread(arrive, system)
    take_snapshot(system.stores, system.stores.archive, system.history, system.stores.settings.feedback.data_dir / "snapshots")
    cells = list(site.tokens)[-ASKED:]
    said = await what_gateways_say(site, {gateway.spec.name: gateway.url for gateway in system.gateways}, cells)
    ops = read(system.history_path)
    found = check(ops, collect(system.stores, ops, said, cells))
    kinds = Counter(anomaly.kind for anomaly in found)
    return {"anomalies": dict(kinds), "first": [anomaly.what for anomaly in found[:5]], **told(ops), "errors": len(site.errors)}


def arrive(system: System) -> None:
    """Wait until the relay and the readers have nothing left to do. Raises NotDurable after two minutes."""
    end = time.monotonic() + DRAIN_S
    while system.waiting() or system.unread():
        if time.monotonic() > end:
            raise NotDurable(f"{system.waiting()} rows still wait for Kafka and {system.unread()} for the archive after {DRAIN_S:g} s")
        time.sleep(0.1)


def told(ops: list[Op]) -> dict[str, Any]:
    outcomes = Counter(f"{op.kind} {op.outcome}" for op in ops)
    acknowledged = sum(op.outcome == "ok" and op.kind != "snapshot" for op in ops)
    return {"operations": dict(sorted(outcomes.items())), "acknowledged": acknowledged}


def sent_again(settings: KafkaSettings) -> int:
    """How many records of the topic repeat an event that it holds already."""
    log, position, ids = KafkaLog(settings, HybridClock()), dict[str, int](), list[str]()
    with closing(log):
        while records := log.read(position, 5_000):
            position |= {record.partition: record.offset + 1 for record in records}
            ids += [record.event.event_id for record in records if record.event]
    return len(ids) - len(set(ids))


def main() -> int:
    report = Report("kill", seed=0, rooms=("benchmarks", "feedback", "deploy", "serving"))
    if (lacking := missing()) is not None:
        return report.skip(f"no Kafka broker can run here: {lacking}")
    victims, rounds, seconds = (QUICK_VICTIMS, 1, QUICK_OUTAGE_S) if quick() else (VICTIMS, ROUNDS, OUTAGE_S)
    cells = []
    for number in range(rounds):
        cells.append(report.cells.get({"round": number, "victims": victims}, partial(one_round, number, victims)))
        report.say(f"round {number}: killed {cells[-1]['killed']}, {cells[-1]['anomalies'] or 'no anomaly'} {cells[-1]['first']}")
    times = QUICK_CONTROL_KILLS if quick() else CONTROL_KILLS
    hasty = report.cells.get({"control": times}, partial(control, times))
    report.say(f"control, acknowledges before it writes: {hasty['anomalies']}")
    away = report.cells.get({"outage_s": seconds}, partial(outage, seconds))
    report.say(
        f"Kafka away: {away['events']} events at {away['intake_per_s']}/s, drained at {away['drained_per_s']}/s, {away['anomalies']}"
    )
    judge(report, cells, away)
    report.control("a gateway that acknowledges before it writes loses some", caught=hasty["anomalies"].get("lost write", 0) > 0)
    stands_for = {"events": INTAKE * seconds, "stand_for_s": seconds, "at_per_s": INTAKE}
    return report.finish({"rounds": cells, "control": hasty, "outage": {**away, "compressed": stands_for}})


def judge(report: Report, cells: list[dict[str, Any]], away: dict[str, Any]) -> None:
    every: Counter[str] = Counter()
    killed: Counter[str] = Counter()
    for cell in cells:
        every.update(cell["anomalies"])
        killed.update(cell["killed"])
    report.check("processes killed", killed.total(), at_least=12 if quick() else 90)
    report.check("operations acknowledged meanwhile", sum(cell["acknowledged"] for cell in cells), at_least=100)
    report.check("acknowledged and lost", every["lost write"], at_most=0)
    report.check("counted twice after the join", every["duplicate"], at_most=0)
    report.check("ratings that join no interaction", every["no interaction"], at_most=0)
    report.check("anomalies of any kind", every.total() + sum(away["anomalies"].values()), at_most=0)
    report.check("feedback answered 5xx while Kafka was away", away["errors"], at_most=0)
    unheard = sum(number for outcome, number in away["operations"].items() if outcome in ("rate info", "choose info", "clear info"))
    report.check("feedback that got no answer while Kafka was away", unheard, at_most=0)
    report.check("drained, events a second", away["drained_per_s"], at_least=INTAKE * FASTER)


if __name__ == "__main__":
    raise SystemExit(main())
