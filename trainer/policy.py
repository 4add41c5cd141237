"""The policy: a frozen backbone with one LoRA adapter. The reference is the same backbone with the adapter off.

Sequences are padded on the right, so that with causal attention padding can change nothing before it, and no mask is
needed. Everything is float32 on a CPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from feedback.errors import InvalidInput, TrainingRefused

LOGITS_ROWS = 512
"""Rows of logits that exist at once: rows x vocabulary x 4 bytes, 100 MB for 49,152 words."""


@dataclass(frozen=True)
class Reply:
    """A prompt and what the policy said to it, as token ids; `tokens` ends with an end-of-text id iff `finished`."""

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    finished: bool


def pad(rows: Sequence[Sequence[int]], value: int, *, left: bool = False) -> tuple[Tensor, Tensor]:
    """Rows of unequal length as (ids_BT, mask_BT)."""
    width = max(map(len, rows))
    filled = [[value] * (width - len(row)) + list(row) if left else list(row) + [value] * (width - len(row)) for row in rows]
    marked = [[0] * (width - len(row)) + [1] * len(row) if left else [1] * len(row) + [0] * (width - len(row)) for row in rows]
    return torch.tensor(filled), torch.tensor(marked)


class Policy:
    """Samples replies and says how likely they are. Not thread-safe: the adapter is switched on and off."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model = model
        self.tokenizer = tokenizer
        base = model.get_base_model()
        self._trunk = base.base_model
        self._head = base.get_output_embeddings()
        self.hidden_size = int(base.config.hidden_size)
        ends = base.generation_config.eos_token_id if base.generation_config is not None else tokenizer.eos_token_id
        self.eos_ids = tuple(ends) if isinstance(ends, list) else (int(ends),)
        self.pad_id = self.eos_ids[0] if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)

    @classmethod
    def load(cls, path: Path, *, rank: int = 8, alpha: int = 16, seed: int = 0, adapter: Path | None = None) -> Policy:
        """A policy folder, with a fresh adapter (B = 0, so it is the reference) or a saved one.

        Raises InvalidInput where the folder is no model.
        """
        from peft import LoraConfig, PeftModel, get_peft_model
        from transformers import AutoModelForCausalLM, AutoTokenizer

        try:
            base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, local_files_only=True)
            tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        except (OSError, ValueError) as exc:
            reason = str(exc).splitlines()[0]
            raise InvalidInput(f"policy.base is {str(path)!r}, which cannot be loaded as a model: {reason}", field="policy.base") from exc
        if adapter is not None:
            model = PeftModel.from_pretrained(base, adapter, is_trainable=True)
        else:
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
                model = get_peft_model(base, config)
        model.eval()
        return cls(model, tokenizer)

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """The adapter's; the backbone's get no gradient."""
        return [parameter for name, parameter in self.model.named_parameters() if "lora_" in name]

    def state(self) -> dict[str, Tensor]:
        """A copy of the adapter's weights."""
        return {name: p.detach().clone() for name, p in self.model.named_parameters() if "lora_" in name}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take back what `state` gave."""
        own = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, value in state.items():
                own[name].copy_(value)

    def save(self, folder: Path) -> None:
        """PEFT files that a model server loads as they are."""
        self.model.save_pretrained(folder)

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Inside, the adapter is off. Peft's own context manager costs 10-30 ms an entry, these two calls do not."""
        self.model.base_model.disable_adapter_layers()
        try:
            yield
        finally:
            self.model.base_model.enable_adapter_layers()

    def encode(self, messages: Sequence[dict[str, Any]], system_prompt: str | None = None) -> tuple[int, ...]:
        """Token ids of a conversation up to where the answer begins."""
        turns = list(messages)
        if system_prompt is not None and not any(turn["role"] == "system" for turn in turns):
            turns = [{"role": "system", "content": system_prompt}, *turns]
        text = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return tuple(self.tokenizer(text, add_special_tokens=False).input_ids)

    def decode(self, tokens: Sequence[int]) -> str:
        """Text without special tokens."""
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))

    def reply(self, messages: Sequence[dict[str, Any]], system_prompt: str | None, answer: str, finished: bool) -> Reply:
        """An answer that was served, tokenised again."""
        tokens = tuple(self.tokenizer(answer, add_special_tokens=False).input_ids)
        end = self.eos_ids[:1] if finished or not tokens else ()
        return Reply(self.encode(messages, system_prompt), (*tokens, *end), finished)

    @torch.no_grad()
    def sample(
        self, prompts: Sequence[tuple[int, ...]], *, max_tokens: int, temperature: float, seed: int, batch_size: int = 64
    ) -> list[Reply]:
        """One reply for each prompt from pi at this temperature, with nothing cut off (no top-p, no top-k)."""
        replies: list[Reply] = []
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            for start in range(0, len(prompts), batch_size):
                replies += self._generate(prompts[start : start + batch_size], max_tokens, temperature)
        return replies

    def _generate(self, prompts: Sequence[tuple[int, ...]], max_tokens: int, temperature: float) -> list[Reply]:
        ids_BP, mask_BP = pad(prompts, self.pad_id, left=True)
        greedy = temperature == 0
        out_BT = self.model.generate(
            input_ids=ids_BP,
            attention_mask=mask_BP,
            max_new_tokens=max_tokens,
            do_sample=not greedy,
            **({} if greedy else {"temperature": temperature, "top_p": 1.0, "top_k": 0}),
            pad_token_id=self.pad_id,
            eos_token_id=list(self.eos_ids),
        )
        replies = []
        for prompt, row in zip(prompts, out_BT[:, ids_BP.shape[1] :].tolist(), strict=True):
            end = next((i for i, token in enumerate(row) if token in self.eos_ids), None)
            tokens = row[:max_tokens] if end is None else row[: end + 1]
            replies.append(Reply(prompt, tuple(tokens), end is not None))
        return replies

    def hidden(self, replies: Sequence[Reply]) -> tuple[Tensor, Tensor, Tensor]:
        """One forward pass: (states_BTD that predict each reply token, mask_BT, last_BD after the last token)."""
        if any(not reply.tokens for reply in replies):
            raise TrainingRefused("a reply has 0 tokens, at least 1 is needed", field="replies")
        ids_BS, _ = pad([(*reply.prompt, *reply.tokens) for reply in replies], self.pad_id)
        states_BSD = self._trunk(input_ids=ids_BS, use_cache=False).last_hidden_state
        lengths_B = torch.tensor([len(reply.tokens) for reply in replies])
        first_B = torch.tensor([len(reply.prompt) - 1 for reply in replies])
        steps_T = torch.arange(int(lengths_B.max()))
        mask_BT = (steps_T[None] < lengths_B[:, None]).float()
        index_BT = (first_B[:, None] + steps_T[None]).clamp(max=ids_BS.shape[1] - 1)
        rows_B = torch.arange(len(replies))
        return states_BSD[rows_B[:, None], index_BT], mask_BT, states_BSD[rows_B, first_B + lengths_B]

    def token_logprobs(self, states_BTD: Tensor, mask_BT: Tensor, replies: Sequence[Reply], temperature: float) -> Tensor:
        """Log-probability of each reply token under softmax(logits / temperature), B x T, 0 on padding."""
        targets_BT, _ = pad([reply.tokens for reply in replies], self.pad_id)
        real_BT = mask_BT.bool()
        states_ND, targets_N = states_BTD[real_BT], targets_BT[real_BT]
        parts = []
        for start in range(0, len(targets_N), LOGITS_ROWS):
            rows = slice(start, start + LOGITS_ROWS)
            if torch.is_grad_enabled() and len(targets_N) > LOGITS_ROWS:
                # Recomputed backwards, so that the logits of only one chunk exist at a time.
                parts.append(checkpoint(self._chunk, states_ND[rows], targets_N[rows], temperature, use_reentrant=False))
            else:
                parts.append(self._chunk(states_ND[rows], targets_N[rows], temperature))
        out_BT: Tensor = torch.zeros_like(mask_BT).masked_scatter(real_BT, torch.cat(parts))
        return out_BT

    def _chunk(self, states_ND: Tensor, targets_N: Tensor, temperature: float) -> Tensor:
        logits_NV: Tensor = self._head(states_ND).float() / temperature
        chosen_N: Tensor = torch.gather(logits_NV, 1, targets_N[:, None])[:, 0] - logits_NV.logsumexp(1)
        return chosen_N

    @torch.no_grad()
    def passes(self, replies: Sequence[Reply], temperature: float, batch_size: int = 16) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(logprobs_BT, mask_BT, states_BTD, last_BD) of many replies, without gradients, a few at a time."""
        width = max(len(reply.tokens) for reply in replies)
        parts = []
        for start in range(0, len(replies), batch_size):
            some = replies[start : start + batch_size]
            states_BTD, mask_BT, last_BD = self.hidden(some)
            logprobs_BT = self.token_logprobs(states_BTD, mask_BT, some, temperature)
            wider = width - mask_BT.shape[1]
            grow = torch.nn.functional.pad
            parts.append((grow(logprobs_BT, (0, wider)), grow(mask_BT, (0, wider)), grow(states_BTD, (0, 0, 0, wider)), last_BD))
        logprobs, masks, states, lasts = zip(*parts, strict=True)
        return torch.cat(logprobs), torch.cat(masks), torch.cat(states), torch.cat(lasts)

    def logprobs(self, replies: Sequence[Reply], temperature: float, *, reference: bool = False) -> tuple[Tensor, Tensor]:
        """(logprobs_BT, mask_BT) without gradients."""
        if reference:
            with self.reference():
                return self.passes(replies, temperature)[:2]
        return self.passes(replies, temperature)[:2]

    def reference_pass(self, replies: Sequence[Reply], temperature: float) -> tuple[Tensor, Tensor, Tensor]:
        """One adapter-off forward for both uses: (reference logprobs_BT, mask_BT, reward features_BD)."""
        with self.reference():
            logprobs_BT, mask_BT, _, last_BD = self.passes(replies, temperature)
        return logprobs_BT, mask_BT, last_BD

    @torch.no_grad()
    def features(self, replies: Sequence[Reply], batch_size: int = 16) -> Tensor:
        """The backbone's final state after each reply's last token, adapter off; B x D."""
        with self.reference():
            parts = [self.hidden(replies[start : start + batch_size])[2] for start in range(0, len(replies), batch_size)]
        return torch.cat(parts)
