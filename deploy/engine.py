"""The one client of the model server: `VLLM` over HTTP and `Scripted` in this process, one contract test for both."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, Protocol

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from feedback.errors import EngineRefused, EngineUnavailable
from feedback.events import new_id

Body = Mapping[str, Any]
"""A chat completion request in OpenAI's shape; `model` is the name of a loaded adapter."""
Chunk = dict[str, Any]
"""One `chat.completion.chunk` in OpenAI's shape."""
IDLE_S = 2.0
"""How long an unused connection is kept: vLLM closes one after VLLM_HTTP_TIMEOUT_KEEP_ALIVE, 5 s, and a question sent then is lost."""


class Engine(Protocol):
    """Answers chat requests by named adapters. All methods raise EngineUnavailable where the server does not answer
    and EngineRefused, with its reason, where it will not."""

    async def ready(self) -> bool:
        """Whether it would answer now. Never raises."""

    async def models(self) -> dict[str, Path]:
        """The names of the adapters that are loaded, each with the folder that it was loaded from."""

    async def in_flight(self) -> set[str] | None:
        """The names of adapters that answers are being written with or wait for; None where the server does not say."""

    async def load(self, name: str, path: Path) -> None:
        """Load an adapter's folder under a name. A name that is loaded already stays as it is."""

    async def unload(self, name: str) -> None:
        """Forget a name. Answers being written go on; a name that is not loaded is no error."""

    def stream(self, body: Body, headers: Mapping[str, str] | None = None) -> AbstractAsyncContextManager[AsyncIterator[Chunk]]:
        """The answer, piece by piece. Entering waits for the server to accept; leaving early ends the generation."""

    async def complete(self, body: Body) -> dict[str, Any]:
        """The whole answer, a `chat.completion`."""

    async def close(self) -> None:
        """Release connections."""


class VLLM:
    """A stock vLLM server at `url`, started with `--enable-lora` and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1."""

    def __init__(self, url: str, *, connect_timeout_s: float = 5.0, silence_timeout_s: float = 120.0) -> None:
        self.url = url.rstrip("/")
        self._timeout = aiohttp.ClientTimeout(total=None, connect=connect_timeout_s, sock_read=silence_timeout_s)
        self._session: aiohttp.ClientSession | None = None

    async def ready(self) -> bool:
        try:
            async with self._http().get(f"{self.url}/health", timeout=aiohttp.ClientTimeout(total=5)) as reply:
                return reply.status == 200
        except (aiohttp.ClientError, TimeoutError, OSError):
            return False

    async def models(self) -> dict[str, Path]:
        async with self._request("GET", "/v1/models") as reply:
            listed = await self._json(reply)
        return {str(model["id"]): Path(model["root"]) for model in listed["data"] if model.get("parent")}

    async def in_flight(self) -> set[str] | None:
        async with self._request("GET", "/metrics") as reply:
            with self._translated():
                return _in_flight(await reply.text())

    async def load(self, name: str, path: Path) -> None:
        # Never load_inplace: vLLM then reads the files again at every step.
        body = {"lora_name": name, "lora_path": str(path.resolve())}
        try:
            async with self._request("POST", "/v1/load_lora_adapter", body) as reply:
                await reply.read()
        except EngineRefused as exc:
            if "already been loaded" not in exc.message:
                raise

    async def unload(self, name: str) -> None:
        try:
            async with self._request("POST", "/v1/unload_lora_adapter", {"lora_name": name}) as reply:
                await reply.read()
        except EngineRefused as exc:
            if "cannot be found" not in exc.message and "not found" not in exc.message.lower():
                raise

    @asynccontextmanager
    async def stream(self, body: Body, headers: Mapping[str, str] | None = None) -> AsyncIterator[AsyncIterator[Chunk]]:
        async with self._request("POST", "/v1/chat/completions", {**body, "stream": True}, headers) as reply:
            yield self._chunks(reply)

    async def complete(self, body: Body) -> dict[str, Any]:
        async with self._request("POST", "/v1/chat/completions", {**body, "stream": False}) as reply:
            return await self._json(reply)

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    def _http(self) -> aiohttp.ClientSession:
        if self._session is None or self._session.closed:
            connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE_S)
            self._session = aiohttp.ClientSession(connector=connector, timeout=self._timeout)
        return self._session

    @asynccontextmanager
    async def _request(
        self, method: str, path: str, body: Body | None = None, headers: Mapping[str, str] | None = None
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        with self._translated():
            reply = await self._http().request(method, f"{self.url}{path}", json=body, headers=headers)
        try:
            if reply.status in (502, 503, 504):
                raise EngineUnavailable(f"the model server answered {reply.status}: {await self._reason(reply)}", retry_after_s=2)
            if reply.status >= 400:
                raise EngineRefused(f"the model server refused with {reply.status}: {await self._reason(reply)}")
            yield reply
        finally:
            # Closing a connection whose answer was not read to its end is what makes the server stop writing it.
            reply.close() if not reply.content.at_eof() else reply.release()

    async def _json(self, reply: aiohttp.ClientResponse) -> dict[str, Any]:
        with self._translated():
            told: dict[str, Any] = await reply.json()
        return told

    async def _reason(self, reply: aiohttp.ClientResponse) -> str:
        with self._translated():
            text = await reply.text()
        try:
            told = json.loads(text)
        except ValueError:
            return text[:300]
        error = told.get("error", told) if isinstance(told, dict) else told
        return str(error.get("message", error) if isinstance(error, dict) else error)[:300]

    async def _chunks(self, reply: aiohttp.ClientResponse) -> AsyncIterator[Chunk]:
        """The events of a server-sent stream up to `[DONE]`; a stream that ends without it broke off."""
        while True:
            with self._translated():
                line = await reply.content.readline()
            if not line:
                raise EngineUnavailable("the model server's answer broke off before its end", retry_after_s=2)
            if not line.startswith(b"data:"):
                continue
            data = line[5:].strip()
            if data == b"[DONE]":
                return
            try:
                chunk: Chunk = json.loads(data)
            except ValueError as exc:
                raise EngineUnavailable("the model server sent a broken chunk", retry_after_s=2) from exc
            if "error" in chunk:
                raise EngineUnavailable(f"the model server broke the answer off: {chunk['error']}", retry_after_s=2)
            yield chunk

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """Only around waiting for the server: an error of whoever reads the answer is not the server's."""
        try:
            yield
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as exc:
            raise EngineUnavailable(f"the model server at {self.url} does not answer ({type(exc).__name__})", retry_after_s=2) from exc


def _in_flight(metrics: str) -> set[str] | None:
    """From vLLM's metrics. Names stand in the labels of a gauge whose value is the time; old label sets stay, so the newest counts, and
    only while anything runs at all: after the last answer nothing writes a newer one."""
    requests: float | None = None
    newest, names = 0.0, ""
    for family in text_string_to_metric_families(metrics):
        for sample in family.samples:
            if sample.name in ("vllm:num_requests_running", "vllm:num_requests_waiting"):
                requests = (requests or 0.0) + sample.value
            elif sample.name == "vllm:lora_requests_info" and sample.value >= newest:
                newest = sample.value
                names = f"{sample.labels['running_lora_adapters']},{sample.labels['waiting_lora_adapters']}"
    if requests is None or (requests and not newest):
        return None
    return {name for name in names.split(",") if name} if requests else set()


Answers = Callable[[str, Sequence[Mapping[str, Any]]], str]
"""(name of the adapter, messages) -> answer; may raise an EngineError to fail this one."""


class Scripted:
    """Answers from a function, word by word: for development and tests without a model."""

    def __init__(self, answers: Answers, *, token_s: float = 0.0) -> None:
        self._answers = answers
        self._token_s = token_s
        self.loaded: dict[str, Path] = {}
        """Its adapters; may be filled here instead of by `load`, which needs the loop that serves."""
        self.up = True
        """False: behaves like a server that is down."""
        self.streams_open = 0
        """Answers being written now; 0 once clients that left were noticed."""
        self._writing: Counter[str] = Counter()

    async def ready(self) -> bool:
        return self.up

    async def models(self) -> dict[str, Path]:
        self._check_up()
        return dict(self.loaded)

    async def in_flight(self) -> set[str] | None:
        self._check_up()
        return {name for name, count in self._writing.items() if count}

    async def load(self, name: str, path: Path) -> None:
        self._check_up()
        if not (path / "adapter_config.json").is_file():
            raise EngineRefused(f"the model server refused with 404: no adapter at {path}")
        self.loaded.setdefault(name, path.resolve())

    async def unload(self, name: str) -> None:
        self._check_up()
        self.loaded.pop(name, None)

    @asynccontextmanager
    async def stream(self, body: Body, headers: Mapping[str, str] | None = None) -> AsyncIterator[AsyncIterator[Chunk]]:
        answers = self._write(body)
        self.streams_open += 1
        self._writing[str(body["model"])] += 1
        try:
            yield self._chunks(body, answers)
        finally:
            self.streams_open -= 1
            self._writing[str(body["model"])] -= 1

    async def complete(self, body: Body) -> dict[str, Any]:
        answers = self._write(body)
        choices = [
            {"index": index, "message": {"role": "assistant", "content": "".join(words)}, "finish_reason": reason, "logprobs": None}
            for index, (words, reason) in enumerate(answers)
        ]
        return {**self._head(body, "chat.completion"), "choices": choices, "usage": self._usage(body, answers)}

    async def close(self) -> None:
        return None

    def _check_up(self) -> None:
        if not self.up:
            raise EngineUnavailable("the model server does not answer", retry_after_s=2)

    def _write(self, body: Body) -> list[tuple[list[str], str]]:
        """For each of the n answers its words and how it finished."""
        self._check_up()
        name = str(body["model"])
        if name not in self.loaded:
            raise EngineRefused(f"the model server refused with 404: The model `{name}` does not exist.")
        limit = body.get("max_completion_tokens") or body.get("max_tokens") or 1 << 30
        written = []
        for _ in range(body.get("n") or 1):
            words = re.findall(r"\s*\S+|\s+$", self._answers(name, body["messages"]))
            written.append((words[:limit], "length" if len(words) > limit else "stop"))
        return written

    async def _chunks(self, body: Body, answers: list[tuple[list[str], str]]) -> AsyncIterator[Chunk]:
        head = self._head(body, "chat.completion.chunk")

        def chunk(index: int, delta: dict[str, str], reason: str | None = None) -> Chunk:
            return {**head, "choices": [{"index": index, "delta": delta, "finish_reason": reason, "logprobs": None}]}

        for index, (words, reason) in enumerate(answers):
            yield chunk(index, {"role": "assistant", "content": ""})
            for word in words:
                await asyncio.sleep(self._token_s)
                self._check_up()
                yield chunk(index, {"content": word})
            yield chunk(index, {}, reason)
        if (body.get("stream_options") or {}).get("include_usage"):
            yield {**head, "choices": [], "usage": self._usage(body, answers)}

    def _head(self, body: Body, kind: str) -> dict[str, Any]:
        return {"id": f"chatcmpl-{new_id()}", "object": kind, "created": int(time.time()), "model": body["model"]}

    def _usage(self, body: Body, answers: list[tuple[list[str], str]]) -> dict[str, int]:
        asked = sum(len(str(message.get("content", "")).split()) for message in body["messages"])
        told = sum(len(words) for words, _ in answers)
        return {"prompt_tokens": asked, "completion_tokens": told, "total_tokens": asked + told}
