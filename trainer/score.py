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
from trainer.budget import Watched
from trainer.reward_model import RewardModel

if TYPE_CHECKING:
    from trainer.reply import Reply

Prompt = tuple[int, ...]

POSTERIOR_PENALTY = 0.5
"""A score that is used is mean - 0.5 sd: what the ratings do not speak about earns nothing."""


@dataclass(frozen=True)
class Normaliser:
    """Zero and unit of one reward model's scores, from base answers."""

    centres: dict[Prompt, Tensor]
    """Mean of the mapped features of each prompt's base answers."""
    zero: float
    """Mean of the penalised score over fresh base answers, measured from their prompt's centre."""
    unit: float
    """Pooled sd of the score within prompts."""
    base_N: Tensor
    """Scores of the very answers that made the centres, each as if it had not been among them; their mean is 0."""

    @classmethod
    def fit(cls, model: RewardModel, prompts: Sequence[Prompt], features_ND: Tensor) -> Normaliser:
        """From base answers: `prompts[i]` is what row i of the model's features answers; at least two answers to a prompt.

        An answer lies closer to a centre that it is part of. With n answers of variance v to a prompt, its difference from their mean
        has the variance v·(n - 1)/n, a fresh answer's v·(n + 1)/n, and in the same ratio stands what the model does not know about
        either. Therefore zero and base scores are those of differences stretched by sqrt((n + 1)/(n - 1)).
        """
        rows: dict[Prompt, list[int]] = {}
        for index, prompt in enumerate(prompts):
            rows.setdefault(prompt, []).append(index)
        if any(len(indices) < 2 for indices in rows.values()):
            raise TrainingRefused("base_samples: a prompt has 1 base answer, at least 2 are needed", field="base_samples")
        mapped_NP = model.mapped(features_ND)
        centres = {prompt: mapped_NP[indices].mean(0) for prompt, indices in rows.items()}
        mean_N, sd_N = model.score_mapped(mapped_NP - torch.stack([centres[prompt] for prompt in prompts]))
        # One degree of freedom went into each prompt's centre.
        unit = max(float((mean_N.square().sum() / (len(prompts) - len(rows))).sqrt()), 1e-6)
        counts_N = torch.tensor([len(rows[prompt]) for prompt in prompts], dtype=torch.float64)
        fresh_N = (mean_N - POSTERIOR_PENALTY * sd_N) * ((counts_N + 1) / (counts_N - 1)).sqrt()
        zero = float(fresh_N.mean())
        return cls(centres, zero, unit, (fresh_N - zero) / unit)


@dataclass(frozen=True)
class Scorer:
    """`(replies, frozen features) -> scores_B`: mean - 0.5 sd from the prompt's zero, in units of the base's sd, clipped."""

    model: RewardModel
    normaliser: Normaliser
    clip: float

    @classmethod
    def fit(cls, model: RewardModel, replies: Sequence[Reply], frozen_ND: Tensor, clip: float) -> Scorer:
        """With zero and unit from these answers of the base and their frozen features."""
        return cls(model, Normaliser.fit(model, [reply.prompt for reply in replies], model.features(replies, frozen_ND)), clip)

    def __call__(self, replies: Sequence[Reply], frozen_BD: Tensor) -> Tensor:
        return self.score([reply.prompt for reply in replies], self.model.features(replies, frozen_BD))

    def watched(self, replies: Sequence[Reply], frozen_BD: Tensor) -> Watched:
        """What the model makes of these replies as a whole, without a penalty: how far it has come matters here, not how sure it is."""
        away_BP = self._from_centres([reply.prompt for reply in replies], self.model.features(replies, frozen_BD))
        mean_B, _ = self.model.score_mapped(away_BP)
        place_1S = self.model.spread(away_BP.mean(0, keepdim=True)) / self.normaliser.unit
        return Watched(float(self._clipped(mean_B / self.normaliser.unit).mean()), place_1S[0])

    def score(self, prompts: Sequence[Prompt], features_BD: Tensor) -> Tensor:
        """Scores of the model's own features, shape B, float32. Raises TrainingRefused for a prompt without base answers."""
        mean_B, sd_B = self.model.score_mapped(self._from_centres(prompts, features_BD))
        scores_B = (mean_B - POSTERIOR_PENALTY * sd_B - self.normaliser.zero) / self.normaliser.unit
        return self._clipped(scores_B)

    def _from_centres(self, prompts: Sequence[Prompt], features_BD: Tensor) -> Tensor:
        unknown = [prompt for prompt in prompts if prompt not in self.normaliser.centres]
        if unknown:
            raise TrainingRefused(f"score: {len(unknown)} prompts have no base answers, so they have no zero", field="prompts")
        centres_BP = torch.stack([self.normaliser.centres[prompt] for prompt in prompts])
        return self.model.mapped(features_BD) - centres_BP

    @property
    def base_scores(self) -> Tensor:
        """Of the answers that made zero and unit, as of fresh ones; shape N, float32."""
        return self._clipped(self.normaliser.base_N)

    def _clipped(self, scores_B: Tensor) -> Tensor:
        return scores_B.clamp(-self.clip, self.clip).float()
