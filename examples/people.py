"""Simulated people who chat and rate over HTTP, as real ones would: the same routes, the same tokens, one key.

They stand in for people in the demo and in tests, and every event of theirs carries the cohort tag `simulated`.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import aiohttp
import numpy as np

from examples.base import Example, Rater
from feedback.errors import EngineError, PlauditError

SIMULATED = "simulated"
T = TypeVar("T")


@dataclass(frozen=True)
class Visit:
    """One comparison that a person saw and what became of it."""

    rater: str
    prompt: str
    choice: str | None
    """a, b, tie or both_bad; None where one side failed and no comparison existed."""
    ratings: int
    """Acknowledged choices and thumbs."""


class People:
    """Talks to a gateway on behalf of an example's raters.

    Args:
        base_url: the gateway's address, for example http://127.0.0.1:8000.
        key: an API key with the scopes chat and feedback.
        concurrency: comparisons under way at once.
    """

    def __init__(self, example: Example, base_url: str, key: str, *, seed: int = 0, concurrency: int = 16) -> None:
        self.example = example
        self.base_url = base_url.rstrip("/")
        self.key = key
        self.random = random.Random(seed)
        self.noise = np.random.default_rng(seed)
        self.gate = asyncio.Semaphore(concurrency)

    async def ask(self, session: aiohttp.ClientSession, body: dict[str, object]) -> dict[str, object]:
        """POST one chat request, without streaming; returns the reply with its `plaudit` object."""
        headers = {"Authorization": f"Bearer {self.key}"}
        return await _post(session, f"{self.base_url}/v1/chat/completions", {"model": self.example.name, **body}, headers)

    async def rate(self, session: aiohttp.ClientSession, token: str, kind: str, value: str) -> None:
        """POST one rating under the token that came with the answer."""
        await _post(session, f"{self.base_url}/v1/feedback", {"kind": kind, "value": value}, {"Authorization": f"Feedback {token}"})

    async def visit(self, session: aiohttp.ClientSession, rater: Rater, prompt: str, *, thumbs: bool = True) -> Visit:
        """One person asks one thing, sees two answers, picks one and perhaps gives each a thumb."""
        reply = await self.ask(
            session,
            {
                "messages": [{"role": "user", "content": prompt}],
                "user": rater.id,
                "cohorts": [SIMULATED, rater.cohort],
                "compare": True,
            },
        )
        extras: dict = reply["plaudit"]  # type: ignore[assignment,type-arg]
        choices: list = reply["choices"]  # type: ignore[assignment,type-arg]
        answers = [(str(choice["message"]["content"]), choice["finish_reason"] == "stop") for choice in choices]
        ratings, picked = 0, None
        if len(answers) == 2 and "comparison_id" in extras:
            (a, done_a), (b, done_b) = answers
            picked = rater.choose(prompt, a, b, done_a, done_b, self.noise)
            await self.rate(session, extras["token"], "choice", picked)
            ratings += 1
        interactions = extras.get("interactions") or [extras]
        for (answer, done), interaction in zip(answers, interactions, strict=True):
            thumb = rater.thumb(prompt, answer, done, self.noise) if thumbs else None
            if thumb is not None:
                await self.rate(session, interaction["token"], "rating", thumb)
                ratings += 1
        return Visit(rater.id, prompt, picked, ratings)

    async def visits(self, count: int, *, thumbs: bool = True, on_visit: Callable[[Visit], None] | None = None) -> list[Visit]:
        """`count` comparisons, spread evenly over raters and prompts, several at a time."""
        raters = _cycle(list(self.example.raters), count, self.random)
        prompts = _cycle(self.example.prompts, count, self.random)

        async def one(rater: Rater, prompt: str) -> Visit:
            async with self.gate:
                visit = await self.visit(session, rater, prompt, thumbs=thumbs)
            if on_visit:
                on_visit(visit)
            return visit

        async with _session() as session, asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(rater, prompt)) for rater, prompt in zip(raters, prompts, strict=True)]
        return [task.result() for task in tasks]


def _cycle(items: list[T], count: int, rng: random.Random) -> list[T]:
    """`count` items, each used equally often to within one, in random order."""
    rounds = [rng.sample(items, len(items)) for _ in range(-(-count // len(items)))]
    return [item for part in rounds for item in part][:count]


def _session() -> aiohttp.ClientSession:
    return aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=600))


async def _post(session: aiohttp.ClientSession, url: str, body: dict[str, object], headers: dict[str, str]) -> dict[str, object]:
    try:
        async with session.post(url, json=body, headers=headers) as response:
            reply: dict[str, object] = await response.json()
            if response.status >= 400:
                raise PlauditError(f"{url} answered {response.status}: {reply}")
            return reply
    except aiohttp.ClientError as exc:
        raise EngineError(f"{url} does not answer: {exc}") from exc
