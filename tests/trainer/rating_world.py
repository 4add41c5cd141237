"""Answers with known utilities and simulated ratings of them, for tests of everything that learns from ratings."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.labels import Answer, Choices, Labels, Thumbs
from trainer.likelihood import BOTH_BAD

PROMPTS, PER_PROMPT, WIDTH, RATERS = 24, 8, 24, 12


@dataclass(frozen=True)
class RatedWorld:
    labels: Labels
    utilities_N: Tensor

    def agreement(self, scores_N: Tensor) -> float:
        """Share of all pairs of one prompt that the scores order as the utilities do."""
        same = self.labels.prompts_N[:, None] == self.labels.prompts_N[None]
        same &= ~torch.eye(len(scores_N), dtype=torch.bool)
        truth = self.utilities_N[:, None] > self.utilities_N[None]
        return float((truth == (scores_N[:, None] > scores_N[None]))[same].double().mean())


def rated_world(seed: int, *, quadratic: bool = False, choices: int = 150, thumbs: int = 250) -> RatedWorld:
    """Linear utility, or one that falls on both sides of an optimum; prompts shift the features but not the utility."""
    g = torch.Generator().manual_seed(seed)
    count = PROMPTS * PER_PROMPT
    prompt = torch.arange(PROMPTS).repeat_interleave(PER_PROMPT)
    hidden = torch.randn(count, 4, generator=g)
    prompt_features = torch.randn(PROMPTS, WIDTH, generator=g)
    features = hidden @ (3 * torch.randn(4, WIDTH, generator=g)) + prompt_features[prompt] + 0.3 * torch.randn(count, WIDTH, generator=g)
    utility = -1.5 * (hidden[:, 0] - 0.2).square() if quadratic else 1.5 * hidden[:, 0] - hidden[:, 1]
    generosity = torch.randn(RATERS, generator=g)
    first = torch.randint(count, (choices,), generator=g)
    second = prompt[first] * PER_PROMPT + (first + 1 + torch.randint(PER_PROMPT - 1, (choices,), generator=g)) % PER_PROMPT
    by, thumb_by = torch.randint(RATERS, (choices,), generator=g), torch.randint(RATERS, (thumbs,), generator=g)
    chances = torch.softmax(torch.stack([utility[first], utility[second], -generosity[by] - 1], dim=1), dim=1)
    outcome = torch.multinomial(chances, 1, generator=g)[:, 0]
    rated = torch.randint(count, (thumbs,), generator=g)
    down = torch.rand(thumbs, generator=g) > torch.sigmoid(utility[rated] + generosity[thumb_by])
    labels = Labels(
        features_ND=features,
        prompts_N=prompt,
        prompt_features_QD=prompt_features,
        choices=Choices(first, second, torch.where(outcome == 2, BOTH_BAD, outcome), by, torch.ones(choices, dtype=torch.bool)),
        thumbs=Thumbs(rated, down.long(), thumb_by),
        raters=tuple(f"r{i}" for i in range(RATERS)),
        cohorts=tuple(("even",) if i % 2 == 0 else ("odd",) for i in range(RATERS)),
        # Longer answers have the larger first hidden value, so that length has something to say.
        answers=tuple(Answer(int(p), "word " * 5, True, int(20 + 5 * h)) for p, h in zip(prompt, hidden[:, 0], strict=True)),
        prompts=tuple(f"prompt {i}" for i in range(PROMPTS)),
    )
    return RatedWorld(labels, utility.double())
