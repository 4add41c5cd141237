"""promote, rollback, promote on a real vLLM with its prefix cache: each digest answers as it did the first time, whatever was loaded, asked
and unloaded in between, and base answers in a batch with adapters as it does alone."""

from __future__ import annotations

import asyncio
import re
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from pydantic import JsonValue

from deploy.engine import VLLM
from deploy.loading import Intake
from deploy.manifest import vllm_name
from deploy.registry import Registry
from deploy.replica import ReplicaAgent, VllmServer
from feedback.database import open_database

MakeAdapter = Callable[[Path, Path, int], tuple[str, Path]]
pytestmark = pytest.mark.slow
WON: list[dict[str, JsonValue]] = [{"name": "wins", "verdict": "pass", "reason": "people prefer it"}]
# Longer than a block of 32 tokens, so that the cache holds their beginnings, and alike but for their ends.
LONG = "Where can I eat well tonight, and what else is there to do in town when it rains and everything else is closed? " * 2
ASKED = [LONG + end for end in ("", "Tell me more.", "And tomorrow?", "Is it far?")]


class Town:
    """A registry, one real server and its agent."""

    def __init__(self, folder: Path, server: VllmServer, make_adapter: MakeAdapter) -> None:
        self.server = server
        self.registry = Registry(open_database(f"sqlite:///{folder / 'registry.sqlite'}"))
        self.ids = []
        for seed in (0, 1, 2):
            adapter, path = make_adapter(server.policy, folder / "adapters", seed)
            self.registry.register(adapter, path, "trainer")
            self.ids.append(adapter)
        self.registry.start_with(self.ids[0], "system")
        self.epoch = self.registry.lease("controller", "one", 600) or 0
        self.intake = Intake.of(server.policy, folder / "private", 8)

    async def follow(self, engine: VLLM) -> None:
        """The agent looks until the server holds what is wanted and nothing else."""
        agent = ReplicaAgent(engine, None, self.registry.wanted, lambda names: self.registry.report_held("one", names), 0.0, self.intake)
        for _ in range(20):
            await agent.step()
            if set(await engine.models()) == set(self.registry.wanted()):
                return
        raise AssertionError(f"loaded are {await engine.models()}, wanted {self.registry.wanted()}: {agent.problems}")

    async def promote(self, engine: VLLM, adapter: str) -> None:
        rollout = self.registry.begin_rollout(adapter, "controller", self.epoch).id
        await self.follow(engine)
        self.registry.start_canary(rollout, 0.5, [], "controller", self.epoch)
        table = self.registry.routing()
        assert table.canary is not None and table.baseline_name is not None
        await asyncio.gather(answers(engine, table.canary.name), answers(engine, table.baseline_name))  # people, on both arms
        self.registry.await_approval(rollout, WON, "won", "controller", self.epoch)
        self.registry.promote(rollout, "mara")
        await self.follow(engine)


@pytest.fixture
def town(tmp_path: Path, vllm_concierge: VllmServer, make_adapter: MakeAdapter) -> Iterator[Town]:
    made = Town(tmp_path, vllm_concierge, make_adapter)
    yield made
    made.registry._engine.dispose()


async def answers(engine: VLLM, name: str, asked: Sequence[str] = ASKED) -> list[str]:
    """Greedy, one after the other."""
    found = []
    for text in asked:
        body = {"model": name, "messages": [{"role": "user", "content": text}], "max_tokens": 16, "temperature": 0}
        found.append(str((await engine.complete(body))["choices"][0]["message"]["content"]))
    return found


def cache_hits(server: VllmServer) -> float:
    """Tokens that were found in the prefix cache so far."""
    with urllib.request.urlopen(f"{server.url}/metrics") as reply:
        told = reply.read().decode()
    return sum(float(each) for each in re.findall(r"^vllm:prefix_cache_hits_total(?:\{[^}]*\})? (\S+)$", told, re.MULTILINE))


def run(town: Town, check: Callable[[VLLM], object]) -> None:
    async def whole() -> None:
        engine = VLLM(town.server.url)
        try:
            await check(engine)  # type: ignore[misc]
        finally:
            for name in await engine.models():
                await engine.unload(name)
            await engine.close()

    asyncio.run(whole())


def test_each_digest_answers_as_it_did_whatever_was_promoted_in_between(town: Town) -> None:
    base, first, second = town.ids

    async def check(engine: VLLM) -> None:
        await town.follow(engine)
        recorded = {base: await answers(engine, vllm_name(base))}

        async def stable_answers_as_recorded() -> None:
            table = town.registry.routing()
            said = await answers(engine, table.stable.name)
            assert said == recorded.setdefault(table.stable.adapter, said)

        await town.promote(engine, first)
        await stable_answers_as_recorded()
        assert town.registry.rollback("mara", "bad", first) == base
        await town.follow(engine)
        await stable_answers_as_recorded()
        # `first` is unloaded while another is promoted twice, and loaded again under the name that it had.
        await town.promote(engine, second)
        await stable_answers_as_recorded()
        assert vllm_name(first) not in await engine.models()
        await town.promote(engine, first)
        assert town.registry.alias("stable") == first
        await stable_answers_as_recorded()
        town.registry.rollback("mara", "bad", first)
        await stable_answers_as_recorded()
        assert town.registry.alias("stable") == second
        assert recorded[base] != recorded[first] != recorded[second] != recorded[base], "otherwise nothing was compared"

    before = cache_hits(town.server)
    run(town, check)
    assert cache_hits(town.server) > before, "the prefix cache was in use"


def test_base_answers_in_a_batch_with_adapters_as_it_does_alone(town: Town) -> None:
    base, first, second = town.ids

    async def check(engine: VLLM) -> None:
        await town.follow(engine)
        bare, alone = await answers(engine, "base"), await answers(engine, vllm_name(base))
        assert bare == alone, "the adapter that changes nothing"
        town.registry.stand_by(first, "mara", "to be loaded")
        rollout = town.registry.begin_rollout(second, "controller", town.epoch)
        await town.follow(engine)
        # Never the bare model: this server computes its rows with the weights of an adapter in the same batch.
        names = [vllm_name(base), vllm_name(base, rollout.id), vllm_name(first), vllm_name(second)]
        together = await asyncio.gather(*(answers(engine, name, [text]) for _ in range(3) for name in names for text in ASKED))
        by_name: dict[str, list[str]] = {}
        for at, said in enumerate(together):
            by_name.setdefault(names[at // len(ASKED) % len(names)], []).extend(said)
        for name in names[:2]:
            assert by_name[name] == alone * 3
        for name in names[2:]:
            assert by_name[name] == (await answers(engine, name)) * 3 != alone * 3

    run(town, check)
