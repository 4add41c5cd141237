"""How fast is a rating accepted, durably, at 200 a second? Of answers that have ended, and of answers that still stream.

    make bench-rating            20 s of each
    QUICK=1 make bench-rating    4 s of each: shows that it runs

One gateway worker, a process of its own, with the scripted engine and the log on this disk. The load is open: every rating has a moment
at which it is due, and its latency counts from there, so that a gateway that stalls cannot slow down the questions about it. Beside it
stand bare fsyncs of as many bytes as a rating writes, at the same rate on the same disk, before and after. Three gateways with a fault
planted must be told from the real one: commits that sleep 60 ms, ratings that wait for their answer to end, and a loop that stands
still for 0.4 s out of every 2.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np

from benchmarks.gateway import MODEL, gateway
from benchmarks.harness import ROOT, Report, quick
from feedback.config import LimitSettings
from serving.chat import Gateway

RATE = 200
P50_MS, P99_MS = 10.0, 50.0
LATE_MS = 5.0
"""A load that sends its ratings later than this (p99) is not the load that was to be measured."""
KEPT = 0.99
"""Share of the ratings that have to be sent for a figure to be one."""
WORDS, WORD_S = 20, 0.25
"""Of an answer that streams: five seconds."""
STREAMS_PER_S = 20
ENDED = 200
"""Answers that had ended before the measurement."""
ARCHIVE_EVERY_S = 0.5
SLEEP_S, STALL_S, STALL_EVERY_S = 0.06, 0.4, 2.0
LIMITS = LimitSettings(chat_per_minute=0, streams_per_key=0, changes=1000)
"""What people say is counted as in the service; but one application asks for everybody, and they change their minds often."""
FAULTS = ("sleeps", "waits", "stalls")
TICK = os.sysconf("SC_CLK_TCK")


def serve(data_dir: Path, fault: str) -> None:
    """The gateway's process: says its address and the key, and ends when nobody listens any more."""
    with gateway(data_dir, limits=LIMITS, token_s=WORD_S) as running:
        _, secret = running.stores.api_keys.create("benchmark", ("chat", "feedback"))
        if fault != "none":
            plant(running.app.state.gateway, fault)
        print(running.url, secret, flush=True)
        while not select.select([sys.stdin], [], [], ARCHIVE_EVERY_S)[0]:
            running.stores.ingest()  # as the service does it beside the gateway


def plant(real: Gateway, fault: str) -> None:
    """Make the gateway slow in one of three ways."""
    give, log = real.give, real.stores.log
    commit = log._commit

    def sleeps(batch: Any) -> None:
        time.sleep(SLEEP_S)
        commit(batch)

    async def waits(event: Any) -> Any:
        while not any(getattr(about, "finish_reason", None) for about in await asyncio.to_thread(real.stores.logs.about, event.target)):
            await asyncio.sleep(0.05)
        return await give(event)

    async def stalls(event: Any) -> Any:
        if time.monotonic() % STALL_EVERY_S < STALL_S:
            time.sleep(STALL_S - time.monotonic() % STALL_EVERY_S if time.monotonic() % STALL_EVERY_S < STALL_S else 0)
        return await give(event)

    if fault == "sleeps":
        vars(log).update(_commit=sleeps)
    else:
        vars(real).update(give=waits if fault == "waits" else stalls)


@dataclass
class Served:
    """A gateway that runs."""

    url: str
    secret: str
    process: subprocess.Popen[bytes]

    def cpu_s(self) -> float:
        """Processor time so far, of all threads."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / TICK

    def written_bytes(self) -> int:
        """Given to files and sockets' files so far; of these only the log and the limits are written while ratings come in."""
        lines = Path(f"/proc/{self.process.pid}/io").read_text().splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith("write_bytes:")))


@contextlib.contextmanager
def served(data_dir: Path, fault: str = "none") -> Iterator[Served]:
    command = [sys.executable, "-m", "benchmarks.rating", str(data_dir), fault]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdin is not None
        url, secret = process.stdout.readline().decode().split()
        try:
            yield Served(url, secret, process)
        finally:
            process.stdin.close()
            process.wait(20)


@dataclass
class Measured:
    """What one load came to; all times in milliseconds."""

    latencies: list[float] = field(default_factory=list)
    late: list[float] = field(default_factory=list)
    """By how much each was sent after it was due."""
    due: int = 0
    refused: list[str] = field(default_factory=list)
    while_streaming: int = 0
    """Accepted before the answer's last byte."""
    gateway_cpu: float = 0.0
    load_cpu: float = 0.0
    """Processor time as a share of one core."""
    bytes_each: float = 0.0

    @property
    def kept(self) -> bool:
        """Whether the load was the one that was asked for."""
        return len(self.late) >= KEPT * self.due and quantile(self.late, 99) <= LATE_MS

    def figures(self) -> dict[str, Any]:
        return {
            "ratings": len(self.latencies),
            "refused": len(self.refused),
            "p50_ms": quantile(self.latencies, 50),
            "p99_ms": quantile(self.latencies, 99),
            "max_ms": max(self.latencies, default=None),
            "late_p99_ms": quantile(self.late, 99),
            "schedule_kept": self.kept,
            "accepted_while_streaming": self.while_streaming,
            "gateway_cores": round(self.gateway_cpu, 3),
            "load_cores": round(self.load_cpu, 3),
            "bytes_written_each": round(self.bytes_each),
        }


def quantile(values: list[float], percent: float) -> float:
    return float(np.percentile(values, percent)) if values else float("inf")


class Answers:
    """Answers to rate, each with its token."""

    def __init__(self, session: aiohttp.ClientSession, target: Served) -> None:
        self._session = session
        self._url = f"{target.url}/v1/chat/completions"
        self._headers = {"Authorization": f"Bearer {target.secret}"}
        self._number = itertools.count()
        self.open: dict[int, str] = {}
        """Those that stream."""
        self.ended: list[str] = []

    async def ask(self, words: int) -> None:
        """One answer from its first byte to its last."""
        number = next(self._number)
        body = {
            "model": MODEL,
            "stream": True,
            "user": f"person-{number}",
            "messages": [{"role": "user", "content": "word " * (words - 1)}],
        }
        async with self._session.post(self._url, json=body, headers=self._headers) as reply:
            reply.raise_for_status()
            self.open[number] = reply.headers["Plaudit-Feedback-Token"]
            async for _ in reply.content:
                pass
        self.ended.append(self.open.pop(number))

    @contextlib.asynccontextmanager
    async def streaming(self) -> AsyncIterator[None]:
        """Answers begin all the while, and there are as many as there will be."""
        asking: set[asyncio.Task[None]] = set()

        async def keep_asking() -> None:
            while True:
                task = asyncio.create_task(self.ask(WORDS))
                asking.add(task)
                task.add_done_callback(asking.discard)
                await asyncio.sleep(1 / STREAMS_PER_S)

        keeping = asyncio.create_task(keep_asking())
        while len(self.open) < STREAMS_PER_S * WORDS * WORD_S * 0.8:
            await asyncio.sleep(0.05)
        try:
            yield
        finally:
            keeping.cancel()
            await asyncio.gather(*asking)


async def rate(session: aiohttp.ClientSession, target: Served, answers: Answers, seconds: float, streaming: bool) -> Measured:
    """Ratings at a fixed rate, each at its moment, up and down in turn so that every one is news."""
    found = Measured(due=int(RATE * seconds))
    sending: set[asyncio.Task[None]] = set()
    said: dict[str, int] = {}

    async def send(due: float, token: str, number: int | None) -> None:
        said[token] = said.get(token, 0) + 1
        body = {"kind": "rating", "value": ("up", "down")[said[token] % 2]}
        found.late.append((time.perf_counter() - due) * 1000)
        try:
            async with session.post(f"{target.url}/v1/feedback", json=body, headers={"Authorization": f"Feedback {token}"}) as reply:
                text = await reply.text()
                if reply.status != 200:
                    found.refused.append(f"{reply.status} {text[:200]}")
        except aiohttp.ClientError as exc:
            found.refused.append(repr(exc))
        found.latencies.append((time.perf_counter() - due) * 1000)
        found.while_streaming += number in answers.open

    cpu, load, written, began = target.cpu_s(), time.process_time(), target.written_bytes(), time.perf_counter()
    for index in range(found.due):
        due = began + index / RATE
        if (wait := due - time.perf_counter()) > 0:
            await asyncio.sleep(wait)
        if streaming:
            open_now = list(answers.open.items())
            number, token = open_now[index * 7 % len(open_now)]
            task = asyncio.create_task(send(due, token, number))
        else:
            task = asyncio.create_task(send(due, answers.ended[index % len(answers.ended)], None))
        sending.add(task)
        task.add_done_callback(sending.discard)
    await asyncio.gather(*sending)
    took = time.perf_counter() - began
    found.gateway_cpu, found.load_cpu = (target.cpu_s() - cpu) / took, (time.process_time() - load) / took
    found.bytes_each = (target.written_bytes() - written) / found.due
    return found


async def measure(target: Served, seconds: float, phases: tuple[bool, ...]) -> dict[bool, Measured]:
    """Each phase's figures: False for ended answers, True for streaming ones."""
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=60)) as session:
        answers, found = Answers(session, target), {}
        if False in phases:
            for _ in range(0, ENDED, 100):
                await asyncio.gather(*(answers.ask(1) for _ in range(100)))
            await rate(session, target, answers, 1.0, False)  # the first ones open connections and files
            found[False] = await rate(session, target, answers, seconds, False)
        if True in phases:
            async with answers.streaming():
                found[True] = await rate(session, target, answers, seconds, True)
        return found


def bare_fsyncs(folder: Path, size: int, seconds: float) -> list[float]:
    """Milliseconds of appending so many bytes and fsyncing them, at the same rate."""
    took, data = [], os.urandom(max(size, 1))
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        began = time.perf_counter()
        for index in range(int(RATE * seconds)):
            time.sleep(max(0.0, began + index / RATE - time.perf_counter()))
            start = time.perf_counter()
            file.write(data)
            os.fdatasync(file.fileno())
            took.append((time.perf_counter() - start) * 1000)
    return took


def told_apart(folder: Path, seconds: float) -> dict[str, Any]:
    """What each planted fault was measured at."""
    found = {}
    for fault in FAULTS:
        with served(folder / fault, fault) as target:
            streaming = fault == "waits"
            found[fault] = asyncio.run(measure(target, seconds, (streaming,)))[streaming].figures()
    return found


def main() -> int:
    report = Report("rating", seed=0)
    seconds = 4.0 if quick() else 20.0
    (ROOT / "build").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=ROOT / "build") as name:
        folder = Path(name)
        with served(folder / "real") as target:
            found = asyncio.run(measure(target, seconds, (False, True)))
        fsyncs = bare_fsyncs(folder, round(found[False].bytes_each), seconds)
        report.say(f"bare fsyncs of as many bytes: p50 {quantile(fsyncs, 50):.2f} ms, p99 {quantile(fsyncs, 99):.2f} ms")
        for streaming, measured in found.items():
            what = "while its answer streams" if streaming else "of an answer that has ended"
            figures = measured.figures()
            report.say(f"rating {what}: " + ", ".join(f"{key} {value}" for key, value in figures.items()))
            if not measured.kept:
                report.say("not measured: the load did not keep its schedule; run it on a machine that does nothing else")
            report.check(f"p50 of a rating {what}, ms", figures["p50_ms"] if measured.kept else None, at_most=P50_MS)
            report.check(f"p99 of a rating {what}, ms", figures["p99_ms"] if measured.kept else None, at_most=P99_MS)
            report.check(f"ratings refused {what}", len(measured.refused), at_most=0)
            report.say("\n".join(measured.refused[:3]))
        share = found[True].while_streaming / found[True].due
        report.check("share of ratings accepted before the answer's last byte", share, at_least=0.9)
        controls = told_apart(folder, 2.5 if quick() else 6.0)
        report.say(f"controls: {controls}")
        caught = all(each["p99_ms"] > P99_MS for each in controls.values()) and controls["sleeps"]["p50_ms"] > P50_MS
        caught = caught and all(controls[fault]["schedule_kept"] for fault in ("sleeps", "stalls"))  # not slow because of the load
        report.control("commits that sleep 60 ms, ratings that wait for their answer, a loop that stalls: all too slow", caught=caught)
    named = {"ended": found[False].figures(), "streaming": found[True].figures(), "controls": controls}
    bare = {"bytes": round(found[False].bytes_each), "p50_ms": quantile(fsyncs, 50), "p99_ms": quantile(fsyncs, 99)}
    return report.finish(named | {"bare_fsync": bare, "rate": RATE, "cores": os.cpu_count()})


if __name__ == "__main__":
    if len(sys.argv) == 3:
        serve(Path(sys.argv[1]), sys.argv[2])
        sys.exit(0)
    sys.exit(main())
