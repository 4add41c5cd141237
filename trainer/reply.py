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


def by_length(replies: Sequence[Reply], size: int) -> list[list[int]]:
    """Indices of the replies in groups of at most `size`, of similar length, so that little is padded."""
    order = sorted(range(len(replies)), key=lambda i: len(replies[i].prompt) + len(replies[i].tokens))
    return [order[start : start + size] for start in range(0, len(order), size)]
