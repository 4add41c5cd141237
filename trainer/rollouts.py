"""Where replies to train on come from: this process, or a vLLM server that serves no people. One contract test for both."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import aiohttp
import torch
from torch import Tensor

from feedback.errors import EngineRefused, EngineUnavailable
from trainer.policy import Policy
from trainer.reply import Reply


@dataclass(frozen=True)
class Sampled:
    """Replies, and how likely they were for whoever sampled them."""

    replies: list[Reply]
    behaviour_BT: Tensor | None = None
    """Log-probabilities at the sampling temperature, 0 on padding; None where the policy itself sampled."""


class Rollouts(Protocol):
    """Samples from the policy as it is now, token ids in and out."""

    def sample(self, prompts: Sequence[tuple[int, ...]], *, max_tokens: int, temperature: float, seed: int) -> Sampled:
        """One reply for each prompt, from the whole distribution (top-p 1, no top-k)."""


class LocalRollouts:
    """In this process: the fastest on a CPU."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy

    def sample(self, prompts: Sequence[tuple[int, ...]], *, max_tokens: int, temperature: float, seed: int) -> Sampled:
        return Sampled(self.policy.sample(prompts, max_tokens=max_tokens, temperature=temperature, seed=seed))


class VLLMRollouts:
    """On a vLLM server started with LoRA, runtime updating and `--logprobs-mode processed_logprobs`.

    Each `sample` saves the adapter under a name that was never used and loads it: a name never means other weights.
    Raises EngineUnavailable and EngineRefused.
    """

    def __init__(self, policy: Policy, url: str, folder: Path, timeout_s: float = 600.0) -> None:
        self.policy = policy
        self.url = url.rstrip("/")
        self.folder = folder
        self.timeout_s = timeout_s

    def sample(self, prompts: Sequence[tuple[int, ...]], *, max_tokens: int, temperature: float, seed: int) -> Sampled:
        name = f"rollout-{uuid.uuid4().hex[:16]}"
        self.policy.save(self.folder / name)
        choices = asyncio.run(self._sample(name, prompts, {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}))
        replies = []
        for prompt, choice in zip(prompts, choices, strict=True):
            replies.append(Reply(prompt, tuple(choice["token_ids"]), choice["finish_reason"] == "stop"))
        width = max(len(reply.tokens) for reply in replies)
        behaviour = [choice["logprobs"]["token_logprobs"] for choice in choices]
        return Sampled(replies, torch.tensor([row + [0.0] * (width - len(row)) for row in behaviour]))

    async def _sample(self, name: str, prompts: Sequence[tuple[int, ...]], sampling: dict[str, Any]) -> list[dict[str, Any]]:
        timeout = aiohttp.ClientTimeout(total=self.timeout_s)
        async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
            await self._post(session, "/v1/load_lora_adapter", {"lora_name": name, "lora_path": str((self.folder / name).resolve())})
            try:
                common = {**sampling, "model": name, "logprobs": 0, "return_token_ids": True, "top_p": 1.0, "top_k": -1}
                bodies = [{**common, "prompt": list(prompt), "seed": sampling["seed"] * 1_000_003 + i} for i, prompt in enumerate(prompts)]
                answers = await asyncio.gather(*(self._post(session, "/v1/completions", body) for body in bodies))
            finally:
                await self._post(session, "/v1/unload_lora_adapter", {"lora_name": name})
        return [answer["choices"][0] for answer in answers]

    async def _post(self, session: aiohttp.ClientSession, path: str, body: dict[str, Any]) -> dict[str, Any]:
        try:
            async with session.post(self.url + path, json=body) as response:
                if response.status >= 400:
                    raise EngineRefused(f"rollouts: {path} answered {response.status}: {(await response.text())[:300]}")
                if response.content_type != "application/json":
                    return {}
                answer: dict[str, Any] = await response.json()
                return answer
        except (aiohttp.ClientError, TimeoutError) as exc:
            raise EngineUnavailable(f"rollouts: {self.url} does not answer: {exc}", retry_after_s=5) from exc
