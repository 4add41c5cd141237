"""Answers with known utilities and simulated ratings of them, for tests of everything that learns from ratings."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.config import RewardModelSettings
from trainer.labels import Answer, Choices, Labels, Thumbs
from trainer.likelihood import BOTH_BAD
from trainer.policy import Policy
from trainer.reply import Reply

PROMPTS, PER_PROMPT, WIDTH, RATERS = 24, 8, 24, 12
QUICK = RewardModelSettings(ridges=(0.3, 3.0), folds=3, grid_extensions=2)
LINEAR = QUICK.model_copy(update={"maps": ("linear",)})


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


def token_world(policy: Policy, seed: int, choices: int = 450, thumbs: int = 50) -> RatedWorld:
    """Answers of two random words, of which people like some and dislike others."""
    g = torch.Generator().manual_seed(seed)
    words = policy.base.config.vocab_size - 5
    worth = torch.randn(words, generator=g)
    prompts = [(2, *(5 + torch.randint(words, (3,), generator=g)).tolist(), 3) for _ in range(PROMPTS)]
    replies = [Reply(p, tuple((5 + torch.randint(words, (2,), generator=g)).tolist()), False) for p in prompts for _ in range(PER_PROMPT)]
    said = torch.tensor([reply.tokens for reply in replies])
    utility = 1.5 * worth[said - 5].sum(1)
    prompt = torch.arange(PROMPTS).repeat_interleave(PER_PROMPT)
    first = torch.randint(len(replies), (choices,), generator=g)
    second = prompt[first] * PER_PROMPT + (first + 1 + torch.randint(PER_PROMPT - 1, (choices,), generator=g)) % PER_PROMPT
    chose_b = (torch.rand(choices, generator=g) > torch.sigmoid(utility[first] - utility[second])).long()
    rated = torch.randint(len(replies), (thumbs,), generator=g)
    down = (torch.rand(thumbs, generator=g) > torch.sigmoid(utility[rated])).long()
    by, thumb_by = torch.randint(RATERS, (choices,), generator=g), torch.randint(RATERS, (thumbs,), generator=g)
    labels = Labels(
        features_ND=policy.features(replies),
        prompts_N=prompt,
        prompt_features_QD=torch.zeros(PROMPTS, policy.hidden_size),
        choices=Choices(first, second, chose_b, by, torch.zeros(choices, dtype=torch.bool)),
        thumbs=Thumbs(rated, down, thumb_by),
        raters=tuple(f"r{i}" for i in range(RATERS)),
        cohorts=((),) * RATERS,
        answers=tuple(Answer(int(p), "", True, len(r.tokens)) for p, r in zip(prompt, replies, strict=True)),
        replies=tuple(replies),
        prompts=("",) * PROMPTS,
    )
    return RatedWorld(labels, utility.double())
