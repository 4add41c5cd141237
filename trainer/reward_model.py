"""What a reward model is to everything that uses one, which kind fits how much was said, and whose ratings it learns from.

Below some 2,000 choices ridge on frozen features (`ridge.py`); above, an adapter of its own with an ensemble of heads
(`ensemble.py`), where that foresees unseen prompts better. Whoever scores answers sees neither, only `RewardModel`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from feedback.errors import TrainingRefused
from trainer.config import RewardModelSettings
from trainer.ensemble import Ensemble, fit_ensemble
from trainer.labels import Labels
from trainer.ridge import CrossFit, RidgeModel, cross_validate, fit_ridge

if TYPE_CHECKING:
    from trainer.policy import Policy
    from trainer.reply import Reply


class RewardModel(Protocol):
    """Scores answers and says how sure it is. Only differences between answers to one prompt mean anything."""

    @property
    def id(self) -> str:
        """SHA-256 of the saved file."""
        ...

    @property
    def about(self) -> dict[str, object]:
        """What it was fitted with."""
        ...

    def features(self, replies: Sequence[Reply], frozen_BD: Tensor) -> Tensor:
        """What it looks at, B x D: the backbone's features with all adapters off, or a pass of its own over the replies."""
        ...

    def mapped(self, features_BD: Tensor) -> Tensor:
        """Numbers in which the score is linear, B x P. Differences of scores are differences of these."""
        ...

    def score_mapped(self, mapped_BP: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and sd of the score, both of shape B, float64, for rows of `mapped` or differences of them."""
        ...

    def spread(self, mapped_BP: Tensor) -> Tensor:
        """Coordinates of rows of `mapped`, or differences of them, B x S, in which the length of a row is its score's sd."""
        ...

    def score(self, features_BD: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and sd of each answer's score, both of shape B, float64."""
        ...

    def save(self, path: Path) -> None:
        """Write one safetensors file, atomically."""
        ...


def fit(labels: Labels, settings: RewardModelSettings, chosen: CrossFit | None = None, policy: Policy | None = None) -> RewardModel:
    """The reward model of these ratings. The same labels and settings give the same bytes on a CPU.

    `chosen` brings map and ridge from a comparison on more ratings than these. Without a policy there is no ensemble.
    Raises TrainingRefused where there is nothing to learn from.
    """
    if labels.count == 0:
        raise TrainingRefused("reward model: 0 ratings are left, at least 1 is needed", field="labels")
    chosen = chosen or cross_validate(labels, settings)
    made = fit_ensemble(labels, settings, chosen, policy) if policy and len(labels.choices) >= settings.ensemble_from_choices else None
    return made or fit_ridge(labels, settings, chosen)


def load(path: Path, policy: Policy | None = None) -> RewardModel:
    """What `save` wrote; an ensemble reads answers with the policy's backbone. Raises TrainingRefused where the file is missing."""
    if not path.is_file():
        raise TrainingRefused(f"reward model: no file at {path}", field="reward_model")
    with safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()["about"])
    tensors = load_file(path)
    return Ensemble.from_tensors(about, tensors, policy) if about["family"] == "ensemble" else RidgeModel.from_tensors(about, tensors)


def two_models(raters: int, ratings: int, share: float, min_raters: int, min_labels: int) -> bool:
    """Whether the share of the raters that is kept for a second reward model is enough for one."""
    return round(raters * share) >= min_raters and ratings * share >= min_labels


def split_raters(labels: Labels, share: float, min_raters: int, min_labels: int, seed: int) -> tuple[Labels, Labels | None]:
    """Labels of the first reward model and those of other raters for the second, or all and None where there are too few."""
    raters = len(labels.raters)
    if not two_models(raters, labels.count, share, min_raters, min_labels):
        return labels, None
    order = torch.randperm(raters, generator=torch.Generator().manual_seed(seed))
    others = torch.zeros(raters, dtype=torch.bool)
    others[order[: round(raters * share)]] = True
    main, watch = labels.where_rater(~others), labels.where_rater(others)
    return (main, watch) if main.count and watch.count else (labels, None)
