"""Sampling replies with a cache of keys and values, in this process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from trainer.reply import Reply, pad

if TYPE_CHECKING:
    from trainer.policy import Policy


def generate(
    policy: Policy, prompts: Sequence[tuple[int, ...]], max_tokens: int, temperature: float, generator: torch.Generator
) -> list[Reply]:
    """Prompts padded on the left; a row leaves the batch when it ends, so that short replies are cheap."""
    from transformers import DynamicCache

    ids_BS, mask_BS = pad(prompts, policy.pad_id, left=True)
    positions_BS = (mask_BS.cumsum(1) - 1).clamp(min=0)
    ends = torch.tensor(policy.eos_ids)
    tokens: list[list[int]] = [[] for _ in prompts]
    finished = [False] * len(prompts)
    alive = torch.arange(len(prompts))
    cache = DynamicCache(config=policy.base.config)
    for step in range(max_tokens):
        out = policy.trunk(input_ids=ids_BS, attention_mask=mask_BS, position_ids=positions_BS, past_key_values=cache, use_cache=True)
        logits_BV = policy.head(out.last_hidden_state[:, -1])
        if temperature == 0:
            next_B = logits_BV.argmax(1)
        else:
            next_B = torch.multinomial((logits_BV / temperature).softmax(1), 1, generator=generator)[:, 0]
        ended_B = torch.isin(next_B, ends)
        for row, token, ended in zip(alive.tolist(), next_B.tolist(), ended_B.tolist(), strict=True):
            tokens[row].append(token)
            finished[row] = ended
        if bool(ended_B.all()) or step + 1 == max_tokens:
            break
        positions_BS = positions_BS[:, -1:] + 1
        if bool(ended_B.any()):
            left = (~ended_B).nonzero()[:, 0]
            alive, next_B, mask_BS, positions_BS = alive[left], next_B[left], mask_BS[left], positions_BS[left]
            cache.batch_select_indices(left)
        ids_BS = next_B[:, None]
        mask_BS = torch.cat([mask_BS, mask_BS.new_ones(len(alive), 1)], 1)
    return [Reply(prompt, tuple(row), done) for prompt, row, done in zip(prompts, tokens, finished, strict=True)]
