"""Raters of several kinds who judge answers with a linear utility in 20 dimensions: for experiments in seconds."""

from __future__ import annotations

from collections.abc import Collection

import torch
from rating_world import RatedWorld

from trainer.labels import Answer, Choices, Labels, Thumbs

PROMPTS, PER_PROMPT, WIDTH = 40, 6, 20


def panel(
    seed: int,
    *,
    raters: int = 40,
    pairs: int = 0,
    thumbs: int = 0,
    flippers: Collection[int] = (),
    coins: Collection[int] = (),
    repeated: int = 0,
    side: float = 0.0,
) -> RatedWorld:
    """`pairs` and `thumbs` of each rater, of which the last `repeated` pairs are her first ones again.

    Utility has sd 2; flippers have the opposite one, coins none. Prompts are easy or hard by up to 3 logits, raters generous by N(0, 1).
    """
    g = torch.Generator().manual_seed(seed)
    count = PROMPTS * PER_PROMPT
    prompt = torch.arange(PROMPTS).repeat_interleave(PER_PROMPT)
    level = 3 * torch.randn(PROMPTS, generator=g)
    topics = torch.cat([level[:, None], torch.randn(PROMPTS, 4, generator=g)], dim=1)
    own = torch.randn(count, WIDTH - 5, generator=g)
    weights = torch.randn(WIDTH - 5, generator=g)
    utility = own @ (2 * weights / weights.norm())
    sign = torch.ones(raters)
    sign[list(flippers)], sign[list(coins)] = -1.0, 0.0
    by = torch.arange(raters).repeat_interleave(pairs)
    first = torch.randint(count, (raters, pairs), generator=g)
    second = prompt[first] * PER_PROMPT + (first + 1 + torch.randint(PER_PROMPT - 1, first.shape, generator=g)) % PER_PROMPT
    if repeated:
        # The same questions again, with the sides exchanged.
        first[:, -repeated:], second[:, -repeated:] = second[:, :repeated].clone(), first[:, :repeated].clone()
    first, second = first.flatten(), second.flatten()
    chose_b = torch.rand(len(by), generator=g) > torch.sigmoid(sign[by] * (utility[first] - utility[second]) + side)
    rated = torch.randint(count, (raters * thumbs,), generator=g)
    thumb_by = torch.arange(raters).repeat_interleave(thumbs)
    generous = torch.randn(raters, generator=g)
    down = torch.rand(len(rated), generator=g) > torch.sigmoid(sign[thumb_by] * utility[rated] + level[prompt[rated]] + generous[thumb_by])
    labels = Labels(
        features_ND=torch.cat([own, topics[prompt]], dim=1),
        prompts_N=prompt,
        prompt_features_QD=topics,
        choices=Choices(first, second, chose_b.long(), by, torch.zeros(len(by), dtype=torch.bool)),
        thumbs=Thumbs(rated, down.long(), thumb_by),
        raters=tuple(f"r{i:02d}" for i in range(raters)),
        cohorts=((),) * raters,
        answers=tuple(Answer(int(p), f"answer {i}", True, 10) for i, p in enumerate(prompt)),
        prompts=tuple(f"prompt {i}" for i in range(PROMPTS)),
    )
    return RatedWorld(labels, utility.double())
