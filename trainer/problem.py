"""Everything that people said as one problem for an optimiser: the joint likelihood with its priors, and the posterior's mode.

Ridge on frozen features and the heads of the ensemble are both fitted by it (`ridge.py`, `ensemble.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.optimize
import torch
from torch import Tensor

from feedback.errors import TrainingRefused
from trainer.labels import Labels
from trainer.likelihood import capped_weights, choice_logprobs, negative_log_likelihood, thresholds, thumb_logprobs

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


def prompt_features(labels: Labels) -> Tensor:
    """z(x): the strongest directions of the prompts' features, Q x Z, mean square 1 each."""
    features_QD = labels.prompt_features_QD.double()
    standard_QD = features_QD - features_QD.mean(0)
    left, values, _ = torch.linalg.svd(standard_QD / standard_QD.square().mean(0).sqrt().clamp(min=1e-6), full_matrices=False)
    # No more directions than prompts could tell apart.
    count = min(PROMPT_OFFSET_DIMENSIONS, len(features_QD) // 3, int((values > 1e-6).sum()))
    directions_QZ: Tensor = left[:, :count] * len(features_QD) ** 0.5
    return directions_QZ
