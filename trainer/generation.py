"""Sampling replies with a cache of keys and values, in this process.

What all prompts begin with goes through the model once, each distinct prompt once; their samples start from copies of that cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trainer import distributed
from trainer.reply import Reply, pad, shared_prefix

if TYPE_CHECKING:
    from trainer.policy import Policy


def draw(logits_BV: Tensor, uniforms_B: Tensor, temperature: float) -> Tensor:
    """The token at which the cumulative probability passes the row's number in [0, 1); the likeliest where the temperature is 0.

    A row's token hangs on its own number only: neither on who else is in the batch nor on how many processes share the batch.
    """
    if temperature == 0:
        return logits_BV.argmax(1)
    cumulative_BV = (logits_BV.float() / temperature).softmax(1).cumsum(1, dtype=torch.float64)
    reached_B1 = uniforms_B.to(cumulative_BV)[:, None] * cumulative_BV[:, -1:]
    return torch.searchsorted(cumulative_BV, reached_B1, right=True)[:, 0].clamp(max=logits_BV.shape[1] - 1)


def generate(policy: Policy, prompts: Sequence[tuple[int, ...]], temperature: float, uniforms_BT: Tensor) -> list[Reply]:
    """One reply of at most T tokens for each prompt; `uniforms_BT` decide every draw.

    A row leaves the batch when it ends, so that short replies are cheap.
    """
    device, max_tokens = policy.device, uniforms_BT.shape[1]
    ends = torch.tensor(policy.eos_ids, device=device)
    uniforms_BT = uniforms_BT.to(device)
    cache, mask_BS, positions_B, states_BD = prefill(policy, prompts)
    alive = torch.arange(len(prompts), device=device)
    tokens: list[list[int]] = [[] for _ in prompts]
    finished = [False] * len(prompts)
    for step in range(max_tokens):
        next_B = draw(policy.head(states_BD), uniforms_BT[alive, step], temperature)
        ended_B = torch.isin(next_B, ends)
        for row, token, ended in zip(alive.tolist(), next_B.tolist(), ended_B.tolist(), strict=True):
            if not finished[row]:
                tokens[row].append(token)
                finished[row] = ended
        done = bool(ended_B.all())
        if step + 1 == max_tokens or (distributed.all_agree(done) if policy.sharded else done):
            break
        if bool(ended_B.any()):
            # Where the backbone is sharded everybody must take every step, so one finished row stays until all ranks are done.
            left = (~ended_B).nonzero()[:, 0] if not done else ended_B.nonzero()[:1, 0]
            alive, next_B, mask_BS, positions_B = alive[left], next_B[left], mask_BS[left], positions_B[left]
            cache.batch_select_indices(left)
        positions_B = positions_B + 1
        mask_BS = torch.cat([mask_BS, mask_BS.new_ones(len(alive), 1)], 1)
        out = policy.trunk(
            input_ids=next_B[:, None], attention_mask=mask_BS, position_ids=positions_B[:, None], past_key_values=cache, use_cache=True
        )
        states_BD = out.last_hidden_state[:, -1]
    return [Reply(prompt, tuple(row), done) for prompt, row, done in zip(prompts, tokens, finished, strict=True)]


def prefill(policy: Policy, prompts: Sequence[tuple[int, ...]]) -> tuple[Any, Tensor, Tensor, Tensor]:
    """(cache, mask_BS, last positions_B, last states_BD) after the prompts, each distinct one computed once, padded on the left."""
    from transformers import DynamicCache

    distinct = list(dict.fromkeys(prompts))
    cache = DynamicCache(config=policy.base.config)
    shared = shared_prefix(distinct)
    ids_US, mask_US = (tensor.to(policy.device) for tensor in pad([prompt[shared:] for prompt in distinct], policy.pad_id, left=True))
    positions_US = shared + (mask_US.cumsum(1) - 1).clamp(min=0)
    if shared:
        policy.trunk(input_ids=torch.tensor([distinct[0][:shared]], device=policy.device), past_key_values=cache, use_cache=True)
        cache.batch_repeat_interleave(len(distinct))
        mask_US = torch.cat([mask_US.new_ones(len(distinct), shared), mask_US], 1)
    out = policy.trunk(input_ids=ids_US, attention_mask=mask_US, position_ids=positions_US, past_key_values=cache, use_cache=True)
    states_UD, last_U = out.last_hidden_state[:, -1], positions_US[:, -1]
    if len(distinct) == len(prompts):
        return cache, mask_US, last_U, states_UD
    at = {prompt: i for i, prompt in enumerate(distinct)}
    rows_B = torch.tensor([at[prompt] for prompt in prompts], device=policy.device)
    cache.batch_select_indices(rows_B)
    return cache, mask_US[rows_B], last_U[rows_B], states_UD[rows_B]
