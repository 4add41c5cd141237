"""What a reward model can and cannot say about ratings it did not see, beside length alone.

Intervals are clustered: votes on one prompt, or by one rater, are not independent.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy.special import stdtrit
from torch import Tensor

from feedback.errors import TrainingRefused
from trainer.config import RewardModelSettings
from trainer.labels import Choices, Labels
from trainer.likelihood import A, B
from trainer.problem import Parameters, build_problem, minimise, one_thread
from trainer.ridge import CrossFit, folds_of

NORMAL_95 = 1.959964
"""Standard errors on either side of a 95 % interval."""
BLIND_RIDGE = 1e-9
"""Variance of a score that is no score."""
CALIBRATION_BINS = 10
SIDE_BIAS_ALARM = 0.2
"""In logits: 55 of 100 equal answers chosen for their side."""
MATCHED_LENGTHS = 0.1
"""Two answers are as long as each other where they differ by less than this share of the longer one."""


@dataclass(frozen=True)
class Accuracy:
    """Share of held-out choices (a or b) whose preferred answer scores higher; ties of the score count half."""

    value: float
    low: float
    high: float
    n: int
    clusters: int


def quantile(clusters: int) -> float:
    """Half of a 95 % interval in units of a sd that was estimated from so many clusters (at least 2)."""
    return float(stdtrit(clusters - 1, 0.975))


def clustered_mean(values_N: Tensor, clusters_N: Tensor) -> tuple[float, float, float]:
    """Mean and its 95 % interval, with the cluster as the unit (linearised ratio estimator, t's quantile with G - 1 degrees of freedom).

    With few clusters the normal one is too short: of 2, 3, 5, 8 it holds the truth in 70, 82, 88, 90 of 100 cases. The variance is
    G/(G-1)·sum over clusters of (sum of residuals)² / N²; with fewer than two clusters the interval is infinitely wide.
    """
    mean = values_N.double().mean()
    group_N = torch.from_numpy(np.unique(clusters_N.numpy(), return_inverse=True)[1])
    groups = int(group_N.max()) + 1
    if groups < 2:
        return float(mean), float("-inf"), float("inf")
    residuals_G = torch.zeros(groups, dtype=torch.float64).index_add(0, group_N, values_N.double() - mean)
    half = quantile(groups) * float((groups / (groups - 1) * residuals_G.square().sum()).sqrt() / len(values_N))
    return float(mean), float(mean) - half, float(mean) + half


def ends(low: float, high: float, least: float = -math.inf, most: float = math.inf) -> tuple[float | None, float | None]:
    """An interval's, for JSON, which has no infinity: cut to what is possible, None where it has no end."""
    return (max(low, least), min(high, most)) if math.isfinite(low) and math.isfinite(high) else (None, None)


def centred_correlation(x_N: Tensor, y_N: Tensor) -> float | None:
    """Pearson's, of values less their means. None where one of the two does not vary."""
    spread = float((x_N.square().sum() * y_N.square().sum()).sqrt())
    return float((x_N * y_N).sum()) / spread if spread > 1e-12 else None


def _accuracy(hits_N: Tensor, clusters_N: Tensor) -> Accuracy | None:
    if len(hits_N) == 0:
        return None
    mean, low, high = clustered_mean(hits_N, clusters_N)
    return Accuracy(mean, max(low, 0.0), min(high, 1.0), len(hits_N), len(set(clusters_N.tolist())))


def _hits(margins_N: Tensor, outcomes_N: Tensor) -> Tensor:
    """1 where the margin a - b has the sign of the choice, 1/2 where it is zero."""
    signed_N = torch.where(outcomes_N == A, margins_N, -margins_N)
    return (signed_N > 0).double() + (signed_N == 0).double() / 2


def decided(labels: Labels) -> Choices:
    """Choices of one of the two answers."""
    return labels.choices.where((labels.choices.outcomes == A) | (labels.choices.outcomes == B))


def choice_accuracy(labels: Labels, scores_N: Tensor) -> Accuracy:
    """How often these scores of the answers order decided choices as people did; prompts are the clusters.

    Raises TrainingRefused where nobody chose between two answers.
    """
    choices = decided(labels)
    hits_N = _hits(scores_N[choices.first] - scores_N[choices.second], choices.outcomes)
    found = _accuracy(hits_N, labels.prompts_N[choices.first])
    if found is None:
        raise TrainingRefused("accuracy: 0 choices between two answers, at least 1 is needed", field="labels")
    return found


@dataclass(frozen=True)
class Gain:
    """Nats by which a rating of an unseen prompt is likelier than without looking at answers; 95 % interval, prompts are the units."""

    mean: float
    low: float | None
    """None where the interval has no end, as with one prompt."""
    high: float | None
    n: int
    """Ratings."""


@one_thread()
def likelihood_gain(labels: Labels, chosen: CrossFit) -> Gain:
    """What the reward model foresees of all ratings, choices and thumbs, beyond what prompt and rater alone tell.

    The same likelihood is fitted with and without a score of the answers. It sees more than the accuracy on decided choices, which
    are few and turn on a coin where two answers are alike.
    """
    prompts = len(chosen.fold_of_Q)
    gains_R, prompt_R = [], []
    for index, fold in enumerate(chosen.folds):
        problem = fold.problem
        blind = Parameters.split(minimise(problem, BLIND_RIDGE), problem.sizes)
        for prompt in (chosen.fold_of_Q == index).nonzero()[:, 0].tolist():
            if (rated := labels.where_prompt(torch.arange(prompts) == prompt)).count == 0:
                continue
            gain = problem.loss(blind, rated, weighted=False) - problem.loss(fold.parameters, rated, weighted=False)
            gains_R += [gain / rated.count] * rated.count
            prompt_R += [prompt] * rated.count
    mean, low, high = clustered_mean(torch.stack(gains_R), torch.tensor(prompt_R))
    return Gain(mean, *ends(low, high), len(gains_R))


def unseen_prompts(labels: Labels, chosen: CrossFit) -> Tensor:
    """Each answer's score by the fit that saw no rating of its prompt; shape N."""
    scores_FN = torch.stack([fold.problem.mapped_NP @ fold.parameters.weights_P for fold in chosen.folds])
    return scores_FN[chosen.fold_of_Q[labels.prompts_N], torch.arange(len(labels.prompts_N))]


@dataclass(frozen=True)
class UnseenRaters:
    """Scores by fits that did not see some raters."""

    fold_of_U: Tensor
    scores_FN: Tensor
    """Of each answer without the raters of each fold."""

    def of(self, raters_R: Tensor, answers_R: Tensor) -> Tensor:
        """Scores of these answers by the fits that know nothing of these raters; shape R."""
        return self.scores_FN[self.fold_of_U[raters_R], answers_R]


@one_thread()
def unseen_raters(labels: Labels, settings: RewardModelSettings, chosen: CrossFit) -> UnseenRaters | None:
    """None where there is one rater only."""
    if len(labels.raters) < 2:
        return None
    fold_of_U = folds_of(len(labels.raters), settings.folds, settings.seed)
    mapped_NP, prompts_QZ = chosen.folds[0].problem.mapped_NP, chosen.folds[0].problem.prompts_QZ
    rows, found = [], None
    for fold in range(int(fold_of_U.max()) + 1):
        problem = build_problem(mapped_NP, labels.where_rater(fold_of_U != fold), prompts_QZ, settings.max_rater_share)
        found = minimise(problem, chosen.ridge, None if found is None else found)
        rows.append(mapped_NP @ found[: problem.sizes[0]])
    return UnseenRaters(fold_of_U, torch.stack(rows))


def held_out(labels: Labels, chosen: CrossFit, others: UnseenRaters | None) -> dict[str, Accuracy | None]:
    """Accuracy on choices of unseen prompts, of those between answers of equal length, of unseen raters, and of length alone.

    The map and the ridge were chosen on the same prompts' folds, so the first figure is a little optimistic.
    """
    choices = decided(labels)
    if len(choices) == 0:
        return {"prompts": None, "length_matched": None, "raters": None, "length": None}
    prompt_N = labels.prompts_N[choices.first]
    scores_N = unseen_prompts(labels, chosen)
    prompt_hits = _hits(scores_N[choices.first] - scores_N[choices.second], choices.outcomes)
    rater_hits = prompt_hits[:0]
    if others is not None:
        margins_N = others.of(choices.raters, choices.first) - others.of(choices.raters, choices.second)
        rater_hits = _hits(margins_N, choices.outcomes)
    tokens_N = _tokens(labels)
    a_N, b_N = tokens_N[choices.first], tokens_N[choices.second]
    matched = (a_N - b_N).abs() < MATCHED_LENGTHS * torch.maximum(a_N, b_N)
    return {
        "prompts": _accuracy(prompt_hits, prompt_N),
        "length_matched": _accuracy(prompt_hits[matched], prompt_N[matched]),
        "raters": _accuracy(rater_hits, choices.raters[: len(rater_hits)]),
        "length": _accuracy(_length_hits(a_N - b_N, choices.outcomes, chosen.fold_of_Q[prompt_N]), prompt_N),
    }


def _tokens(labels: Labels) -> Tensor:
    return torch.tensor([answer.tokens for answer in labels.answers], dtype=torch.float64)


def _length_hits(longer_by_N: Tensor, outcomes_N: Tensor, fold_N: Tensor) -> Tensor:
    """Whether "longer" or "shorter", whichever is right more often on the other folds, picks the preferred answer."""
    longer = _hits(longer_by_N, outcomes_N)
    hits = torch.empty_like(longer)
    for fold in set(fold_N.tolist()):
        outside = longer[fold_N != fold]
        hits[fold_N == fold] = longer[fold_N == fold] if len(outside) == 0 or outside.mean() >= 0.5 else 1 - longer[fold_N == fold]
    return hits


def length_share(labels: Labels, scores_N: Tensor) -> float:
    """Share of the scores' variance within prompts that the number of tokens explains (squared correlation), in [0, 1]."""

    def within(values_N: Tensor) -> Tensor:
        counts_Q = torch.bincount(labels.prompts_N).clamp(min=1)
        sums_Q = torch.zeros(len(counts_Q), dtype=torch.float64).index_add(0, labels.prompts_N, values_N)
        return values_N - (sums_Q / counts_Q)[labels.prompts_N]

    tokens_N, centred_N = within(_tokens(labels)), within(scores_N.double())
    spread = float(tokens_N.square().sum() * centred_N.square().sum())
    return float((tokens_N * centred_N).sum()) ** 2 / spread if spread > 0 else 0.0


@dataclass(frozen=True)
class Calibration:
    """How far the chances that were foretold for held-out choices are from what was chosen."""

    error: float
    """Expected calibration error, in [0, 1]."""
    by_chance: float
    """What chances that were exactly right would show with as many choices."""
    n: int
    curve: tuple[tuple[float, float, int], ...] = ()
    """Of each bin that is not empty: mean chance foretold, share chosen, choices."""

    @property
    def words(self) -> str:
        found = f"foretold chances of {self.n} choices on unseen prompts are off by {100 * self.error:.1f} points"
        return f"{found}; exactly right ones would show {100 * self.by_chance:.1f}"


def calibration(logits_N: Tensor, outcomes_N: Tensor, bins: int = CALIBRATION_BINS) -> Calibration | None:
    """Of the logits that side a is chosen. None for no choices.

    ECE = sum over bins of n_b/N · |mean foretold - share chosen|, in bins of equal width of P(a) (Naeini, Cooper, Hauskrecht 2015).
    Noise alone gives a bin sqrt(2/pi)·sd, because its share of a has the variance sum p(1 - p)/n_b².
    """
    if len(logits_N) == 0:
        return None
    chance_N, chose_N = torch.sigmoid(logits_N.double()), (outcomes_N == A).double()
    bin_N = (chance_N * bins).long().clamp(max=bins - 1)

    def total(values_N: Tensor) -> Tensor:
        return torch.zeros(bins, dtype=torch.float64).index_add(0, bin_N, values_N)

    error = total(chance_N - chose_N).abs().sum() / len(logits_N)
    by_chance = math.sqrt(2 / math.pi) * total(chance_N * (1 - chance_N)).sqrt().sum() / len(logits_N)
    counts = torch.bincount(bin_N, minlength=bins).tolist()
    means = zip(total(chance_N).tolist(), total(chose_N).tolist(), counts, strict=True)
    curve = tuple((chance / n, chose / n, n) for chance, chose, n in means if n)
    return Calibration(float(error), float(by_chance), len(logits_N), curve)


@dataclass(frozen=True)
class SideBias:
    """Logits by which side a is preferred for being side a; 95 % interval, raters are the units."""

    value: float
    low: float | None
    """None where the interval has no end, as with one rater."""
    high: float | None
    n: int

    @property
    def alarm(self) -> bool:
        """Surely a bias, and one that matters."""
        return self.low is not None and self.high is not None and abs(self.value) > SIDE_BIAS_ALARM and self.low * self.high > 0

    @property
    def words(self) -> str:
        interval = "" if self.low is None else f" ({self.low:+.2f} to {self.high:+.2f})"
        loud = f"; beyond {SIDE_BIAS_ALARM:g}: people choose a side, look at how answers are shown" if self.alarm else ""
        return f"the first side is preferred by {self.value:+.2f} logits{interval} in {self.n} choices{loud}"


def side_bias(margins_N: Tensor, outcomes_N: Tensor, raters_N: Tensor) -> SideBias | None:
    """The b of P(a) = sigmoid(margin + b) at the greatest likelihood, margins held out and without a bias. None for no choices.

    Newton's steps; the variance is the sandwich G/(G - 1)·sum over raters of (sum of residuals)² / (sum p(1 - p))².
    With fewer than two raters the interval has no end; where all chose one side b is cut at 10.
    """
    if len(margins_N) == 0:
        return None
    chose_N, bias = (outcomes_N == A).double(), 0.0
    for _ in range(50):
        chance_N = torch.sigmoid(margins_N + bias)
        step = float((chose_N - chance_N).sum() / (chance_N * (1 - chance_N)).sum().clamp(min=1e-9))
        bias = min(max(bias + min(max(step, -1.0), 1.0), -10.0), 10.0)
        if abs(step) < 1e-9:
            break
    chance_N = torch.sigmoid(margins_N + bias)
    group_N = torch.unique(raters_N, return_inverse=True)[1]
    groups = int(group_N.max()) + 1
    if groups < 2:
        return SideBias(bias, None, None, len(margins_N))
    residuals_G = torch.zeros(groups, dtype=torch.float64).index_add(0, group_N, chose_N - chance_N)
    spread = float((chance_N * (1 - chance_N)).sum().clamp(min=1e-9))
    half = quantile(groups) * math.sqrt(groups / (groups - 1) * float(residuals_G.square().sum())) / spread
    return SideBias(bias, bias - half, bias + half, len(margins_N))


def foretold(labels: Labels, chosen: CrossFit) -> tuple[Calibration | None, SideBias | None]:
    """Calibration of the held-out chances of decided choices, and what side people prefer beyond what they prefer to read."""
    choices = decided(labels)
    scores_N = unseen_prompts(labels, chosen)
    margins_N = scores_N[choices.first] - scores_N[choices.second]
    fitted_F = torch.stack([fold.parameters.scalars_5[2] * fold.problem.free_5[2] for fold in chosen.folds])
    fitted_N = fitted_F[chosen.fold_of_Q[labels.prompts_N[choices.first]]]
    return calibration(margins_N + fitted_N, choices.outcomes), side_bias(margins_N, choices.outcomes, choices.raters)
