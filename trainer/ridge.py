"""A reward model on frozen features: ridge, fitted to everything that people said.

Below some 2,000 pairs a linear head on frozen features beats every trained network, if its regularisation is chosen by
cross-validation and it is fitted to convergence. `cross_validate` compares feature maps and ridges by their held-out
likelihood on prompts that were not trained on; `fit_ridge` fits the best to all ratings, and the curvature at the
optimum gives a Gaussian posterior (Laplace), so that every score comes with its standard deviation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from feedback.errors import TrainingRefused
from trainer.config import RewardModelSettings
from trainer.feature_map import FeatureMap
from trainer.labels import Labels
from trainer.model_file import ModelFile
from trainer.problem import Parameters, Problem, build_problem, minimise, one_thread, precisions, prompt_features

if TYPE_CHECKING:
    from trainer.reply import Reply


@dataclass(frozen=True)
class RidgeModel(ModelFile):
    """Scores answers by their frozen features. Made by `fit_ridge`."""

    feature_map: FeatureMap
    weights_P: Tensor
    covariance_PP: Tensor
    about: dict[str, object]
    """What it was fitted with: family, kind of map, ridge, counts, seed, digest of the labels, the comparison of settings."""

    def features(self, replies: Sequence[Reply], frozen_BD: Tensor) -> Tensor:
        """The frozen features themselves."""
        return frozen_BD

    def mapped(self, features_BD: Tensor) -> Tensor:
        """The features in which the score is linear, B x P."""
        return self.feature_map(features_BD)

    def score_mapped(self, mapped_BP: Tensor) -> tuple[Tensor, Tensor]:
        """Posterior mean and sd of the score, both of shape B."""
        return mapped_BP @ self.weights_P, self.spread(mapped_BP).norm(dim=1)

    def spread(self, mapped_BP: Tensor) -> Tensor:
        """x·L, where the covariance is L·Lᵀ: its squared length is x·covariance·x."""
        return mapped_BP @ self._root_PP

    @cached_property
    def _root_PP(self) -> Tensor:
        root_PP: Tensor = torch.linalg.cholesky(self.covariance_PP)
        return root_PP

    def tensors(self) -> dict[str, Tensor]:
        """Map, weights and covariance."""
        return {"weights": self.weights_P, "covariance": self.covariance_PP, **self.feature_map.tensors()}

    @classmethod
    def from_tensors(cls, about: dict[str, object], tensors: dict[str, Tensor]) -> RidgeModel:
        """What was in a file of `save`."""
        return cls(FeatureMap.from_tensors(str(about["map"]), tensors), tensors["weights"], tensors["covariance"], about)


@dataclass(frozen=True)
class Trial:
    """One setting that was compared: its held-out negative log-likelihood in nats a rating."""

    map: str
    ridge: float
    nll: float


def folds_of(groups: int, folds: int, seed: int) -> Tensor:
    """A fold for each of the groups, balanced, drawn by `seed`; no more folds than groups."""
    order = torch.randperm(groups, generator=torch.Generator().manual_seed(seed))
    fold_of = torch.empty(groups, dtype=torch.long)
    fold_of[order] = torch.arange(groups) % max(min(folds, groups), 1)
    return fold_of


@dataclass(frozen=True)
class Fold:
    """The best setting, fitted without some prompts."""

    problem: Problem
    outside: Labels
    """Ratings of the prompts that were left out."""
    found: Tensor
    """The posterior's mode, flat."""

    @property
    def parameters(self) -> Parameters:
        return Parameters.split(self.found, self.problem.sizes)


@dataclass(frozen=True)
class CrossFit:
    """The map and ridge with the best held-out likelihood, and what they give without each fold of prompts."""

    map: str
    ridge: float
    nll: float
    """Held-out, in nats a rating."""
    at_edge: bool
    """Whether the best ridge lies on the edge of what was compared."""
    trials: tuple[Trial, ...]
    fold_of_Q: Tensor
    folds: tuple[Fold, ...]


class _Comparison:
    """Held-out likelihood of one feature map at any ridge. Fits start from the last one, so ask for ridges next to each other."""

    def __init__(self, kind: str, labels: Labels, settings: RewardModelSettings, fold_of_Q: Tensor) -> None:
        self.kind, self.count = kind, labels.count
        mapped_NP = FeatureMap.fit(kind, labels.features_ND, labels.prompts_N)(labels.features_ND)
        prompts_QZ = prompt_features(labels)
        self.parts = []
        for fold in range(int(fold_of_Q.max()) + 1):
            problem = build_problem(mapped_NP, labels.where_prompt(fold_of_Q != fold), prompts_QZ, settings.max_rater_share)
            self.parts.append((problem, labels.where_prompt(fold_of_Q == fold)))
        self.starts: list[Tensor | None] = [None] * len(self.parts)

    def __call__(self, ridge: float) -> tuple[Trial, tuple[Fold, ...]]:
        folds = []
        for index, (problem, outside) in enumerate(self.parts):
            self.starts[index] = found = minimise(problem, ridge, self.starts[index])
            folds.append(Fold(problem, outside, found))
        nll = sum(float(fold.problem.loss(fold.parameters, fold.outside, weighted=False)) for fold in folds)
        return Trial(self.kind, ridge, nll / max(self.count, 1)), tuple(folds)


@one_thread()
def cross_validate(labels: Labels, settings: RewardModelSettings) -> CrossFit:
    """Held-out likelihood of every feature map, grouped by prompt, at ridges from the middle outwards for as long as it gets better.

    A grid grows while its edge is the best. The trials of a map stand in ascending order of their ridges.
    Raises TrainingRefused where there is nothing to learn from.
    """
    if labels.count == 0:
        raise TrainingRefused("reward model: 0 ratings are left, at least 1 is needed", field="labels")
    factor = settings.ridges[-1] / settings.ridges[-2]
    beyond = [factor ** (i + 1) for i in range(settings.grid_extensions)]
    grid = [*(settings.ridges[0] / f for f in reversed(beyond)), *settings.ridges, *(settings.ridges[-1] * f for f in beyond)]
    fold_of_Q = folds_of(int(labels.prompts_N.max()) + 1, settings.folds, settings.seed)
    trials: list[Trial] = []
    best: tuple[Trial, tuple[Fold, ...]] | None = None
    for kind in settings.maps:
        comparison, middle = _Comparison(kind, labels, settings, fold_of_Q), len(grid) // 2
        best_of_kind = comparison(grid[middle])
        of_kind = [best_of_kind[0]]
        for way in (grid[:middle][::-1], grid[middle + 1 :]):
            for ridge in way:
                tried = comparison(ridge)
                of_kind.append(tried[0])
                if tried[0].nll >= best_of_kind[0].nll:
                    break
                best_of_kind = tried
        trials += sorted(of_kind, key=lambda t: t.ridge)
        if best is None or best_of_kind[0].nll < best[0].nll:
            best = best_of_kind
    assert best is not None  # the settings name at least one map
    ridges = [t.ridge for t in trials if t.map == best[0].map]
    at_edge = len(ridges) > 1 and best[0].ridge in (ridges[0], ridges[-1])
    return CrossFit(best[0].map, best[0].ridge, best[0].nll, at_edge, tuple(trials), fold_of_Q, best[1])


@one_thread()
def fit_ridge(labels: Labels, settings: RewardModelSettings, chosen: CrossFit | None = None) -> RidgeModel:
    """The reward model of these ratings. Takes seconds; the same labels and settings give the same bytes.

    `chosen` brings map and ridge from a comparison on more ratings than these. Raises TrainingRefused where there is nothing to learn from.
    """
    if labels.count == 0:
        raise TrainingRefused("reward model: 0 ratings are left, at least 1 is needed", field="labels")
    chosen = chosen or cross_validate(labels, settings)
    feature_map = FeatureMap.fit(chosen.map, labels.features_ND, labels.prompts_N)
    problem = build_problem(feature_map(labels.features_ND), labels, prompt_features(labels), settings.max_rater_share)
    found = minimise(problem, chosen.ridge, tolerance=1e-6)
    features = problem.sizes[0]

    def objective(flat: Tensor) -> Tensor:
        return problem.loss(Parameters.split(flat, problem.sizes)) + (precisions(problem, chosen.ridge) * flat.square()).sum() / 2

    hessian = torch.func.hessian(objective)(found)
    # Inverting all of it marginalises over offsets and scalars.
    covariance = torch.linalg.inv((hessian + hessian.T) / 2)[:features, :features].contiguous()
    about = {"family": "ridge", **described(problem, Parameters.split(found, problem.sizes), chosen), "seed": settings.seed}
    return RidgeModel(feature_map, found[:features].clone(), covariance, about)


def described(problem: Problem, parameters: Parameters, chosen: CrossFit) -> dict[str, object]:
    """What a model was fitted with, for its file and for people."""
    names = ("offset", "reluctance", "side_bias", "log_nu", "log_thumb_scale")
    labels = problem.labels
    return {
        "map": chosen.map,
        "ridge": chosen.ridge,
        "ridge_at_grid_edge": chosen.at_edge,
        "held_out_nll": chosen.nll,
        "trials": [asdict(trial) for trial in chosen.trials],
        "choices": len(labels.choices),
        "thumbs": len(labels.thumbs),
        "raters": len(labels.raters),
        "scalars": {name: float(v) for name, v, free in zip(names, parameters.scalars_5, problem.free_5, strict=True) if free},
        "rater_offsets": dict(zip(labels.raters, parameters.rater_offsets_U.tolist(), strict=True)),
        "labels": labels.digest,
    }
