"""What a reward model can and cannot say about ratings it did not see, beside length alone; and who prefers what.

Intervals are clustered: votes on one prompt, or by one rater, are not independent.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from feedback.errors import TrainingRefused
from trainer.config import RewardModelSettings
from trainer.feature_map import FeatureMap
from trainer.labels import Answer, Labels
from trainer.likelihood import UP, A, B
from trainer.reward_model import Parameters, build_problem, folds_of, minimise, one_thread, prompt_features

MIN_RATINGS_FOR_TASTE = 20
BLIND_RIDGE = 1e-9
"""Variance of a score that is no score."""


@dataclass(frozen=True)
class Accuracy:
    """Share of held-out choices (a or b) whose preferred answer scores higher; ties of the score count half."""

    value: float
    low: float
    high: float
    n: int
    clusters: int


def clustered_mean(values_N: Tensor, clusters_N: Tensor) -> tuple[float, float, float]:
    """Mean and its 95 % interval, with the cluster as the unit (linearised ratio estimator, normal quantile).

    The variance is G/(G-1)·sum over clusters of (sum of residuals)² / N²; with fewer than two clusters the interval is
    infinitely wide.
    """
    mean = values_N.double().mean()
    group_N = torch.from_numpy(np.unique(clusters_N.numpy(), return_inverse=True)[1])
    groups = int(group_N.max()) + 1
    if groups < 2:
        return float(mean), float("-inf"), float("inf")
    residuals_G = torch.zeros(groups, dtype=torch.float64).index_add(0, group_N, values_N.double() - mean)
    half = 1.959964 * float((groups / (groups - 1) * residuals_G.square().sum()).sqrt() / len(values_N))
    return float(mean), float(mean) - half, float(mean) + half


def _accuracy(hits_N: Tensor, clusters_N: Tensor) -> Accuracy | None:
    if len(hits_N) == 0:
        return None
    mean, low, high = clustered_mean(hits_N, clusters_N)
    return Accuracy(mean, max(low, 0.0), min(high, 1.0), len(hits_N), len(set(clusters_N.tolist())))


def _hits(margins_N: Tensor, outcomes_N: Tensor) -> Tensor:
    """1 where the margin a - b has the sign of the choice, 1/2 where it is zero."""
    signed_N = torch.where(outcomes_N == A, margins_N, -margins_N)
    return (signed_N > 0).double() + (signed_N == 0).double() / 2


def choice_accuracy(labels: Labels, scores_N: Tensor) -> Accuracy:
    """How often these scores of the answers order decided choices as people did; prompts are the clusters.

    Raises TrainingRefused where nobody chose between two answers.
    """
    choices = labels.choices.where((labels.choices.outcomes == A) | (labels.choices.outcomes == B))
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
def likelihood_gain(labels: Labels, settings: RewardModelSettings, kind: str, ridge: float) -> Gain:
    """What the reward model foresees of all ratings, choices and thumbs, beyond what prompt and rater alone tell.

    The same likelihood is fitted with and without a score of the answers. It sees more than the accuracy on decided choices, which
    are few and turn on a coin where two answers are alike.
    """
    feature_map, prompts_QZ = FeatureMap.fit(kind, labels.features_ND, labels.prompts_N), prompt_features(labels)
    prompts = int(labels.prompts_N.max()) + 1
    fold_of = folds_of(prompts, settings.folds, settings.seed)
    gains_R, prompt_R = [], []
    for fold in range(int(fold_of.max()) + 1):
        problem = build_problem(feature_map, labels.where_prompt(fold_of != fold), prompts_QZ, settings.max_rater_share)
        seeing, blind = (Parameters.split(minimise(problem, variance), problem.sizes) for variance in (ridge, BLIND_RIDGE))
        for prompt in (fold_of == fold).nonzero()[:, 0].tolist():
            if (rated := labels.where_prompt(torch.arange(prompts) == prompt)).count == 0:
                continue
            gain = problem.loss(blind, rated, weighted=False) - problem.loss(seeing, rated, weighted=False)
            gains_R += [gain / rated.count] * rated.count
            prompt_R += [prompt] * rated.count
    mean, low, high = clustered_mean(torch.stack(gains_R), torch.tensor(prompt_R))
    return Gain(mean, low if np.isfinite(low) else None, high if np.isfinite(high) else None, len(gains_R))


@one_thread()
def held_out(labels: Labels, settings: RewardModelSettings, kind: str, ridge: float) -> dict[str, Accuracy | None]:
    """Accuracy on choices of unseen prompts and of unseen raters, and of length alone on unseen prompts.

    The map and the ridge were chosen on the same prompts' folds, so the first figure is a little optimistic.
    """
    decided = labels.select(
        (labels.choices.outcomes == A) | (labels.choices.outcomes == B), torch.ones(len(labels.thumbs), dtype=torch.bool)
    )
    choices = decided.choices
    if len(choices) == 0:
        return {"prompts": None, "raters": None, "length": None}
    feature_map, prompts_QZ = FeatureMap.fit(kind, labels.features_ND, labels.prompts_N), prompt_features(labels)
    prompt_N = labels.prompts_N[choices.first]

    def margins(fold_of: Tensor, fold_N: Tensor, *, by_rater: bool) -> Tensor:
        margins_N = torch.zeros(len(choices), dtype=torch.float64)
        found = None
        for fold in range(int(fold_of.max()) + 1):
            inside = labels.where_rater(fold_of != fold) if by_rater else labels.where_prompt(fold_of != fold)
            problem = build_problem(feature_map, inside, prompts_QZ, settings.max_rater_share)
            found = minimise(problem, ridge, found)
            weights_P = found[: problem.sizes[0]]
            here = fold_N == fold
            margins_N[here] = (problem.mapped_NP[choices.first[here]] - problem.mapped_NP[choices.second[here]]) @ weights_P
        return margins_N

    by_prompt = folds_of(int(labels.prompts_N.max()) + 1, settings.folds, settings.seed)
    by_rater = folds_of(len(labels.raters), settings.folds, settings.seed)
    prompt_hits = _hits(margins(by_prompt, by_prompt[prompt_N], by_rater=False), choices.outcomes)
    several = len(labels.raters) > 1
    rater_hits = _hits(margins(by_rater, by_rater[choices.raters], by_rater=True), choices.outcomes) if several else prompt_hits[:0]
    return {
        "prompts": _accuracy(prompt_hits, prompt_N),
        "raters": _accuracy(rater_hits, choices.raters[: len(rater_hits)]),
        "length": _accuracy(_length_hits(labels, choices.first, choices.second, choices.outcomes, by_prompt[prompt_N]), prompt_N),
    }


def _length_hits(labels: Labels, first: Tensor, second: Tensor, outcomes: Tensor, fold_N: Tensor) -> Tensor:
    """Whether "longer" or "shorter", whichever is right more often on the other folds, picks the preferred answer."""
    tokens_N = torch.tensor([answer.tokens for answer in labels.answers], dtype=torch.float64)
    longer = _hits(tokens_N[first] - tokens_N[second], outcomes)
    hits = torch.empty_like(longer)
    for fold in set(fold_N.tolist()):
        outside = longer[fold_N != fold]
        hits[fold_N == fold] = longer[fold_N == fold] if len(outside) == 0 or outside.mean() >= 0.5 else 1 - longer[fold_N == fold]
    return hits


HEDGES = re.compile(r"\b(maybe|perhaps|might|possibly|probably|seems?|i think|i believe|not sure|it depends)\b", re.IGNORECASE)
REFUSALS = re.compile(r"\b(i can(?:no|')t|i'm sorry|i am sorry|unable to|as an ai|i won't)\b", re.IGNORECASE)
LISTS = re.compile(r"(^|\n)\s*(\d+[.)]|[-*•])\s", re.MULTILINE)


def properties(answer: Answer) -> dict[str, float]:
    """What of an answer can be said in words."""
    text = answer.text
    return {
        "longer answers": float(answer.tokens),
        "lists": float(bool(LISTS.search(text))),
        "questions": float(text.count("?")),
        "exclamations": float(text.count("!")),
        "hedging": float(len(HEDGES.findall(text))),
        "refusals": float(bool(REFUSALS.search(text))),
        "numbers": float(len(re.findall(r"\d+", text))),
        "answers that end by themselves": float(answer.finished),
    }


@dataclass(frozen=True)
class Taste:
    """One property of answers and how a cohort's ratings go with it."""

    cohort: str
    what: str
    correlation: float
    low: float
    high: float
    ratings: int
    raters: int

    @property
    def words(self) -> str:
        if self.low <= 0 <= self.high:
            return f"{self.cohort}: no clear view of {self.what} (r = {self.correlation:+.2f}, {self.ratings} ratings)"
        verb = "prefers" if self.correlation > 0 else "avoids"
        return (
            f"{self.cohort}: {verb} {self.what} (r = {self.correlation:+.2f}, {self.low:+.2f} to {self.high:+.2f}, {self.ratings} ratings)"
        )


def tastes(labels: Labels) -> list[Taste]:
    """For each cohort and for everybody: correlation of each property with being preferred, rater-clustered interval.

    A choice gives the difference between the sides against +1 or -1; a thumb gives the difference to the prompt's mean
    rated answer. Both are divided by their root mean square, so the mean product is a correlation around zero.
    """
    table_NF = torch.tensor([list(properties(answer).values()) for answer in labels.answers], dtype=torch.float64)
    names = list(properties(labels.answers[0]))
    counts_Q = torch.bincount(labels.prompts_N).clamp(min=1)
    means_QF = torch.zeros(len(counts_Q), len(names), dtype=torch.float64).index_add(0, labels.prompts_N, table_NF) / counts_Q[:, None]
    choices, thumbs = labels.choices, labels.thumbs
    decided = (choices.outcomes == A) | (choices.outcomes == B)
    differences = [
        (table_NF[choices.first] - table_NF[choices.second])[decided],
        table_NF[thumbs.answers] - means_QF[labels.prompts_N[thumbs.answers]],
    ]
    scaled_RF = torch.cat([d / d.square().mean(0).sqrt().clamp(min=1e-9) if len(d) else d for d in differences])
    signs = [torch.where(choices.outcomes[decided] == A, 1.0, -1.0), torch.where(thumbs.outcomes == UP, 1.0, -1.0)]
    centred = [s - s.mean() for s in signs if len(s)]
    signs_R = torch.cat([s / s.square().mean().sqrt().clamp(min=1e-9) for s in centred]) if centred else torch.zeros(0)
    raters_R = torch.cat([choices.raters[decided], thumbs.raters])
    groups = {"everybody": set(range(len(labels.raters)))}
    for rater, cohorts in enumerate(labels.cohorts):
        for cohort in cohorts:
            groups.setdefault(cohort, set()).add(rater)
    found = []
    for cohort, members in groups.items():
        if cohort != "everybody" and members == groups["everybody"]:
            continue  # a tag that all carry says nothing of its own
        inside = torch.tensor([int(rater) in members for rater in raters_R], dtype=torch.bool)
        if int(inside.sum()) < MIN_RATINGS_FOR_TASTE:
            continue
        for column, name in enumerate(names):
            if bool((scaled_RF[inside, column] != 0).any()):
                mean, low, high = clustered_mean(scaled_RF[inside, column] * signs_R[inside], raters_R[inside])
                found.append(Taste(cohort, name, mean, low, high, int(inside.sum()), len(members)))
    return found
