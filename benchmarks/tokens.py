"""Can anybody rate what is not theirs? A million forged tokens, a thief with rights of their own, one rating sent a thousand times.

    make bench-tokens              1,000,000 forgeries in cells that survive an interruption
    QUICK=1 make bench-tokens      50,000

The controls: a checker without the re-encoding rule, one that compares no MAC, and a gateway that forgets whose interaction it is.
"""

from __future__ import annotations

import asyncio
import json
import random
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import aiohttp

from benchmarks.forgeries import Forger, Lenient, Unsigned, key_of
from benchmarks.gateway import MODEL, Running, gateway
from benchmarks.harness import Report, quick
from benchmarks.thief import Theft, steal
from feedback.config import LimitSettings
from feedback.errors import Gone, NotAuthenticated
from feedback.events import FeedbackGiven, new_id
from feedback.fold import fold
from feedback.keys import ApiKey, ApiKeys
from feedback.partitions import SqliteLogs
from feedback.tokens import Action, Claims, Tokens
from serving.receipt import OF_A_COMPARISON, OF_AN_ANSWER

SEED = 0
CELL = 50_000
FORGERIES = 1_000_000
CONTROLLED = 5_000
"""Forgeries of each cell that the broken checkers see too."""
REPEATS, AT_ONCE = 1_000, 50


def genuine(tokens: Tokens, count: int) -> list[str]:
    """Tokens as the gateway gives them out, of answers and of comparisons."""
    made = []
    for number in range(count):
        pair = number % 2 == 1
        actions: tuple[Action, ...] = OF_A_COMPARISON if pair else OF_AN_ANSWER
        target, inside = new_id(), (new_id(), new_id()) if pair else ()
        claims = Claims(
            target=target,
            target_kind="comparison" if pair else "interaction",
            interactions=inside or (target,),
            subject=f"s_{number:032x}",
            actions=actions,
            expires=int(time.time()) + 7 * 24 * 3600,
        )
        made.append(tokens.mint(claims))
    return made


def accepted(tokens: Tokens, forged: str) -> bool:
    """Also one that is said to have expired was taken for ours."""
    try:
        tokens.check(forged)
    except NotAuthenticated:
        return False
    except Gone:
        return True
    return True


def forge(cell: int) -> dict[str, Any]:
    """One cell of forgeries: how many of each kind were tried, and how many were taken by us and by the controls."""
    draw = random.Random(f"keys of {SEED} {cell}")
    key, older = key_of(draw), key_of(draw)
    tokens = Tokens([key, older])
    real = genuine(tokens, 40) + genuine(Tokens([older]), 40)
    forger = Forger(older, real[40:], SEED + cell) if cell % 5 == 4 else Forger(key, real[:40], SEED + cell)
    lenient, unsigned = Lenient([key, older]), Unsigned(older if cell % 5 == 4 else key)
    tried: Counter[str] = Counter()
    taken: Counter[str] = Counter()
    fooled: Counter[str] = Counter()
    examples: list[str] = []
    for number, (way, forged) in enumerate(forger.draws(CELL)):
        tried[way] += 1
        if accepted(tokens, forged):
            taken[way] += 1
            examples.append(forged)
        if number < CONTROLLED:
            fooled["without re-encoding"] += accepted(lenient, forged)
            fooled["without MAC"] += accepted(unsigned, forged)
    refused = sum(not accepted(tokens, token) for token in real)
    return {"tried": dict(tried), "taken": dict(taken), "fooled": dict(fooled), "genuine_refused": refused, "examples": examples[:3]}


class Forgetful(ApiKeys):
    """The control: any key rates anything."""

    def speaks_for(self, key: ApiKey, key_id: str | None) -> bool:
        return True


def thefts() -> tuple[Theft, Theft]:
    """What A got hold of, on a gateway as it is and on one that forgets whose interaction it is."""
    with tempfile.TemporaryDirectory() as name:
        with gateway(Path(name) / "real") as running:
            real = asyncio.run(steal(running))
        with gateway(Path(name) / "broken") as running:
            running.stores.api_keys = Forgetful(running.stores.engine)
            return real, asyncio.run(steal(running, only="POST /v1/feedback"))


async def _receipt(session: aiohttp.ClientSession, running: Running, secret: str) -> dict[str, Any]:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "user": "ann"}
    async with session.post(f"{running.url}/v1/chat/completions", json=body, headers={"Authorization": f"Bearer {secret}"}) as reply:
        told: dict[str, Any] = (await reply.json())["plaudit"]
        return told


async def _say(session: aiohttp.ClientSession, url: str, token: str, value: str, key: str | None = None) -> tuple[int, dict[str, Any]]:
    headers = {"Authorization": f"Feedback {token}"} | ({"Idempotency-Key": key} if key else {})
    async with session.post(f"{url}/v1/feedback", json={"kind": "rating", "value": value}, headers=headers) as reply:
        return reply.status, await reply.json()


async def _repeat(running: list[Running], secret: str, key: str | None) -> dict[str, int]:
    """The same rating REPEATS times, AT_ONCE at a time, by turns at each of the gateways."""
    gate = asyncio.Semaphore(AT_ONCE)
    async with aiohttp.ClientSession() as session:
        receipt = await _receipt(session, running[0], secret)

        async def one(number: int) -> tuple[int, dict[str, Any]]:
            async with gate:
                return await _say(session, running[number % len(running)].url, receipt["token"], "up", key)

        replies = await asyncio.gather(*(one(number) for number in range(REPEATS)))
    ids = {said.get("feedback_id") for _, said in replies}
    stored = {event.event_id for event in _given(running[0], receipt["interaction_id"])}
    return {"not 200": sum(status != 200 for status, _ in replies), "ids": len(ids | stored), "changes": len(stored)}


def _given(running: Running, target: str) -> list[FeedbackGiven]:
    logs = SqliteLogs(running.stores.settings.feedback.data_dir / "log")
    return [event for event in logs.about(target) if isinstance(event, FeedbackGiven)]


async def _up_down_up(running: Running, secret: str) -> bool:
    """Whether it ends at up, for the person, in the log and in the archive."""
    async with aiohttp.ClientSession() as session:
        receipt = await _receipt(session, running, secret)
        ids = [(await _say(session, running.url, receipt["token"], value))[1]["feedback_id"] for value in ("up", "down", "up")]
        async with session.get(f"{running.url}/v1/feedback", headers={"Authorization": f"Feedback {receipt['token']}"}) as reply:
            shown = (await reply.json())["state"]["rating"]
    running.stores.ingest()
    target = receipt["interaction_id"]
    held = [fold(events).popitem()[1] for events in (_given(running, target), running.stores.archive.said_about(target))]
    return shown == "up" and len(set(ids)) == 3 and [getattr(event, "value", None) for event in held] == ["up", "up"]


def repeats() -> dict[str, Any]:
    """With limits as they are by default: repetitions count under none."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with gateway(folder, limits=LimitSettings()) as one, gateway(folder, limits=LimitSettings()) as other:
            _, secret = one.stores.api_keys.create("app", ("chat",))
            return {
                "without a key": asyncio.run(_repeat([one], secret, None)),
                "with a key, two gateways": asyncio.run(_repeat([one, other], secret, "same")),
                "up, down, up": asyncio.run(_up_down_up(one, secret)),
            }


def main() -> int:
    report = Report("tokens", seed=SEED, rooms=("feedback", "serving"))
    tried: Counter[str] = Counter()
    taken: Counter[str] = Counter()
    fooled: Counter[str] = Counter()
    refused = 0
    for cell in range(1 if quick() else FORGERIES // CELL):
        found = report.cells.get({"cell": cell, "count": CELL}, lambda cell=cell: forge(cell))  # type: ignore[misc]
        tried.update(found["tried"])
        taken.update(found["taken"])
        fooled.update(found["fooled"])
        refused += found["genuine_refused"]
        for example in found["examples"]:
            report.say(f"accepted: {example!r}")
        report.say(f"{sum(tried.values()):,} forgeries, {sum(taken.values())} accepted ({found['seconds']:g} s)")
    real, broken = thefts()
    report.say(f"{real.tries} tries of A with {real.credentials} credentials: {len(real.rated)} rated, {len(real.read)} read")
    again = repeats()
    report.say(json.dumps(again))
    report.check("forged tokens", sum(tried.values()), at_least=CELL if quick() else FORGERIES)
    report.check("forged tokens accepted", sum(taken.values()), at_most=0)
    report.check("genuine tokens refused", refused, at_most=0)
    report.check("tries of A at what is B's", real.tries, at_least=1_000)
    report.check("ratings of what is B's by A", len(real.rated), at_most=0)
    report.check("words of B that A read", len(real.read), at_most=0)
    report.check("words of B that are gone", real.lost, at_most=0)
    report.check("ratings of A's own that were refused", real.own_refused, at_most=0)
    for what in ("without a key", "with a key, two gateways"):
        report.check(f"{REPEATS} times the same rating, {AT_ONCE} at once, {what}: changes", again[what]["changes"], at_most=1)
        report.check(f"the same, {what}: ids", again[what]["ids"], at_most=1)
        report.check(f"the same, {what}: refused", again[what]["not 200"], at_most=0)
    report.check("up, down, up ends at up", float(again["up, down, up"]), at_least=1)
    caught = fooled["without re-encoding"] > 0 and fooled["without MAC"] > 0 and len(broken.rated) > 0
    controls = "checkers without the re-encoding rule and without the MAC accept forgeries; a gateway that forgets the owner lets A rate"
    report.control(controls, caught=caught)
    figures = {"tried": dict(tried), "taken": dict(taken), "controls": {**fooled, "rated on the broken gateway": len(broken.rated)}}
    return report.finish({**figures, "tries": real.tries, "repeats": again, "asked": real.asked})


if __name__ == "__main__":
    raise SystemExit(main())
