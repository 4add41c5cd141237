"""From a reward model to the reward that PPO sees: the prompt's own zero, unit spread, less for what is uncertain.

Ratings compare answers to one prompt, so the level of a whole prompt is unknown, and it can be half of the raw score's
variance. A few answers of the base policy to each prompt give the zero, and the spread within prompts gives the unit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from feedback.errors import TrainingRefused
from trainer.reward_model import POSTERIOR_PENALTY, RewardModel

if TYPE_CHECKING:
    from trainer.reply import Reply

Prompt = tuple[int, ...]


@dataclass(frozen=True)
class Normaliser:
    """Zero and unit of one reward model's scores, from base answers."""

    centres: dict[Prompt, Tensor]
    """Mean of the mapped features of each prompt's base answers."""
    zero: float
    """Mean of the penalised score over all base answers, measured from their prompt's centre."""
    unit: float
    """Pooled sd of the score within prompts."""

    @classmethod
    def fit(cls, model: RewardModel, prompts: Sequence[Prompt], features_ND: Tensor) -> Normaliser:
        """From base answers: `prompts[i]` is what row i of the features answers; at least two answers to a prompt."""
        rows: dict[Prompt, list[int]] = {}
        for index, prompt in enumerate(prompts):
            rows.setdefault(prompt, []).append(index)
        if any(len(indices) < 2 for indices in rows.values()):
            raise TrainingRefused("base_samples: a prompt has 1 base answer, at least 2 are needed", field="base_samples")
        mapped_NP = model.mapped(features_ND)
        centres = {prompt: mapped_NP[indices].mean(0) for prompt, indices in rows.items()}
        mean_N, sd_N = model.score_mapped(mapped_NP - torch.stack([centres[prompt] for prompt in prompts]))
        # One degree of freedom went into each prompt's centre.
        unit = float((mean_N.square().sum() / (len(prompts) - len(rows))).sqrt())
        return cls(centres, float((mean_N - POSTERIOR_PENALTY * sd_N).mean()), max(unit, 1e-6))


@dataclass(frozen=True)
class Scorer:
    """`(replies, features_BD) -> scores_B`: mean - 0.5 sd from the prompt's zero, in units of the base's sd, clipped."""

    model: RewardModel
    normaliser: Normaliser
    clip: float

    def __call__(self, replies: Sequence[Reply], features_BD: Tensor) -> Tensor:
        return self.score([reply.prompt for reply in replies], features_BD)

    def score(self, prompts: Sequence[Prompt], features_BD: Tensor) -> Tensor:
        """Scores, shape B, float32. Raises TrainingRefused for a prompt without base answers."""
        unknown = [prompt for prompt in prompts if prompt not in self.normaliser.centres]
        if unknown:
            raise TrainingRefused(f"score: {len(unknown)} prompts have no base answers, so they have no zero", field="prompts")
        centres_BP = torch.stack([self.normaliser.centres[prompt] for prompt in prompts])
        mean_B, sd_B = self.model.score_mapped(self.model.mapped(features_BD) - centres_BP)
        scores_B = (mean_B - POSTERIOR_PENALTY * sd_B - self.normaliser.zero) / self.normaliser.unit
        return scores_B.clamp(-self.clip, self.clip).float()
