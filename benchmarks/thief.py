"""A wants to rate what is B's, with everything that A rightly holds, over every route and every way to write an id."""

from __future__ import annotations

import json
import secrets
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from benchmarks.gateway import MODEL, Running
from feedback.events import FeedbackCleared, FeedbackGiven
from feedback.keys import Scope
from feedback.partitions import SqliteLogs
from serving.access import operations
from serving.who import COOKIE

B_SAID = "only-B-knows-this"
HELD_SCOPES: tuple[tuple[Scope, ...], ...] = (("chat",), ("feedback",), ("chat", "feedback"), ("audit",), ("dataset", "adapters:write"))
"""Of A's own keys. The scopes of operators (`erase`, `keys`, `adapters:promote`) are no end user's."""

SAID = ('"kind":"rating","value":"down"', '"kind":"clear","slot":"comment"', '"kind":"comment","comment":"A was here"')
NAMES = ("interaction_id", "comparison_id", "target", "subject", "rater", "id")
"""Where a careless handler might look for what is rated."""


@dataclass
class Theft:
    """What came of it."""

    tries: int = 0
    credentials: int = 0
    rated: list[str] = field(default_factory=list)
    """Ids of events about what is B's that A caused."""
    read: list[str] = field(default_factory=list)
    """Requests of A's whose reply held B's words."""
    lost: int = 0
    """Answers of B's about which B's words are not to be read any more."""
    own_refused: int = 0
    asked: dict[str, int] = field(default_factory=dict)
    """Requests by route and status."""


@dataclass
class Held:
    """One person's answers: what is theirs, and what they got for it."""

    ids: list[str] = field(default_factory=list)
    tokens: dict[str, str] = field(default_factory=dict)
    """By the kind of what it is about."""

    def add(self, receipt: dict[str, Any], how: str) -> None:
        if "comparison_id" in receipt:
            self.ids.append(receipt["comparison_id"])
            self.tokens[f"{how} comparison"] = receipt["token"]
            for each in receipt["interactions"]:
                self.ids.append(each["interaction_id"])
                self.tokens[f"{how} side {each['index']}"] = each["token"]
        else:
            self.ids.append(receipt["interaction_id"])
            self.tokens[f"{how} answer"] = receipt["token"]


async def steal(running: Running, only: str = "") -> Theft:
    """Everything A can try on the routes with `only` in their name, and what the log and the replies show of it."""
    theft, asked = Theft(), Counter[str]()
    async with aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar()) as session:
        _, app = running.stores.api_keys.create("the application", ("chat", "feedback"))
        own = {scopes: running.stores.api_keys.create("A", scopes)[1] for scopes in HELD_SCOPES}
        cookies = {person: f"{COOKIE}={secrets.token_urlsafe(24)}" for person in "AB"}
        people = {person: Held() for person in "AB"}
        for person, held in people.items():
            ways = {"app": ({"Authorization": f"Bearer {app}"}, {"user": person}), "page": ({"Cookie": cookies[person]}, {})}
            if person == "A":
                ways["own key"] = ({"Authorization": f"Bearer {own['chat', 'feedback']}"}, {"user": "A"})
            for how, (headers, extra) in ways.items():
                for compare in (False, True):
                    held.add(await _chat(session, running, headers, {**extra, "compare": compare}), how)
        for token in people["B"].tokens.values():
            await _rate(session, running, {"Authorization": f"Feedback {token}"}, {"kind": "comment", "comment": B_SAID})
        credentials = {name: {"Authorization": f"Feedback {token}"} for name, token in people["A"].tokens.items()}
        mine = {"kind": "comment", "comment": "mine"}
        theft.own_refused = sum([await _rate(session, running, headers, mine) != 200 for headers in credentials.values()])
        credentials |= {f"key {scopes}": {"Authorization": f"Bearer {secret}"} for scopes, secret in own.items()}
        credentials |= {"session": {"Cookie": cookies["A"]}, "session, any bearer": {"Cookie": cookies["A"], "Authorization": "Bearer x"}}
        credentials |= {"nothing": {}, "token and session": {**credentials["app answer"], "Cookie": cookies["A"]}}
        theft.credentials = len(credentials)
        before = {event.event_id for event in _about(running, people["B"].ids)}
        for route, path, body in _requests(running, people, only):
            method = route.split()[0]
            for headers in credentials.values():
                sent = {**headers, "Content-Type": "application/json"}
                async with session.request(method, running.url + path, data=body, headers=sent, allow_redirects=False) as reply:
                    text = await reply.text()
                theft.tries += 1
                asked[f"{route}: {reply.status}"] += 1
                if B_SAID in text:
                    theft.read.append(f"{method} {path}")
        for token in people["B"].tokens.values():
            async with session.get(f"{running.url}/v1/feedback", headers={"Authorization": f"Feedback {token}"}) as reply:
                theft.lost += B_SAID not in await reply.text()
        theft.rated = [event.event_id for event in _about(running, people["B"].ids) if event.event_id not in before]
    theft.asked = dict(sorted(asked.items()))
    return theft


def _requests(running: Running, people: dict[str, Held], only: str) -> Iterator[tuple[str, str, bytes | None]]:
    """(route, path with query, body) of everything worth trying. What could end A's own rights comes last."""
    routes = sorted(operations(running.app.state.described), key=lambda each: (each[1].startswith("/v1/people"), each))
    for method, path in routes:
        route = f"{method} {path}"
        if only not in route or path == "/v1/chat/completions":  # asking makes something new, which is A's
            continue
        for target in [*people["B"].ids, "B"]:
            if path.startswith("/v1/people"):
                yield from ((route, path, json.dumps({"subject": form}).encode()) for form in _forms(target))
                continue
            for form in list(_forms(target)) if path.startswith("/v1/feedback") else [target]:
                where = path.replace("{name}", _in_path(form)) + "?" + "&".join(f"{name}={_in_path(form)}" for name in NAMES)
                if method == "GET":
                    yield route, where, None
                else:
                    for said in SAID:
                        yield route, where, f'{{{said},"interaction_id":{json.dumps(form)}}}'.encode()
            if method != "GET":
                for odd in _odd(people["A"].ids[0], target):
                    yield route, path, f"{{{SAID[0]},{odd}}}".encode()


def _odd(mine: str, target: str) -> Iterator[str]:
    """Fields that two readers of one body could understand differently."""
    yield f'"interaction_id":"{mine}","interaction_id":"{target}"'
    yield f'"interaction_id":["{target}"]'
    yield from (f'"{name}":"{target}"' for name in NAMES if name != "interaction_id")


def _forms(target: str) -> Iterator[str]:
    """Ways to write an id that a careless comparison would take for it, the plain one first."""
    yield from (target, target.upper(), target.replace("-", ""), f"{{{target}}}", f"urn:uuid:{target}", f" {target}", f"{target}\n")
    yield from (f"{target}\x00", f"{target}/../{target}", f"{target}%", f"session:{target}", "*")
    yield from (str(uuid.UUID(target).int),) if "-" in target else ()


def _in_path(form: str) -> str:
    return "".join(char if char.isalnum() or char == "-" else f"%{ord(char):02X}" for char in form)


def _about(running: Running, ids: list[str]) -> list[FeedbackGiven | FeedbackCleared]:
    logs = SqliteLogs(running.stores.settings.feedback.data_dir / "log")
    return [event for each in ids for event in logs.about(each) if isinstance(event, FeedbackGiven | FeedbackCleared)]


async def _chat(session: aiohttp.ClientSession, running: Running, headers: dict[str, str], extra: dict[str, Any]) -> dict[str, Any]:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}], **extra}
    async with session.post(f"{running.url}/v1/chat/completions", json=body, headers=headers) as reply:
        receipt: dict[str, Any] = (await reply.json())["plaudit"]
        return receipt


async def _rate(session: aiohttp.ClientSession, running: Running, headers: dict[str, str], body: dict[str, str]) -> int:
    async with session.post(f"{running.url}/v1/feedback", json=body, headers=headers) as reply:
        await reply.read()
        return reply.status
