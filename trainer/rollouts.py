"""Where replies to train on come from: this process, or vLLM servers that serve no people. One contract test for both."""

from __future__ import annotations

import asyncio
import math
import shutil
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import aiohttp
import structlog
import torch
from torch import Tensor

from feedback.errors import EngineRefused, EngineUnavailable, PlauditError
from trainer import distributed
from trainer.config import RolloutsSettings
from trainer.losses import masked_mean
from trainer.policy import Policy
from trainer.reply import Reply

PROBE_REPLIES = 8
PROBE_TOLERANCE = {torch.float32: 1e-2, torch.bfloat16: 5e-2}
"""Mean difference in nats of the first tokens' log-probabilities up to which two engines compute the same; bfloat16 alone makes 0.02."""

log = structlog.get_logger()


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


def alarms(old_BT: Tensor, behaviour_BT: Tensor, mask_BT: Tensor, *, whole_replies: bool = False) -> tuple[str, ...]:
    """What is wrong with replies that another engine sampled, in words; nothing where importance weights can correct for it.

    w = pi_old / pi_behaviour of each real token, before any cap. Bounds as verl's health checks have them: mean w in [0.5, 2],
    effective sample size (sum w)^2 / (n sum w^2) at least 0.3, sd of w at most 1, |KL(behaviour || old)| at most 0.1 nats a token.
    With `whole_replies` each w is a reply's, the product of its tokens', as RLOO corrects with; the KL stays that of tokens.
    """
    gap_BT = (old_BT - behaviour_BT).double().masked_fill(mask_BT == 0, 0.0)
    w_N = (gap_BT.sum(1) if whole_replies else gap_BT[mask_BT.bool()]).exp()
    mean, sd = float(w_N.mean()), float(w_N.std(correction=0))
    effective = float(w_N.sum().square() / (len(w_N) * w_N.square().sum()))
    kl = float(masked_mean(behaviour_BT - old_BT, mask_BT))
    found = (
        (not 0.5 <= mean <= 2, f"mean importance weight {mean:.2f}, outside [0.5, 2]"),
        (not effective >= 0.3, f"effective sample size {effective:.2f} of 1, below 0.3"),
        (not sd <= 1, f"sd of the importance weights {sd:.2f}, above 1"),
        (not abs(kl) <= 0.1, f"KL(rollouts || trainer) {kl:.3f} nats a token, beyond 0.1"),
    )
    return tuple(words for wrong, words in found if wrong)


class LocalRollouts:
    """In this process: the fastest on a CPU."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy

    def sample(self, prompts: Sequence[tuple[int, ...]], *, max_tokens: int, temperature: float, seed: int) -> Sampled:
        return Sampled(self.policy.sample(prompts, max_tokens=max_tokens, temperature=temperature, seed=seed))


def rollouts_for(policy: Policy, settings: RolloutsSettings, folder: Path) -> Rollouts:
    """As set; see `config.refuse_serving` for servers that may not be named."""
    return VLLMRollouts(policy, settings.urls, folder, settings.timeout_s) if settings.urls else LocalRollouts(policy)


@dataclass(frozen=True)
class _Asked:
    """All samples of one prompt: one request, whose i-th choice is drawn with `seed + i`, as vLLM does it."""

    prompt: tuple[int, ...]
    rows: list[int]
    seed: int


class VLLMRollouts:
    """On vLLM servers started with LoRA, runtime updating and `--logprobs-mode processed_logprobs`; they must see `folder`.

    Each `sample` saves the adapter under a name that was never used and loads it everywhere: a name never means other weights. A
    server that goes away meanwhile leaves its prompts, with their seeds, to the others; at the next call it is asked again.
    Raises EngineUnavailable where none is left, and EngineRefused, also where a server's log-probabilities are not the trainer's.
    """

    def __init__(self, policy: Policy, urls: Sequence[str], folder: Path, timeout_s: float = 600.0) -> None:
        self.policy = policy
        self.urls = [url.rstrip("/") for url in urls]
        self.folder = folder
        self.timeout_s = timeout_s
        self._trusted: set[str] = set()

    def sample(self, prompts: Sequence[tuple[int, ...]], *, max_tokens: int, temperature: float, seed: int) -> Sampled:
        """See `Rollouts`. Of several processes the first one asks, and all of them hear the answer."""
        found: list[tuple[dict[str, Any], str]] | PlauditError = []
        if distributed.rank() == 0:
            try:
                found = self._from_servers(prompts, {"max_tokens": max_tokens, "temperature": temperature, "seed": seed})
            except PlauditError as exc:
                found = exc
        found = distributed.from_first(found)
        if isinstance(found, PlauditError):
            raise found
        replies = []
        for prompt, (choice, _) in zip(prompts, found, strict=True):
            replies.append(Reply(prompt, tuple(choice["token_ids"]), choice["finish_reason"] == "stop"))
        width = max(len(reply.tokens) for reply in replies)
        behaviour = [choice["logprobs"]["token_logprobs"] for choice, _ in found]
        behaviour_BT = torch.tensor([row + [0.0] * (width - len(row)) for row in behaviour])
        self._probe(replies, behaviour_BT, [url for _, url in found], temperature)
        return Sampled(replies, behaviour_BT.to(self.policy.device))

    def _probe(self, replies: list[Reply], behaviour_BT: Tensor, urls: list[str], temperature: float) -> None:
        """Raises EngineRefused where a server that is new computes other log-probabilities of first tokens than the trainer."""
        limit = PROBE_TOLERANCE[self.policy.dtype]
        for url in sorted(set(urls) - self._trusted):
            rows = [i for i, by in enumerate(urls) if by == url][:PROBE_REPLIES]
            ours_B1, _ = self.policy.logprobs([Reply(replies[i].prompt, replies[i].tokens[:1], False) for i in rows], temperature)
            apart = float((behaviour_BT[rows, 0] - ours_B1[:, 0]).abs().mean())
            if not apart <= limit:
                told = f"rollouts.urls: {url} says log-probabilities {apart:.3f} nats from the trainer's, limit {limit:g}"
                raise EngineRefused(f"{told}; start it on the same base, with --logprobs-mode processed_logprobs and the trainer's dtype")
            self._trusted.add(url)

    def _from_servers(self, prompts: Sequence[tuple[int, ...]], sampling: dict[str, Any]) -> list[tuple[dict[str, Any], str]]:
        """For each prompt the choice and the server that made it."""
        name = f"rollout-{uuid.uuid4().hex[:16]}"
        self.policy.save(self.folder / name)
        try:
            return asyncio.run(self._sample(name, prompts, sampling))
        finally:
            shutil.rmtree(self.folder / name)

    async def _sample(self, name: str, prompts: Sequence[tuple[int, ...]], sampling: dict[str, Any]) -> list[tuple[dict[str, Any], str]]:
        rows: dict[tuple[int, ...], list[int]] = {}
        for row, prompt in enumerate(prompts):
            rows.setdefault(prompt, []).append(row)
        todo, before = [], 0
        for prompt, some in rows.items():
            # vLLM takes seeds below 2^63, and adds a choice's number.
            todo.append(_Asked(prompt, some, (sampling["seed"] * 1_000_003 + before) % 2**62))
            before += len(some)
        found: dict[int, tuple[dict[str, Any], str]] = {}
        timeout = aiohttp.ClientTimeout(total=self.timeout_s)
        async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
            path = str((self.folder / name).resolve())
            loads = [self._post(session, url, "/v1/load_lora_adapter", {"lora_name": name, "lora_path": path}) for url in self.urls]
            alive = self._left(self.urls, self.urls, await asyncio.gather(*loads, return_exceptions=True))
            try:
                while todo:
                    # Neighbours are of similar length only by chance, so dealing them out is as even as anything.
                    turns = [(asked, alive[i % len(alive)]) for i, asked in enumerate(todo)]
                    answers = await asyncio.gather(
                        *(self._ask(session, url, name, asked, sampling) for asked, url in turns), return_exceptions=True
                    )
                    for (asked, url), answer in zip(turns, answers, strict=True):
                        if not isinstance(answer, BaseException):
                            found.update({row: (choice, url) for row, choice in zip(asked.rows, answer, strict=True)})
                    todo = [asked for asked, _ in turns if asked.rows[0] not in found]
                    alive = self._left(alive, [url for _, url in turns], answers)
            finally:
                # One that stays loaded only takes room until the server drops what was used longest ago; its name is never asked again.
                unloads = [self._post(session, url, "/v1/unload_lora_adapter", {"lora_name": name}) for url in alive]
                await asyncio.gather(*unloads, return_exceptions=True)
        return [found[row] for row in range(len(prompts))]

    def _left(self, alive: Sequence[str], asked: Sequence[str], answers: Sequence[object]) -> list[str]:
        """The servers without those that went away. Raises what else went wrong, and EngineUnavailable where none is left."""
        dead: dict[str, EngineUnavailable] = {}
        for url, answer in zip(asked, answers, strict=True):
            if isinstance(answer, EngineUnavailable):
                dead[url] = answer
            elif isinstance(answer, BaseException):
                raise answer
        left = [url for url in alive if url not in dead]
        for url, why in dead.items():
            log.warning("a rollout server is gone, the others take over", url=url, left=len(left), why=str(why))
            self._trusted.discard(url)
            if not left:
                told = f"rollouts.urls: none of {len(self.urls)} servers is left ({why}); start one, or empty it to sample in the trainer"
                raise EngineUnavailable(told, retry_after_s=5) from why
        return left

    async def _ask(
        self, session: aiohttp.ClientSession, url: str, name: str, asked: _Asked, sampling: dict[str, Any]
    ) -> list[dict[str, Any]]:
        common = {**sampling, "model": name, "logprobs": 0, "return_token_ids": True, "top_p": 1.0, "top_k": -1}
        own = {"prompt": list(asked.prompt), "n": len(asked.rows), "seed": asked.seed, "stop_token_ids": list(self.policy.eos_ids)}
        answer = await self._post(session, url, "/v1/completions", {**common, **own})
        try:
            choices = sorted(answer.get("choices", []), key=lambda choice: int(choice["index"]))
            for choice in choices:
                self._check(choice, url, sampling["max_tokens"])
        except (AttributeError, KeyError, TypeError, ValueError) as exc:
            told = f"rollouts: {url} sent choices that are none of vLLM's ({exc!r}); start it from a vLLM that knows return_token_ids"
            raise EngineRefused(told) from exc
        if len(choices) != len(asked.rows):
            raise EngineRefused(f"rollouts: {url} sent {len(choices)} samples where {len(asked.rows)} were asked for")
        return choices

    def _check(self, choice: dict[str, Any], url: str, max_tokens: int) -> None:
        """Raises EngineRefused for a sample that cannot be trained on."""
        tokens, logprobs = choice.get("token_ids") or [], (choice.get("logprobs") or {}).get("token_logprobs") or []
        if not 0 < len(tokens) <= max_tokens or len(tokens) != len(logprobs):
            told = f"{len(tokens)} token ids and {len(logprobs)} log-probabilities where {max_tokens} tokens at most were asked for"
            raise EngineRefused(f"rollouts: {url} sent {told}")
        words = self.policy.base.config.vocab_size
        if not all(0 <= token < words for token in tokens):
            raise EngineRefused(f"rollouts: {url} sent token {max(tokens)} of a vocabulary of {words}; start it on policy.base")
        if not all(math.isfinite(logprob) for logprob in logprobs):
            raise EngineRefused(f"rollouts: {url} sent a log-probability that is no finite number")

    async def _post(self, session: aiohttp.ClientSession, url: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
        try:
            async with session.post(url + path, json=body) as response:
                if response.status >= 400:
                    told = f"rollouts: {url}{path} answered {response.status}: {(await response.text())[:300]}"
                    # An adapter that does not fit is a 500, too; of a request for samples it means that the engine died.
                    if response.status >= 500 and path == "/v1/completions":
                        raise EngineUnavailable(told, retry_after_s=5)
                    raise EngineRefused(told)
                if response.content_type != "application/json":
                    return {}
                answer: dict[str, Any] = await response.json()
                return answer
        except (aiohttp.ClientError, TimeoutError, ValueError) as exc:
            raise EngineUnavailable(f"rollouts: {url} does not answer: {exc or type(exc).__name__}", retry_after_s=5) from exc
