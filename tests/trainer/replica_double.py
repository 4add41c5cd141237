"""A rollout server in a thread of the test: the routes of vLLM that rollouts use, answered by the policy itself, and ways to fail."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import web
from safetensors.torch import load_file
from torch import Tensor

from trainer.policy import Policy


@dataclass
class ReplicaDouble:
    """Use as a context manager. `requests` counts those for samples; the one numbered `dies_at` and all later ones are cut off."""

    policy: Path
    raw: bool = False
    """Log-probabilities before temperature, as vLLM says them by default."""
    dies_at: int | None = None
    requests: int = 0
    loaded: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)
    url: str = ""

    def __enter__(self) -> ReplicaDouble:
        self._policy = Policy.load(self.policy)
        ready = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=lambda: self._loop.run_until_complete(self._serve(ready)))
        self._thread.start()
        assert ready.wait(30)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()
        self._loop.close()

    async def _serve(self, ready: threading.Event) -> None:
        app = web.Application()
        app.router.add_post("/v1/load_lora_adapter", self._load)
        app.router.add_post("/v1/unload_lora_adapter", self._unload)
        app.router.add_post("/v1/completions", self._complete)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        ready.set()
        await self._stop.wait()
        await runner.cleanup()

    async def _load(self, request: web.Request) -> web.Response:
        asked = await request.json()
        self._cut_off(request)
        saved = load_file(Path(asked["lora_path"]) / "adapter_model.safetensors")
        self.loaded[asked["lora_name"]] = {name: saved[name.replace(".default", "")] for name in self._policy.state()}
        self.names.append(asked["lora_name"])
        return web.Response(text="Success")

    async def _unload(self, request: web.Request) -> web.Response:
        self._cut_off(request)
        del self.loaded[(await request.json())["lora_name"]]
        return web.Response(text="Success")

    def _cut_off(self, request: web.Request) -> None:
        if self.dies_at is not None and self.requests >= self.dies_at:
            assert request.transport is not None
            request.transport.abort()

    async def _complete(self, request: web.Request) -> web.Response:
        asked = await request.json()
        self.requests += 1
        self._cut_off(request)
        if asked["seed"] >= 2**63:  # as vLLM
            return web.json_response({"error": "seed"}, status=400)
        policy, temperature = self._policy, asked["temperature"]
        policy.restore(self.loaded[asked["model"]])
        choices: list[dict[str, Any]] = []
        for i in range(asked["n"]):
            seed = asked["seed"] + i
            (reply,) = policy.sample([tuple(asked["prompt"])], max_tokens=asked["max_tokens"], temperature=temperature, seed=seed)
            logprobs = policy.logprobs([reply], 1.0 if self.raw else temperature)[0][0].tolist()
            said = {"token_ids": reply.tokens, "logprobs": {"token_logprobs": logprobs}}
            choices.insert(0, {"index": i, "finish_reason": "stop" if reply.finished else "length", **said})
        return web.json_response({"choices": choices})
