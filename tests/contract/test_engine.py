"""What an Engine promises, asked of the real vLLM and of the scripted one alike."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from deploy.engine import IDLE_S, VLLM, Engine, Scripted
from deploy.manifest import vllm_name
from feedback.errors import EngineRefused, EngineUnavailable

MakeAdapter = Callable[[Path, Path, int], tuple[str, Path]]
ASKED = [{"role": "user", "content": "Where can I eat well tonight, and what else is there to do?"}]
NOBODY = "a-0000000000000000"


@dataclass
class World:
    """An engine and two adapters for it."""

    engine: Callable[[], Engine]
    """A client for this event loop."""
    adapters: list[tuple[str, Path]]

    def run(self, check: Callable[[Engine], Coroutine[Any, Any, None]]) -> None:
        """Run the check with nothing loaded, and leave nothing loaded."""

        async def clean(engine: Engine) -> None:
            for name in await engine.models():
                await engine.unload(name)

        async def whole() -> None:
            engine = self.engine()
            try:
                await clean(engine)
                await check(engine)
                await clean(engine)
            finally:
                await engine.close()

        asyncio.run(whole())


def body(name: str, **more: Any) -> dict[str, Any]:
    return {"model": name, "messages": ASKED, "max_tokens": 4, "temperature": 1.0, "seed": 7, **more}


@pytest.fixture(params=["scripted", pytest.param("vllm", marks=pytest.mark.slow)])
def world(request: pytest.FixtureRequest, make_adapter: MakeAdapter, tmp_path: Path) -> Iterator[World]:
    engine: Callable[[], Engine]
    if request.param == "vllm":
        server = request.getfixturevalue("vllm_concierge")
        policy, engine = server.policy, lambda: VLLM(server.url)
    else:
        scripted = Scripted(lambda name, messages: f"{name} says one two three four five six")
        policy, engine = request.getfixturevalue("tiny_policy"), lambda: scripted
    made = [make_adapter(policy, tmp_path / "adapters", seed) for seed in (0, 1)]
    yield World(engine, [(vllm_name(adapter_id), path) for adapter_id, path in made])


def test_it_is_ready(world: World) -> None:
    async def check(engine: Engine) -> None:
        assert await engine.ready() is True

    world.run(check)


def test_an_unused_connection_is_given_up_before_vllm_closes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm import envs

    assert IDLE_S <= envs.VLLM_HTTP_TIMEOUT_KEEP_ALIVE / 2
    monkeypatch.setattr("deploy.engine.IDLE_S", 0.2)
    connections: list[object] = []

    async def health(request: web.Request) -> web.Response:
        connections.append(request.transport)
        return web.Response()

    async def check() -> None:
        app = web.Application()
        app.router.add_get("/health", health)
        async with TestServer(app) as server:
            engine = VLLM(str(server.make_url("")))
            for pause_s in (0.0, 0.0, 0.5):
                await asyncio.sleep(pause_s)
                assert await engine.ready()
            await engine.close()

    asyncio.run(check())
    first, at_once, later = connections
    assert first is at_once and later is not first


def test_it_says_which_adapters_are_in_flight(world: World) -> None:
    name, path = world.adapters[1]

    async def check(engine: Engine) -> None:
        await engine.load(name, path)
        assert await engine.in_flight() == set()
        async with asyncio.timeout(30):
            async with engine.stream(body(name, max_tokens=64)) as chunks:
                await anext(chunks)
                while await engine.in_flight() != {name}:
                    await asyncio.sleep(0.01)
            while await engine.in_flight() != set():
                await asyncio.sleep(0.01)

    world.run(check)


def test_adapters_are_loaded_by_name_and_forgotten(world: World) -> None:
    (first, first_path), (second, second_path) = world.adapters

    async def check(engine: Engine) -> None:
        assert await engine.models() == {}
        await engine.load(first, first_path)
        await engine.load(second, second_path)
        assert await engine.models() == {first: first_path.resolve(), second: second_path.resolve()}
        # Once more is no error and changes nothing, not even with another folder: a name never means other weights.
        await engine.load(first, second_path)
        assert (await engine.models())[first] == first_path.resolve()
        await engine.unload(first)
        await engine.unload(first)
        assert await engine.models() == {second: second_path.resolve()}

    world.run(check)


def test_the_same_weights_may_have_two_names(world: World) -> None:
    (first, path), _ = world.adapters

    async def check(engine: Engine) -> None:
        await engine.load(first, path)
        await engine.load(f"{first}-br1", path)
        assert set(await engine.models()) == {first, f"{first}-br1"}
        for name in (first, f"{first}-br1"):
            assert (await engine.complete(body(name)))["model"] == name

    world.run(check)


def test_a_whole_answer(world: World) -> None:
    name, path = world.adapters[0]

    async def check(engine: Engine) -> None:
        await engine.load(name, path)
        reply = await engine.complete(body(name, n=2))
        assert reply["object"] == "chat.completion" and reply["model"] == name
        assert [choice["index"] for choice in reply["choices"]] == [0, 1]
        for choice in reply["choices"]:
            assert choice["message"]["role"] == "assistant"
            assert choice["finish_reason"] in ("stop", "length")
        usage = reply["usage"]
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
        assert 1 <= usage["completion_tokens"] <= 8

    world.run(check)


def test_an_answer_piece_by_piece_is_the_whole_answer(world: World) -> None:
    name, path = world.adapters[1]

    async def check(engine: Engine) -> None:
        await engine.load(name, path)
        whole = (await engine.complete(body(name)))["choices"][0]
        async with engine.stream(body(name, stream=True, stream_options={"include_usage": True})) as chunks:
            got = [chunk async for chunk in chunks]
        assert all(chunk["object"] == "chat.completion.chunk" and chunk["model"] == name for chunk in got)
        assert len({chunk["id"] for chunk in got}) == 1
        deltas = [chunk["choices"][0] for chunk in got if chunk["choices"]]
        assert deltas[0]["delta"]["role"] == "assistant"
        assert "".join(each["delta"].get("content") or "" for each in deltas) == whole["message"]["content"]
        assert [each["finish_reason"] for each in deltas if each["finish_reason"]] == [whole["finish_reason"]]
        assert got[-1]["choices"] == [] and got[-1]["usage"]["completion_tokens"] >= 1

    world.run(check)


def test_leaving_early_ends_the_generation(world: World) -> None:
    name, path = world.adapters[1]

    async def check(engine: Engine) -> None:
        await engine.load(name, path)
        async with engine.stream(body(name, max_tokens=64, ignore_eos=True)) as chunks:
            async for _ in chunks:
                break
        # The next answer is written at once and whole.
        assert (await asyncio.wait_for(engine.complete(body(name)), 30))["choices"][0]["finish_reason"] in ("stop", "length")
        if isinstance(engine, Scripted):
            assert engine.streams_open == 0

    world.run(check)


def test_an_answer_in_progress_outlives_its_name(world: World) -> None:
    name, path = world.adapters[1]

    async def check(engine: Engine) -> None:
        await engine.load(name, path)
        async with engine.stream(body(name, max_tokens=16, ignore_eos=True)) as chunks:
            first = await anext(aiter(chunks))
            await engine.unload(name)
            rest = [chunk async for chunk in chunks]
        assert first["model"] == name
        assert [c["choices"][0]["finish_reason"] for c in rest if c["choices"] and c["choices"][0]["finish_reason"]] in (
            ["length"],
            ["stop"],
        )

    world.run(check)


def test_an_unknown_name_is_refused(world: World) -> None:
    async def check(engine: Engine) -> None:
        with pytest.raises(EngineRefused, match=NOBODY):
            await engine.complete(body(NOBODY))
        with pytest.raises(EngineRefused, match=NOBODY):
            async with engine.stream(body(NOBODY)) as chunks:
                async for _ in chunks:
                    raise AssertionError("nothing may come")

    world.run(check)


def test_a_folder_that_is_no_adapter_is_refused(world: World, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()

    async def check(engine: Engine) -> None:
        with pytest.raises(EngineRefused):
            await engine.load("a-1111111111111111", tmp_path / "empty")
        assert await engine.models() == {}

    world.run(check)


def engine_that_is_away(kind: str) -> Engine:
    if kind == "scripted":
        scripted = Scripted(lambda name, messages: "never said")
        scripted.up = False
        return scripted
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return VLLM(f"http://127.0.0.1:{probe.getsockname()[1]}")


@pytest.mark.parametrize("kind", ["scripted", "vllm"])
def test_a_server_that_is_away_is_unavailable(kind: str, tmp_path: Path) -> None:
    async def check() -> None:
        engine = engine_that_is_away(kind)
        try:
            assert await engine.ready() is False
            for call in (engine.models(), engine.load("a", tmp_path), engine.unload("a"), engine.complete(body("a"))):
                with pytest.raises(EngineUnavailable) as caught:
                    await call
                assert caught.value.retry_after_s == 2
            with pytest.raises(EngineUnavailable):
                async with engine.stream(body("a")) as chunks:
                    async for _ in chunks:
                        raise AssertionError("nothing may come")
        finally:
            await engine.close()

    asyncio.run(check())
