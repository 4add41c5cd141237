"""A prompt and what was said to it, as token ids, and how many of them become tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


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


SHARED_PREFIX_TOKENS = 8
"""A common beginning shorter than this is not worth a pass of its own."""


def shared_prefix(prompts: Sequence[tuple[int, ...]]) -> int:
    """How many tokens all prompts begin with, leaving at least one of each; 0 where sharing is not worth it."""
    if len(prompts) == 1:
        return 0
    # Whatever the first and the last in order agree on, all between them do, too.
    first, last = min(prompts), max(prompts)
    same = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    same = min(same, min(map(len, prompts)) - 1)
    return same if same >= SHARED_PREFIX_TOKENS else 0


def by_tokens(replies: Sequence[Reply], budget: int) -> list[list[int]]:
    """Indices of the replies in groups of similar length that go through a model together, the longest first.

    A group has at most `budget` tokens, padding counted and its prompts' common beginning counted once; a reply that is longer is
    alone.
    """
    shared = shared_prefix([reply.prompt for reply in replies]) if replies else 0
    own = [len(reply.prompt) - shared + len(reply.tokens) for reply in replies]
    groups: list[list[int]] = []
    room = 0
    for i in sorted(range(len(replies)), key=lambda i: -own[i]):
        if not groups or room < own[groups[-1][0]]:
            groups.append([])
            room = budget - shared
        groups[-1].append(i)
        room -= own[groups[-1][0]]
    return groups
