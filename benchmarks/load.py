"""People under test: each asks, rates while the answer still streams, changes their mind, clears, compares and chooses, and in the end
may withdraw or be erased. What they do is written into a history; what was left of it is collected for the checker.

A person is one process in Jepsen's sense: one thing after the other. A request whose connection is lost is sent again, with the same
Idempotency-Key, to any gateway; only where no attempt can have had an effect is it a failure.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from benchmarks.checker import Final
from benchmarks.gateway_process import MODEL
from benchmarks.operations import Cell, History, Kind, Op
from feedback import snapshot
from feedback.archive import Archive
from feedback.errors import Gone, TrainingRefused
from feedback.events import Event, FeedbackCleared, FeedbackGiven, FinishedText, InteractionFinished, InteractionStarted
from feedback.stores import Stores

TENANT = "default"
SAY = "/v1/feedback"
RETRY_S = 0.03
LEAVE_TIMEOUT_S = 10.0
READERS = 16


@dataclass
class Site:
    """Where the load goes and how it behaves."""

    urls: Callable[[], Sequence[str]]
    """The gateways; they need not be up."""
    secret: str
    pseudonym: Callable[[str], str]
    history: History
    http: aiohttp.ClientSession
    attempts: int = 30
    timeout_s: float = 1.0
    think_s: float = 0.0
    """A person's longest pause."""
    lose_share: float = 0.0
    """Share of acknowledgements that are lost on their way to the person, who then sends the same again to another gateway."""
    hedge_share: float = 0.0
    """Share of requests that are sent to two gateways at once; the answer of one is not waited for."""
    leave_share: float = 0.0
    """Share of people who are erased or withdraw in the end."""
    errors: list[int] = field(default_factory=list)
    """Every 5xx answer to feedback."""
    tokens: dict[Cell, str] = field(default_factory=dict)
    """With which everything that was said may be read again."""
    hedges: set[asyncio.Task[None]] = field(default_factory=set)

    async def settled(self) -> None:
        """No request is under way any more."""
        await asyncio.gather(*self.hedges)


class Person:
    """One of them, with luck of their own."""

    def __init__(self, site: Site, name: str, seed: int) -> None:
        self.site = site
        self.name = name
        self.subject = site.pseudonym(name)
        self.luck = random.Random(f"{seed} {name}")
        self.said = 0
        self.versions: dict[str, int] = {}
        """The last version that was seen of each target."""
        self.known: list[tuple[str, str, str]] = []
        """(target, token, slot) of what may be rated."""

    async def live(self, going: Callable[[], bool]) -> None:
        """Act as long as it is `going` on, then perhaps leave."""
        while going():
            await asyncio.sleep(self.luck.uniform(0, self.site.think_s))
            act = self.luck.random()
            if act < 0.45 or not self.known:
                await self.chat(compare=self.luck.random() < 0.35, stream=self.luck.random() < 0.7)
            elif act < 0.95:
                await self.speak(*self.luck.choice(self.known[-4:]))
            else:
                await self.overreach()
        if self.known and self.luck.random() < self.site.leave_share:
            await self.leave("erase" if self.luck.random() < 0.5 else "withdraw")

    async def hurry(self, done: Callable[[], bool]) -> None:
        """Ask and speak, as fast as it goes."""
        while not done():
            await self.chat(compare=False, stream=False)
            for _ in range(4):
                await self.speak(*self.known[-1])

    async def chat(self, *, compare: bool, stream: bool) -> None:
        """One question. It is not repeated: an answer that broke off may be rated all the same."""
        number = self.site.history.invoke(self.name, "chat", subject=self.subject)
        self.said += 1
        body: dict[str, Any] = {"model": MODEL, "user": self.name, "stream": stream}
        body["messages"] = [{"role": "user", "content": f"question {self.said} of {self.name}"}]
        if compare:
            body["compare"] = True
        heard = Heard()
        headers = {"Authorization": f"Bearer {self.site.secret}"}
        try:
            async with self.site.http.post(
                f"{self._url()}/v1/chat/completions", json=body, headers=headers, timeout=self._timeout(5)
            ) as reply:
                if reply.status == 200 and stream:
                    await self._follow(reply, heard)
                elif reply.status == 200:
                    heard.whole(await reply.json())
                    self._remember(heard)
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError):
            pass  # what was heard until then counts
        texts = dict(heard.texts) if heard.done else dict.fromkeys(heard.texts)
        result = {"interactions": texts, "comparison": heard.comparison}
        self.site.history.end(number, "ok" if heard.done else "info", **result)

    async def _follow(self, reply: aiohttp.ClientResponse, heard: Heard) -> None:
        early = self.luck.random() < 0.5
        async for line in reply.content:
            if not line.startswith(b"data:"):
                continue
            if heard.chunk(line[5:].strip().decode()):
                self._remember(heard)
            if early and heard.chunks == 3:
                early = False
                await self.speak(*self.known[-1])  # while the answer still streams

    def _remember(self, heard: Heard) -> None:
        self.known += [(target, token, "rating") for target, token in heard.tokens.items()]
        if heard.comparison:
            self.known.append((heard.comparison, heard.comparison_token, "choice"))

    async def speak(self, target: str, token: str, slot: str) -> None:
        """Rate, choose, or clear what was said before."""
        if target in self.versions and self.luck.random() < 0.25:
            await self._say("clear", target, token, slot, None, {"kind": "clear", "slot": slot})
        elif slot == "rating":
            value = self.luck.choice(("up", "down"))
            await self._say("rate", target, token, slot, value, {"kind": "rating", "value": value})
        else:
            value = self.luck.choice(("a", "b", "tie", "both_bad"))
            await self._say("choose", target, token, slot, value, {"kind": "choice", "value": value})

    async def overreach(self) -> None:
        """Try what is refused: a choice about a single answer, a thumb about a comparison."""
        target, token, slot = self.luck.choice(self.known[-4:])
        if slot == "rating":
            await self._say("choose", target, token, "choice", "a", {"kind": "choice", "value": "a"})
        else:
            await self._say("rate", target, token, "rating", "up", {"kind": "rating", "value": "up"})

    async def _say(self, kind: Kind, target: str, token: str, slot: str, value: str | None, body: dict[str, Any]) -> None:
        self.said += 1
        key = f"{self.name}/{self.said}"
        cell = {"target": target, "rater": self.subject, "slot": slot}
        number = self.site.history.invoke(self.name, kind, key=key, **cell, value=value)
        body = {**body, **({"version": self.versions[target]} if target in self.versions else {})}
        status, reply = await self._post(SAY, token, body, {"Idempotency-Key": key})
        if status == 200:
            self.versions[target] = reply["version"]
            self.site.tokens[target, self.subject, slot] = token
            self.site.history.end(number, "ok", event_id=reply["feedback_id"], version=reply["version"])
        else:
            self.site.history.end(number, "fail" if status else "info", status=status)

    async def leave(self, kind: Kind) -> None:
        """Be erased, or withdraw; nothing is said afterwards but what is refused."""
        number = self.site.history.invoke(self.name, kind, subject=self.subject)
        target, token, slot = self.known[-1]
        status, _ = await self._post(f"/v1/people/{kind}", token, {}, {})
        self.site.history.end(number, "ok" if status == 200 else "info")
        if kind == "erase" and status == 200:
            await self._say(
                "rate",
                target,
                token,
                slot,
                "up",
                {"kind": "rating", "value": "up"} if slot == "rating" else {"kind": "choice", "value": "a"},
            )

    async def _post(self, path: str, token: str, body: dict[str, Any], headers: dict[str, str]) -> tuple[int, dict[str, Any]]:
        """The status and the reply; status 0 where nobody knows whether it took effect."""
        unsure = False
        timeout_s = self.site.timeout_s if path == SAY else LEAVE_TIMEOUT_S
        every = {"Authorization": f"Feedback {token}", **headers}
        url = self._url()
        if path == SAY and self.luck.random() < self.site.hedge_share:
            self._hedge(url, body, every)
        for _ in range(self.site.attempts):
            try:
                async with self.site.http.post(url + path, json=body, headers=every, timeout=self._timeout(timeout_s)) as reply:
                    told = await reply.json()
                if reply.status < 500 and self.luck.random() >= self.site.lose_share:
                    return (reply.status if reply.status == 200 or not unsure else 0), told
                unsure = unsure or reply.status == 200
                if reply.status >= 500:
                    self.site.errors.append(reply.status)
            except aiohttp.ClientConnectorError:
                pass  # nobody listens there: certainly without effect
            except (aiohttp.ClientError, OSError, TimeoutError, ValueError):
                unsure = True
            await asyncio.sleep(RETRY_S)
            url = self._url()
        return 0, {}

    def _hedge(self, url: str, body: dict[str, Any], headers: dict[str, str]) -> None:
        """Send the same to the other gateways, and do not look at the answers."""

        async def send(other: str) -> None:
            with contextlib.suppress(aiohttp.ClientError, OSError, TimeoutError):
                async with self.site.http.post(other + SAY, json=body, headers=headers, timeout=self._timeout(LEAVE_TIMEOUT_S)) as reply:
                    await reply.read()

        self.site.hedges.update(asyncio.create_task(send(other)) for other in self.site.urls() if other != url)

    def _url(self) -> str:
        return self.luck.choice(self.site.urls())

    def _timeout(self, total_s: float) -> aiohttp.ClientTimeout:
        return aiohttp.ClientTimeout(total=total_s)


class Heard:
    """What a person has heard of an answer so far."""

    def __init__(self) -> None:
        self.done = False
        self.chunks = 0
        self.comparison: str | None = None
        self.comparison_token = ""
        self.tokens: dict[str, str] = {}
        self.texts: dict[str, str] = {}
        self._ids: list[str] = []

    def chunk(self, data: str) -> bool:
        """One event of the stream; whether it told the ids."""
        if data == "[DONE]":
            self.done = bool(self._ids)
            return False
        self.chunks += 1
        part = json.loads(data)
        for choice in part.get("choices", []):
            self._add(choice["index"], choice["delta"].get("content") or "", part)
        return "plaudit" in part and "comparison" not in part["plaudit"]

    def whole(self, reply: dict[str, Any]) -> None:
        """A reply in one piece."""
        for choice in reply["choices"]:
            self._add(choice["index"], choice["message"]["content"], reply)
        self.done = bool(self._ids)

    def _add(self, index: int, text: str, part: dict[str, Any]) -> None:
        if "plaudit" in part and not self._ids:
            told = part["plaudit"]
            listed = told.get("interactions") or [{"interaction_id": told["interaction_id"], "token": told["token"]}]
            self._ids = [each["interaction_id"] for each in listed]
            self.tokens = {each["interaction_id"]: each["token"] for each in listed}
            self.texts = dict.fromkeys(self._ids, "")
            self.comparison, self.comparison_token = told.get("comparison_id"), told["token"] if "comparison_id" in told else ""
        self.texts[self._ids[index]] += text


def pseudonyms(stores: Stores) -> Callable[[str], str]:
    """From the name that an application uses to the one that is stored."""
    return lambda name: stores.subjects.pseudonym(TENANT, name)


def take_snapshot(stores: Stores, archive: Archive, history: History, out: Path) -> None:
    """Build one and write down what is in it."""
    number = history.invoke("trainer", "snapshot")
    try:
        rows = snapshot.build(archive, stores.subjects, out).rows
    except TrainingRefused:  # nothing to train on
        rows = []
    told = [{"event_id": row.event_id, "rater": row.rater, "subject": row.subject, "answers": _answers(row)} for row in rows]
    history.end(number, "ok", rows=told)


def _answers(row: snapshot.Row) -> list[str | None]:
    return [row.answer_a, row.answer_b] if row.kind == "choice" else [row.answer_a]


async def what_gateways_say(site: Site, urls: dict[str, str], cells: Sequence[Cell]) -> dict[str, dict[Cell, str]]:
    """What each gateway says about these cells, in which something was said."""
    readers = asyncio.Semaphore(READERS)

    async def one(url: str, cell: Cell, token: str) -> str | None:
        async with readers, site.http.get(f"{url}/v1/feedback", headers={"Authorization": f"Feedback {token}"}) as reply:
            state = (await reply.json()).get("state", {})
        return str(state[cell[2]]) if state.get(cell[2]) is not None else None

    said: dict[str, dict[Cell, str]] = {}
    for name, url in urls.items():
        values = await asyncio.gather(*(one(url, cell, site.tokens[cell]) for cell in cells))
        said[name] = {cell: value for cell, value in zip(cells, values, strict=True) if value is not None}
    return said


async def ask_routes(site: Site, urls: dict[str, str], registry_stable: str) -> None:
    """Ask each gateway until it answers with the registry's stable, for a while, and write down what it answered with at last."""
    for name, url in urls.items():
        number = site.history.invoke("operator", "route", gateway=name)
        stable, end = "", time.monotonic() + 2
        while not registry_stable.startswith(stable or "?") and time.monotonic() < end:
            body = {"model": MODEL, "messages": [{"role": "user", "content": "who"}], "store": False}
            async with site.http.post(f"{url}/v1/chat/completions", json=body, headers={"Authorization": f"Bearer {site.secret}"}) as reply:
                stable = (await reply.json())["choices"][0]["message"]["content"].split()[0].removeprefix("a-")
        site.history.end(number, "ok", stable=stable)


def collect(stores: Stores, ops: Iterable[Op], gateways: dict[str, dict[Cell, str]], asked: Iterable[Cell]) -> Final:
    """What the archive holds, and which operation each event comes from."""
    ids, archive = stores.subjects.ids, stores.archive
    spoken = [op for op in ops if op.kind in ("rate", "clear", "choose")]
    keys = {ids.idempotency(TENANT, op.value["rater"], op.value["key"]): op.value["key"] for op in spoken}
    kinds = ("interaction.started", "interaction.finished", "feedback.given", "feedback.cleared")
    events = [_shown(stores, event, keys) for kind in kinds for event in _all(archive, kind)]
    held = {(event.target, event.rater, str(event.slot)): event.value or "" for event in archive.current()}
    return Final(events, held, gateways, frozenset(asked))


def _all(archive: Archive, kind: str) -> list[Event]:
    return archive.events(kind, limit=10_000_000)


def _shown(stores: Stores, event: Event, keys: dict[str | None, str]) -> dict[str, Any]:
    shown: dict[str, Any] = {"event_id": event.event_id, "type": event.type}
    if isinstance(event, FeedbackGiven | FeedbackCleared):
        return shown | {"about": event.target, "subject": event.rater, "key": keys.get(event.idempotency)}
    assert isinstance(event, InteractionStarted | InteractionFinished)
    shown |= {"about": event.interaction_id, "subject": event.subject}
    if isinstance(event, InteractionFinished) and event.sealed is not None:
        try:
            shown["answer"] = stores.subjects.open(event.sealed, FinishedText).answer
        except Gone:
            shown["answer"] = None
    return shown
