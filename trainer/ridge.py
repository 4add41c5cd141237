"""A reward model on frozen features: ridge, fitted to everything that people said.

Below some 2,000 pairs a linear head on frozen features beats every trained network, if its regularisation is chosen by
cross-validation and it is fitted to convergence. `cross_validate` compares feature maps and ridges by their held-out
likelihood on prompts that were not trained on; `fit_ridge` fits the best to all ratings, and the curvature at the
optimum gives a Gaussian posterior (Laplace), so that every score comes with its standard deviation.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.optimize
import torch
from safetensors.torch import save
from torch import Tensor

from feedback import files
from feedback.errors import TrainingRefused
from trainer.config import RewardModelSettings
from trainer.feature_map import FeatureMap
from trainer.labels import Labels
from trainer.likelihood import capped_weights, choice_logprobs, negative_log_likelihood, thresholds, thumb_logprobs

if TYPE_CHECKING:
    from trainer.reply import Reply

SIDE_BIAS_FROM_CHOICES = 300
TIES_FROM_LABELS = 500
THUMB_SCALE_FROM_EACH = 500
PROMPT_OFFSET_DIMENSIONS = 16


@contextmanager
def one_thread() -> Iterator[None]:
    """Tensors of a fit are so small that threads wait for each other: two beside other work took ten times as long as one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@dataclass(frozen=True)
class Parameters:
    """Everything the likelihood needs, as float64 tensors. Prior of each: normal around 0, see `precisions`."""

    weights_P: Tensor
    prompt_weights_Z: Tensor
    rater_offsets_U: Tensor
    scalars_5: Tensor
    """Offset c, reluctance to reject both, side bias, log nu of ties, log scale of thumbs."""

    def flat(self) -> Tensor:
        return torch.cat([self.weights_P, self.prompt_weights_Z, self.rater_offsets_U, self.scalars_5])

    @classmethod
    def split(cls, flat: Tensor, sizes: tuple[int, int, int, int]) -> Parameters:
        return cls(*torch.split(flat, list(sizes)))


@dataclass(frozen=True)
class Problem:
    """Ratings and mapped features, ready for the optimiser."""

    mapped_NP: Tensor
    prompts_QZ: Tensor
    labels: Labels
    free_5: Tensor
    """1 where a scalar is fitted, 0 where there is too little data for it."""
    choice_weights: Tensor
    thumb_weights: Tensor

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        return self.mapped_NP.shape[1], self.prompts_QZ.shape[1], len(self.labels.raters), 5

    def loss(
        self, parameters: Parameters, labels: Labels | None = None, *, weighted: bool = True, scores_N: Tensor | None = None
    ) -> Tensor:
        """Negative log-likelihood of the ratings in `labels` (default: the problem's own, weighted), a scalar in nats.

        `scores_N` are other scores of the answers than those that the parameters give.
        """
        labels = labels or self.labels
        offset, reluctance, side_bias, log_nu, log_thumb_scale = (parameters.scalars_5 * self.free_5).unbind()
        scores_N = self.mapped_NP @ parameters.weights_P if scores_N is None else scores_N
        prompt_offsets_Q = self.prompts_QZ @ parameters.prompt_weights_Z
        choices, thumbs = labels.choices, labels.thumbs
        thumb_tau = thresholds(prompt_offsets_Q[labels.prompts_N[thumbs.answers]], parameters.rater_offsets_U[thumbs.raters], offset)
        choice_tau = thresholds(prompt_offsets_Q[labels.prompts_N[choices.first]], parameters.rater_offsets_U[choices.raters], offset)
        thumb_rows = thumb_logprobs(log_thumb_scale.exp() * scores_N[thumbs.answers], thumb_tau)
        choice_rows = choice_logprobs(
            scores_N[choices.first],
            scores_N[choices.second],
            choice_tau - reluctance,
            rejectable_N=choices.rejectable,
            side_bias=side_bias,
            log_nu=log_nu if self.free_5[3] > 0 else None,
        )
        thumb_weights, choice_weights = (self.thumb_weights, self.choice_weights) if weighted else (None, None)
        return negative_log_likelihood(thumb_rows, thumbs.outcomes, thumb_weights) + negative_log_likelihood(
            choice_rows, choices.outcomes, choice_weights
        )


def build_problem(mapped_NP: Tensor, labels: Labels, prompts_QZ: Tensor, max_share: float) -> Problem:
    """What there is enough data for is fitted; a rater's weight is capped, and less if her own contradictions say so."""
    choices, thumbs = len(labels.choices), len(labels.thumbs)
    raters = len(set(labels.choices.raters.tolist()) | set(labels.thumbs.raters.tolist()))
    by_R = torch.cat([labels.choices.raters, labels.thumbs.raters])
    weights = capped_weights(by_R, max(max_share, 2 / max(raters, 1)))
    weights = weights if labels.weights_U is None else weights * labels.weights_U[by_R]
    free = [1, 1, choices >= SIDE_BIAS_FROM_CHOICES, choices >= SIDE_BIAS_FROM_CHOICES and choices + thumbs >= TIES_FROM_LABELS]
    return Problem(
        mapped_NP=mapped_NP,
        prompts_QZ=prompts_QZ,
        labels=labels,
        free_5=torch.tensor([*free, min(choices, thumbs) >= THUMB_SCALE_FROM_EACH], dtype=torch.float64),
        choice_weights=weights[:choices],
        thumb_weights=weights[choices:],
    )


def precisions(problem: Problem, ridge: float) -> Tensor:
    """1/variance of each parameter's prior. `ridge` is the variance that the prior gives to an answer's score.

    Mapped features have unit mean square, so weights of variance ridge/P give scores of variance `ridge`; rater offsets
    and the sum of prompt offsets are N(0, 1); the offset c is N(0, 10²), the reluctance N(0, 1), the side bias N(0, 0.5²),
    log nu N(0, 1) and the log of the thumbs' scale N(0, 0.3²).
    """
    features, prompt_features, raters, _ = problem.sizes
    return torch.cat(
        [
            torch.full((features,), features / ridge, dtype=torch.float64),
            torch.full((prompt_features,), float(max(prompt_features, 1)), dtype=torch.float64),
            torch.ones(raters, dtype=torch.float64),
            torch.tensor([0.01, 1.0, 4.0, 1.0, 1 / 0.09], dtype=torch.float64),
        ]
    )


def minimise(problem: Problem, ridge: float, start: Tensor | None = None, tolerance: float = 1e-3, anchor: Tensor | float = 0.0) -> Tensor:
    """The posterior's mode, flat, to a gradient of `tolerance` nats for each prior's sd or what float64 allows.

    `anchor` is where the prior has its mean, in units of its sd. Raises TrainingRefused where it is not finite.
    """
    # In units of the prior's sd the problem is well conditioned: tens of evaluations, if all of them are remembered.
    scale = precisions(problem, ridge).rsqrt()

    def objective(at: np.ndarray[tuple[int], np.dtype[np.float64]]) -> tuple[float, Any]:
        unit = torch.from_numpy(at.copy()).requires_grad_(True)
        loss = problem.loss(Parameters.split(unit * scale, problem.sizes)) + (unit - anchor).square().sum() / 2
        return loss.item(), torch.autograd.grad(loss, unit)[0].numpy()

    begin = torch.zeros_like(scale) if start is None else start / scale
    options = {"maxcor": 50, "maxiter": 500, "gtol": tolerance, "ftol": 0.0}
    result = scipy.optimize.minimize(objective, begin.numpy(), jac=True, method="L-BFGS-B", options=options)
    found: Tensor = torch.from_numpy(result.x) * scale
    if not (np.isfinite(result.fun) and bool(torch.isfinite(found).all())):
        raise TrainingRefused(f"reward model: the fit at ridge {ridge:g} is not finite; a feature or a weight is", field="ridge")
    return found


@dataclass(frozen=True)
class RidgeModel:
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

    def score(self, features_BD: Tensor) -> tuple[Tensor, Tensor]:
        """Posterior mean and sd of each answer's score, both of shape B, float64."""
        return self.score_mapped(self.mapped(features_BD))

    @cached_property
    def _bytes(self) -> bytes:
        tensors = {"weights": self.weights_P.contiguous(), "covariance": self.covariance_PP.contiguous(), **self.feature_map.tensors()}
        content: bytes = save(tensors, metadata={"about": json.dumps(self.about, sort_keys=True)})
        return content

    @property
    def id(self) -> str:
        """SHA-256 of the saved file."""
        return hashlib.sha256(self._bytes).hexdigest()

    def save(self, path: Path) -> None:
        """Write one safetensors file, atomically."""
        files.replace(path, self._bytes)

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


def prompt_features(labels: Labels) -> Tensor:
    """z(x): the strongest directions of the prompts' features, Q x Z, mean square 1 each."""
    features_QD = labels.prompt_features_QD.double()
    standard_QD = features_QD - features_QD.mean(0)
    left, values, _ = torch.linalg.svd(standard_QD / standard_QD.square().mean(0).sqrt().clamp(min=1e-6), full_matrices=False)
    # No more directions than prompts could tell apart.
    count = min(PROMPT_OFFSET_DIMENSIONS, len(features_QD) // 3, int((values > 1e-6).sum()))
    directions_QZ: Tensor = left[:, :count] * len(features_QD) ** 0.5
    return directions_QZ


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
