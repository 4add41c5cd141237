"""Each of bench-canary's faults once on real processes: is the canary stopped, and for the right reason?

    make bench-faults           11 faults and a canary without one
    QUICK=1 make bench-faults   two faults

On a slow disk `TMPDIR=/dev/shm` spares the commits' waiting, which is not what is measured.

A real gateway whose scripted model server has the fault in the canary's answers, a real controller that leads and feeds the archive,
people who ask over HTTP, thirty at a time, four questions each, and rate. Faults are larger than in the simulation, so that a few hundred
answers show them; scores of a reward model are written as `plaudit scorer` writes them. The control is the same canary without a fault:
it must not be stopped within as many answers as the slowest fault took.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from functools import partial
from typing import Any

import aiohttp

from benchmarks.canary import FAULTS
from benchmarks.gateway_process import MODEL, Every
from benchmarks.harness import Report, quick
from benchmarks.leader import Place, bring, nothing, place, replica
from deploy.engine import Chunk, Scripted
from feedback.config import FeedbackSettings, Settings
from feedback.errors import EngineUnavailable
from feedback.events import InteractionScored, new_id
from feedback.stores import Stores, open_stores
from serving.chat import Gateway

AT_ONCE, QUESTIONS = 30, 4
MOST = 4_000
"""Answers after which a canary counts as never stopped."""
FIRST_S = {"latency": 0.3}
"""The model server's time to the first token, longer where it is what counts."""
SAID = {
    "errors": "+30 points",
    "latency": "first token x2",
    "empty answers": "+30 points",
    "early stop": "each answer ends at a random point",
    "repetition": "every second answer loops",
    "refusals": "+40 points",
    "wrong language": "+50 points",
    "length": "x3",
    "broken JSON": "+50 points of what asks for JSON",
    "reward": "-1.5 sd",
    "thumbs": "-60 points",
}
ANSWER = "There is a small place in the old town that has fresh fish, and you can sit by the water from noon to ten in the evening."
LONGER = "It was built long ago by two sisters who came here with nothing but a boat, some rope and their mother's book of soups. "
GERMAN = "In der Altstadt gibt es ein kleines Lokal mit Fisch, und man kann dort am Wasser sitzen, wenn es nicht zu kalt ist."


class Stub(Scripted):
    """The scripted model server with a fault in what the canary says."""

    def __init__(self, gateway: Gateway, fault: str) -> None:
        super().__init__(self._say, token_s=0.002)
        self.loaded = Every()
        self.fault, self.route, self.luck = fault, gateway.route, random.Random(fault)

    def _bad(self, name: str) -> bool:
        canary = self.route.current().canary
        return canary is not None and canary.name == name

    def _say(self, name: str, messages: Sequence[Mapping[str, Any]]) -> str:
        fault, luck = self.fault if self._bad(name) else "", self.luck.random()
        whole = '{"place": "harbour", "open": true}' if self.fault == "broken JSON" else ANSWER
        if fault == "errors" and luck < 0.3:
            raise EngineUnavailable("the model server broke the answer off")
        if (fault == "empty answers" and luck < 0.3) or fault == "early stop":
            return " ".join(whole.split()[: 0 if fault == "empty answers" else int(24 * luck) + 1])
        if fault == "length":
            return f"{whole} {LONGER}{LONGER.replace('sisters', 'brothers').replace('soups', 'pies')}"
        worse = {
            "repetition": (0.5, " ".join(["and the fish is"] * 6)),
            "refusals": (
                0.4,
                "I'm sorry, I can't help you with where to eat in the evening, but you may ask somebody who lives in the town.",
            ),
            "wrong language": (0.5, GERMAN),
            "broken JSON": (0.5, '{"place": "harbour", "open": '),
        }
        share, said = worse.get(fault, (0.0, ""))
        return said if luck < share else whole

    async def _chunks(self, body: Any, answers: Any) -> AsyncIterator[Chunk]:
        await asyncio.sleep(FIRST_S.get(self.fault, 0.02) * (2 if self.fault == "latency" and self._bad(body["model"]) else 1))
        async for chunk in super()._chunks(body, answers):
            yield chunk


def plant(fault: str, gateway: Gateway) -> None:
    """Give the gateway the model server with the fault."""
    gateway.engine = Stub(gateway, fault)


class Crowd:
    """People who come, ask and rate."""

    def __init__(self, there: Place, secret: str, fault: str, stores: Stores) -> None:
        self.there, self.fault, self.stores = there, fault, stores
        self.headers = {"Authorization": f"Bearer {secret}"}
        self.url = there.gateways[0].url
        self.luck = random.Random(fault)
        self.people, self.answers = 0, 0
        self.over = asyncio.Event()

    async def come(self, http: aiohttp.ClientSession) -> None:
        """One after the other, until it is over."""
        while not self.over.is_set():
            self.people += 1
            name = f"person {self.people}"
            for question in range(QUESTIONS):
                if not self.over.is_set():
                    await self._ask(http, name, question)

    async def _ask(self, http: aiohttp.ClientSession, name: str, question: int) -> None:
        body: dict[str, Any] = {"model": MODEL, "user": name}
        body["messages"] = [{"role": "user", "content": f"Where can I eat in the old town, and what is there to see? ({question})"}]
        if self.fault == "broken JSON":
            body["response_format"] = {"type": "json_object"}
        async with http.post(f"{self.url}/v1/chat/completions", json=body, headers=self.headers) as reply:
            told = await reply.json()
        self.answers += 1
        if reply.status == 200 and self.fault in ("thumbs", "reward"):
            await self._rate(http, told["plaudit"])

    async def _rate(self, http: aiohttp.ClientSession, receipt: Mapping[str, Any]) -> None:
        """A thumb, or the score that a scorer would write; the canary's are worse."""
        interaction = receipt["interaction_id"]
        canary = await asyncio.to_thread(self._canary, interaction)
        if self.fault == "reward":
            score = self.luck.gauss(-1.5 if canary else 0.0, 1.0)
            event = InteractionScored(event_id=new_id(), interaction_id=interaction, reward_model="benchmark", score=score)
            await self.stores.log.append([event])
            return
        said = {"kind": "rating", "value": "up" if self.luck.random() < (0.2 if canary else 0.8) else "down"}
        async with http.post(f"{self.url}/v1/feedback", json=said, headers={"Authorization": f"Feedback {receipt['token']}"}) as reply:
            reply.raise_for_status()

    def _canary(self, interaction: str) -> bool:
        end = time.monotonic() + 30
        while (found := self.stores.archive.interaction(interaction)) is None:
            if time.monotonic() > end:
                raise EngineUnavailable("the archive has not heard of an answer within 30 s")
            time.sleep(0.05)
        return found.started.arm == "canary"


def stopped(fault: str, most: int) -> dict[str, Any]:
    """What ended the canary, and after how many answers of both arms."""
    with place((partial(plant, fault),), ingests=True) as (there, secret):
        stores = open_stores(Settings(feedback=FeedbackSettings(data_dir=there.data_dir)), "people")
        try:
            return asyncio.run(_stopped(there, Crowd(there, secret, fault, stores), most))
        finally:
            stores.close()


async def _stopped(there: Place, crowd: Crowd, most: int) -> dict[str, Any]:
    registry, reporting = there.registry, asyncio.create_task(replica(there))
    await bring(there, False, nothing)
    rollout = registry.rollouts()[-1].id
    began = time.monotonic()
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=90)) as http:
        people = [asyncio.create_task(crowd.come(http)) for _ in range(AT_ONCE)]
        while (now := await asyncio.to_thread(registry.rollout, rollout)).state == "canary" and crowd.answers < most:
            await asyncio.sleep(0.5)
            for failed in (each for each in people if each.done()):
                failed.result()
        answers, took_s = crowd.answers, time.monotonic() - began
        crowd.over.set()
        await asyncio.gather(*people)
        reporting.cancel()
    failing = [str(row["name"]) for row in now.verdicts if row["verdict"] in ("fail", "error")]
    routed = registry.routing().canary is not None
    found = {"state": now.state, "by": failing, "reason": now.reason, "routed": routed}
    return found | {"answers": answers, "took_s": took_s}


def main() -> int:
    report = Report("faults", seed=0, rooms=("serving", "feedback", "deploy", "benchmarks/canary.py", "benchmarks/leader.py"))
    table = []
    for fault in ["length", "empty answers"] if quick() else FAULTS:
        found = report.cells.get({"fault": fault}, lambda f=fault: stopped(f, MOST))  # type: ignore[misc]
        right = found["state"] == "stopped" and f"guardrail {FAULTS[fault]}" in found["by"] and not found["routed"]
        report.say(f"{fault}, {SAID[fault]}: {found['state']} after {found['answers']} answers, {found['took_s']:.0f} s, by {found['by']}")
        report.check(f"{fault}, {SAID[fault]}: stopped for the right reason", float(right), at_least=1)
        table.append({"fault": fault, "planted": SAID[fault], "answers": found["answers"], "by": found["by"]})
    slowest = max(int(str(row["answers"])) for row in table)
    calm = report.cells.get({"fault": "none", "most": slowest}, lambda: stopped("none", slowest))
    report.say(f"none: {calm['state']} after {calm['answers']} answers: {calm['reason']}")
    report.control(f"without a fault it is still '{calm['state']}' after {calm['answers']} answers", caught=calm["state"] == "canary")
    return report.finish({"table": table, "none": calm})


if __name__ == "__main__":
    raise SystemExit(main())
