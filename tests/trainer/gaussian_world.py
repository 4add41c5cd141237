"""A policy that is a Gaussian and a reward model that is ours: reward over-optimisation in seconds.

An answer is a point x ~ N(m, I); the policy is m, and KL(N(m, I) || N(0, I)) = |m|²/2. Gold is linear, but feature 0 is good only up to a
point: 1 is passed by 16 % of the base's answers, so that few ratings show where it turns bad. Training follows the gradient of the
expected score in steps of equal length, as PPO under a growing budget would.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trainer.config import RewardModelSettings
from trainer.labels import Choices, Labels, Thumbs
from trainer.reward_model import RewardModel, fit
from trainer.score import POSTERIOR_PENALTY

WIDTH, PROMPTS, RATERS, STEP = 8, 24, 12, 0.25
TURN, FALL = 1.0, 0.6
ZERO = torch.zeros(WIDTH, dtype=torch.float64)
SETTINGS = RewardModelSettings(ridges=(1.0, 9.0), folds=2, grid_extensions=1)


@dataclass(frozen=True)
class GaussianWorld:
    seed: int

    @property
    def weights_D(self) -> Tensor:
        """Half of the utility comes from the feature that turns."""
        others = torch.randn(WIDTH - 1, generator=self._draws(0), dtype=torch.float64)
        return torch.cat([torch.ones(1, dtype=torch.float64), others / others.norm()])

    def _draws(self, stream: int) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed * 1_000 + stream)

    def utility(self, x_BD: Tensor) -> Tensor:
        return x_BD @ self.weights_D - FALL * (x_BD[:, 0] - TURN).clamp(min=0).square()

    def gold(self, m_D: Tensor) -> float:
        """Expected utility, by 4,096 draws that are the same for every policy."""
        x_BD = m_D + torch.randn(4096, WIDTH, generator=self._draws(1), dtype=torch.float64)
        return float(self.utility(x_BD).mean())

    def rated(self, m_D: Tensor, pairs: int, stream: int) -> Labels:
        """Choices between two answers of the policy m to one prompt, with Bradley-Terry noise."""
        draws = self._draws(100 + stream)
        x_ND = m_D + torch.randn(2 * pairs, WIDTH, generator=draws, dtype=torch.float64)
        first = torch.arange(0, 2 * pairs, 2)
        wins_a = torch.sigmoid(self.utility(x_ND[first]) - self.utility(x_ND[first + 1]))
        outcomes = (torch.rand(pairs, generator=draws, dtype=torch.float64) > wins_a).long()
        return Labels(
            features_ND=x_ND.float(),
            prompts_N=(torch.arange(pairs) % PROMPTS).repeat_interleave(2),
            prompt_features_QD=torch.zeros(PROMPTS, WIDTH),
            choices=Choices(first, first + 1, outcomes, torch.arange(pairs) % RATERS, torch.zeros(pairs, dtype=torch.bool)),
            thumbs=Thumbs(*torch.zeros(3, 0, dtype=torch.long)),
            raters=tuple(f"r{i}" for i in range(RATERS)),
        )


def together(rounds: Sequence[Labels]) -> Labels:
    """All rounds' ratings as one set."""
    offsets = [sum(len(each.features_ND) for each in rounds[:i]) for i in range(len(rounds))]
    columns = [[*vars(each.choices).values()] for each in rounds]
    shifted = [[column[0] + offset, column[1] + offset, *column[2:]] for column, offset in zip(columns, offsets, strict=True)]
    return replace(
        rounds[0],
        features_ND=torch.cat([each.features_ND for each in rounds]),
        prompts_N=torch.cat([each.prompts_N for each in rounds]),
        choices=Choices(*(torch.cat(parts) for parts in zip(*shifted, strict=True))),
    )


def learned(labels: Labels) -> RewardModel:
    return fit(labels, SETTINGS)


def expected_score(model: RewardModel, m_D: Tensor) -> Tensor:
    """What PPO optimises: mean - 0.5 sd of the score from the base's mean, over 512 draws that are the same for every policy."""
    noise_BD = torch.randn(512, WIDTH, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    mean_B, sd_B = model.score_mapped(model.mapped(m_D + noise_BD) - model.mapped(noise_BD).mean(0))
    expected: Tensor = (mean_B - POSTERIOR_PENALTY * sd_B).mean()
    return expected


def climb(model: RewardModel, start_D: Tensor, length: float) -> list[Tensor]:
    """Policies along the gradient of the expected score, STEP apart, until the path is `length` long."""
    path = [start_D]
    for _ in range(round(length / STEP)):
        m_D = path[-1].clone().requires_grad_(True)
        gradient_D = torch.autograd.grad(expected_score(model, m_D), m_D)[0]
        path.append(path[-1] + STEP * gradient_D / gradient_D.norm().clamp(min=1e-9))
    return path
