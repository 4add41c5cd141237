"""The gateway before an HTTP model server: what reaches it, what comes back, and what happens when either side goes."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from serving_world import MODEL, World, said, serve, sse
from waiting import until

from deploy.engine import VLLM
from serving.config import RecordSettings


class Upstream:
    """Speaks as vLLM does; tests set what it says and read what it was asked."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.request_ids: list[str] = []
        self.words: list[str] = ["one ", "two"]
        self.pause_s = 0.0
        self.refusal: tuple[int, dict[str, Any]] | None = None
        self.breaks = False
        self.aborted = 0
        self.url = ""

    async def chat(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(await request.json())
        self.request_ids.append(request.headers["X-Request-Id"])
        if self.refusal:
            return web.json_response(self.refusal[1], status=self.refusal[0])
        reply = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await reply.prepare(request)
        head = {"id": "up", "object": "chat.completion.chunk", "created": 1, "model": self.asked[-1]["model"], "system_fingerprint": "fp"}
        deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ""}, *({"content": word} for word in self.words)]
        try:
            for number, delta in enumerate(deltas):
                entry = {"token": "t", "logprob": -0.5, "bytes": None, "top_logprobs": []}
                choice = {"index": 0, "delta": delta, "finish_reason": None, "logprobs": {"content": [entry]} if number else None}
                choice |= {"token_ids": [number]} if number else {}
                await reply.write(b": keep-alive\n\ndata: " + json.dumps({**head, "choices": [choice]}).encode() + b"\n\n")
                await asyncio.sleep(self.pause_s)
            if self.breaks:
                assert request.transport
                request.transport.close()
                return reply
            end = {"index": 0, "delta": {}, "finish_reason": "stop", "stop_reason": None}
            await reply.write(b"data: " + json.dumps({**head, "choices": [end]}).encode() + b"\n\n")
            usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
            await reply.write(b"data: " + json.dumps({**head, "choices": [], "usage": usage}).encode() + b"\n\ndata: [DONE]\n\n")
        except (ConnectionResetError, asyncio.CancelledError):
            self.aborted += 1
            raise
        return reply


@pytest.fixture
def upstream() -> Iterator[Upstream]:
    stub = Upstream()
    loop = asyncio.new_event_loop()
    app = web.Application()
    app.router.add_post("/v1/chat/completions", stub.chat)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)

    async def start() -> None:
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        stub.url = f"http://127.0.0.1:{runner.addresses[0][1]}"

    loop.run_until_complete(start())
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    yield stub
    asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(5)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(5)
    loop.close()


@pytest.fixture
def world(tmp_path: Path, upstream: Upstream) -> Iterator[World]:
    with serve(tmp_path, engine=VLLM(upstream.url)) as running:
        yield running


def test_what_reaches_the_server_and_what_comes_back(world: World, upstream: Upstream) -> None:
    reply = world.chat("hi", stream=True, user="ann", metadata={"a": "b"}, seed=3, temperature=0.5)
    events = sse(reply.text)
    assert said(events) == "one two" and events[-1] == "[DONE]"
    (body,) = upstream.asked
    assert body == {
        "messages": [{"role": "user", "content": "hi"}],
        "seed": 3,
        "temperature": 0.5,
        "max_tokens": 64,
        "n": 1,
        "stream": True,
        "stream_options": {"include_usage": True},
        "model": "a-" + "a" * 16,
    }
    assert upstream.request_ids == [world.started()[0].interaction_id]
    # Nothing of the server's own leaves: neither its name for the adapter, nor its fingerprint, nor usage that nobody asked for.
    for foreign in ("a-" + "a" * 16, "system_fingerprint", "usage", "token_ids", "stop_reason", "keep-alive", 'logprob"'):
        assert foreign not in reply.text
    (finished,) = world.finished()
    assert (finished.prompt_tokens, finished.completion_tokens, finished.finish_reason) == (3, 2, "stop")


def test_token_ids_are_kept_and_not_shown(tmp_path: Path, upstream: Upstream) -> None:
    from feedback.events import FinishedText

    with serve(tmp_path, engine=VLLM(upstream.url), record=RecordSettings(token_ids=True)) as world:
        reply = world.chat("hi").json()
        assert reply["choices"][0]["logprobs"] is None and "token_ids" not in str(reply)
        assert upstream.asked[0]["return_token_ids"] is True and upstream.asked[0]["logprobs"] is True
        sealed = world.finished()[0].sealed
        assert sealed
        kept = world.stores.subjects.open(sealed, FinishedText)
        assert (kept.token_ids, kept.logprobs) == ([1, 2], [-0.5, -0.5])


def test_a_server_that_talks_nonsense_breaks_the_answer_off_instead_of_leaving_it_open(world: World, upstream: Upstream) -> None:
    upstream.words, upstream.pause_s = ["one ", 5], 0.3  # type: ignore[list-item]
    events = sse(world.chat("hi", stream=True).text)
    assert said(events[:-1]) == "one " and events[-1]["error"]["code"] == "engine_unavailable"
    assert world.finished()[0].finish_reason == "error"
    until(lambda: world.app.state.gateway.streams == 0)  # given back once the connection is closed, after the last byte


def test_logprobs_are_shown_to_whoever_asks(world: World) -> None:
    reply = world.chat("hi", logprobs=True).json()
    assert [entry["logprob"] for entry in reply["choices"][0]["logprobs"]["content"]] == [-0.5, -0.5]


def test_a_client_that_leaves_closes_the_upstream_request(world: World, upstream: Upstream) -> None:
    upstream.words, upstream.pause_s = ["word "] * 1000, 0.01
    body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "stream": True}
    with world.client() as client, client.stream("POST", "/v1/chat/completions", json=body) as reply:
        next(reply.iter_raw())
    until(lambda: upstream.aborted == 1, within_s=1.5)
    until(lambda: [event.finish_reason for event in world.finished()] == ["client_closed"])


def test_a_server_that_dies_in_the_middle(world: World, upstream: Upstream) -> None:
    upstream.breaks, upstream.pause_s = True, 0.05
    events = sse(world.chat("hi", stream=True).text)
    assert said(events[:-1]) == "one two"
    assert events[-1]["error"]["code"] == "engine_unavailable"
    assert [event.finish_reason for event in world.finished()] == ["error"]


@pytest.mark.parametrize(
    ("status", "told", "expected", "code"),
    [
        (400, "This model's maximum context length is 512 tokens.", 400, "context_length_exceeded"),
        (400, "tool_choice is odd", 400, "refused_by_engine"),
        (404, "The model `a-" + "a" * 16 + "` does not exist.", 503, "engine_unavailable"),
        (503, "queue full", 503, "engine_unavailable"),
    ],
)
def test_what_the_server_refuses(world: World, upstream: Upstream, status: int, told: str, expected: int, code: str) -> None:
    upstream.refusal = (status, {"error": {"message": told, "type": "x", "code": status}})
    reply = world.chat("hi", stream=True)
    assert (reply.status_code, reply.json()["error"]["code"]) == (expected, code)
    assert "a" * 16 not in reply.text
    assert ("retry-after" in reply.headers) == (expected == 503)
