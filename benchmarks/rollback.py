"""How long after a decision does somebody still begin to be answered by the adapter that was taken back? And does anybody notice more?

    make bench-rollback           50 rollbacks and stops, 10 of them while the leader is stopped, then real vLLM
    QUICK=1 make bench-rollback   4 of them and the control, without vLLM

Two real gateways, a real controller that leads, and 100 people who ask one thing after the other, each answer a stream of words that name
the adapter. Half of the rounds take a canary back, half an adapter that everybody was promoted to. Decisions are committed from this
process, which is neither the leader nor a gateway. A round's figure is the time from the call that decides to the last
`interaction.started` by the adapter, as committed; the last first byte that a person saw is told beside it. The control is a gateway
that goes by the table that it read first.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
import signal
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np

from benchmarks.gateway_process import MODEL
from benchmarks.harness import Report, quick
from benchmarks.leader import Place, bring, nothing, place, replica, until
from deploy.config import EngineSettings
from deploy.engine import VLLM
from deploy.manifest import vllm_name
from deploy.replica import VllmServer
from examples.concierge.world import POLICY
from feedback.clock import COUNTER_BITS
from feedback.config import FeedbackSettings, Settings
from feedback.stores import open_stores
from serving.chat import Gateway

STREAMS, QUICK_STREAMS = 100, 20
ROUNDS, STOPPED, VLLM_ROUNDS = 40, 10, 4
WATCH_S = 3.0
"""After a decision; whoever is still answered by the adapter then stays so."""
BAR_S = 2.0
REACHED = 0.25
"""Share of the last answers that the adapter gives before it is taken back."""


def deaf(gateway: Gateway) -> None:
    """The control: a gateway that never looks again once it has seen a change, and does not notice."""
    route = gateway.route
    read, first = route.refresh, ""

    async def seldom() -> None:
        nonlocal first
        table = route._table
        if table is None or (table.stable.adapter == first and table.canary is None):
            await read()
            first = first or (route._table.stable.adapter if route._table else "")
        route._read_at = time.monotonic()

    route.refresh = seldom  # type: ignore[method-assign]


@dataclass
class Answer:
    """As its reader saw it."""

    first_ms: float
    """When its first word came; Unix time."""
    name: str
    """Of the adapter, where words tell it."""
    interaction: str
    changed: bool


@dataclass
class Crowd:
    """People who ask again and again."""

    urls: Sequence[str]
    secret: str
    telling: bool = True
    """Whether words name their adapter."""
    answers: list[Answer] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    known: set[int] = field(default_factory=set)
    """Who has been answered at least once: a person's first answer also makes their key."""

    async def person(self, number: int, http: aiohttp.ClientSession) -> None:
        """One of them, until cancelled."""
        turn = number
        while True:
            turn += 1
            body = {"model": MODEL, "user": f"person {number}", "stream": True, "max_tokens": 24}
            body["messages"] = [{"role": "user", "content": f"Where can I eat? ({turn})"}]
            headers = {"Authorization": f"Bearer {self.secret}"}
            try:
                async with http.post(f"{self.urls[turn % len(self.urls)]}/v1/chat/completions", json=body, headers=headers) as reply:
                    if reply.status != 200:
                        self.failures.append(f"{reply.status}: {(await reply.text())[:200]}")
                    else:
                        await self._read(reply)
                        self.known.add(number)
            except (aiohttp.ClientError, OSError, TimeoutError) as exc:
                self.failures.append(type(exc).__name__)

    async def _read(self, reply: aiohttp.ClientResponse) -> None:
        answer, text, ended = Answer(0.0, "", "", False), "", False
        async for line in reply.content:
            if not line.startswith(b"data:"):
                continue
            if (data := line[5:].strip()) == b"[DONE]":
                ended = True
                continue
            chunk = json.loads(data)
            if "error" in chunk:
                self.failures.append(str(chunk["error"]))
                return
            if "plaudit" in chunk:
                answer.interaction = chunk["plaudit"]["interaction_id"]
            text += "".join(choice["delta"].get("content") or "" for choice in chunk["choices"])
            if text and not answer.first_ms:
                answer.first_ms = time.time() * 1000
                self.answers.append(answer)
            if self.telling and text:
                answer.name = answer.name or text.split()[0]
        answer.changed = self.telling and bool(set(re.findall(r"a-[0-9a-f]{16}", text)) - {answer.name[:18]})
        if not ended or not text:
            self.failures.append("a stream broke off")


async def one_round(there: Place, crowd: Crowd, promoted: bool, stopped: bool, load: Any) -> tuple[float, float, float]:
    """When the decision was made, how long the call took, and when the adapter came; Unix ms."""
    registry, since, since_ms = there.registry, len(crowd.answers), time.time() * 1000
    await bring(there, promoted, load)

    def reached() -> bool:
        last = crowd.answers[since:][-STREAMS:]
        if not crowd.telling:
            return len(crowd.answers) - since > STREAMS
        mine = sum(each.name.startswith(vllm_name(there.other)) for each in last)
        return len(last) >= 10 and mine >= REACHED * len(last)

    await until(reached)
    if stopped:
        before = there.looked()
        await until(lambda: there.looked() != before)
        await asyncio.sleep(0.1)  # its look is over: on SQLite whoever is stopped while it writes is waited for
        there.leader.signal(signal.SIGSTOP)
    began_ms, began = time.time() * 1000, time.monotonic()
    if promoted:
        await asyncio.to_thread(registry.rollback, "noor", "as the benchmark has it", there.other)
    else:
        rollout = registry.active_rollout()
        assert rollout is not None
        await asyncio.to_thread(registry.end_rollout, rollout.id, "as the benchmark has it", "noor")
    took = time.monotonic() - began
    await asyncio.sleep(WATCH_S)
    if stopped:
        there.leader.signal(signal.SIGCONT)
    return began_ms, took, since_ms


def starts(there: Place, answers: Sequence[Answer]) -> list[tuple[str, float]]:
    """The adapter of each answer and when its beginning was committed, Unix ms; as the archive has it."""
    stores = open_stores(Settings(feedback=FeedbackSettings(data_dir=there.data_dir)), "reader")
    try:
        while stores.ingest():
            pass
        found = [stores.archive.interaction(each.interaction) for each in answers]
    finally:
        stores.close()
    return [(vllm_name(each.started.adapter or ""), each.started.stamp >> COUNTER_BITS) if each else ("", 0.0) for each in found]


def measure(rounds: int, *, stopped: bool = False, bug: bool = False) -> dict[str, Any]:
    """So many rounds under the crowd's load, every second one of a promoted adapter."""
    with place((None, deaf if bug else None)) as (there, secret):
        return asyncio.run(_measure(there, secret, rounds, stopped, bug, nothing))


async def _measure(there: Place, secret: str, rounds: int, stopped: bool, bug: bool, load: Any, telling: bool = True) -> dict[str, Any]:
    crowd = Crowd([each.url for each in there.gateways], secret, telling)
    found: list[tuple[float, float, float]] = []
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=60)) as http:
        people = [asyncio.create_task(crowd.person(number, http)) for number in range(QUICK_STREAMS if quick() else STREAMS)]
        people.append(asyncio.create_task(replica(there)))
        try:
            await until(lambda: len(crowd.known) >= len(people) - 1)
            crowd.failures.clear()
            for number in range(rounds):
                found.append(await one_round(there, crowd, bug or number % 2 == 1, stopped, load))
        finally:
            for person in people:
                person.cancel()
            await asyncio.gather(*people, return_exceptions=True)
    started = starts(there, crowd.answers)
    other, lasts, seen, reached = vllm_name(there.other), [], [], []
    on_it = [(answer.first_ms, at) for answer, (name, at) in zip(crowd.answers, started, strict=True) if name == other]
    for index, (began_ms, _, since_ms) in enumerate(found):
        end_ms = found[index + 1][2] if index + 1 < len(found) else math.inf  # then it comes back
        late = [(first, at) for first, at in on_it if began_ms < at < end_ms]
        lasts.append(round(max([0.0, *((at - began_ms) / 1000 for _, at in late)]), 3))
        seen.append(round(max([0.0, *((first - began_ms) / 1000 for first, _ in late)]), 3))
        reached.append(sum(since_ms < at <= began_ms for _, at in on_it))
    return {
        "last_s": lasts,
        "seen_s": seen,
        "decide_s": [round(took, 3) for _, took, _ in found],
        "on_it_before": min(reached),
        "answers": len(crowd.answers),
        "failures": crowd.failures[:5],
        "failed": len(crowd.failures),
        "changed": sum(each.changed for each in crowd.answers),
        "unknown": sum(not name for name, _ in started),
    }


def on_vllm(rounds: int) -> dict[str, Any]:
    """The same with a real model server behind the gateways."""
    with tempfile.TemporaryDirectory() as folder:
        server = VllmServer(POLICY, "base", EngineSettings(), Path(folder), max_model_len=128)

        async def whole() -> dict[str, Any]:
            await server.start()
            engine = VLLM(server.url)
            try:
                with place(engine_url=server.url) as (there, secret):

                    async def load() -> None:
                        for name, path in there.registry.wanted().items():
                            await engine.load(name, path)

                    await load()
                    return await _measure(there, secret, rounds, False, False, load, telling=False)
            finally:
                await engine.close()
                await server.stop()

        return asyncio.run(whole())


def main() -> int:
    report = Report("rollback", seed=0, rooms=("serving", "feedback", "deploy", "benchmarks/leader.py"))
    cells = report.cells
    size, count = (2, 1) if quick() else (10, ROUNDS // 10)
    parts = [cells.get({"part": part, "quick": quick()}, lambda: measure(size)) for part in range(count)]
    halted = cells.get({"stopped": True, "quick": quick()}, lambda: measure(2 if quick() else STOPPED, stopped=True))
    control = cells.get({"control": True, "quick": quick()}, lambda: measure(1, bug=True))
    real = None if quick() else cells.get({"vllm": True}, lambda: on_vllm(VLLM_ROUNDS))
    runs = [*parts, halted]
    lasts = [last for each in runs for last in each["last_s"]]
    p99 = float(np.quantile(lasts, 0.99))
    report.say(f"decision to the last request started on it: median {np.median(lasts):.2f} s, p99 {p99:.2f} s, {len(lasts)} decisions")
    report.check("decision to last request started on it, p99, seconds", p99, at_most=BAR_S)
    report.check("the same while the leader is stopped, longest, seconds", max(halted["last_s"]), at_most=BAR_S)
    report.check("decisions", len(lasts), at_least=4 if quick() else 50)
    report.check("answers by it before each decision, fewest", min(each["on_it_before"] for each in runs), at_least=1)
    report.check("answers whose beginning is not in the archive", sum(each["unknown"] for each in runs), at_most=0)
    report.check("failed requests", sum(each["failed"] for each in runs), at_most=0)
    report.check("streams that changed their adapter", sum(each["changed"] for each in runs), at_most=0)
    if real is not None:
        report.check("on real vLLM: decision to last request started on it, longest, seconds", max(real["last_s"]), at_most=BAR_S)
        report.check("on real vLLM: failed requests", real["failed"], at_most=0)
    late = max(control["last_s"])
    report.control(f"a gateway that never reads its route again answers with it {late:.1f} s after the decision", caught=late > BAR_S)
    seen = float(np.quantile([last for each in runs for last in each["seen_s"]], 0.99))
    figures = {"seen_p99_s": seen, "median_s": float(np.median(lasts)), "p99_s": p99, "answers": sum(each["answers"] for each in runs)}
    return report.finish({**figures, "stopped": halted, "vllm": real, "control": control})


if __name__ == "__main__":
    raise SystemExit(main())
