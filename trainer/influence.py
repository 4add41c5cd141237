"""Whose ratings moved an adapter? Ridge fitted again without each cohort, and to shuffled labels, judges the candidate's held-out answers.

A cohort's pull is the candidate's gain over base by everybody's reward model, less that without the cohort: above zero where the
candidate went the cohort's way, below where it went the others'. Map and ridge are those that the cycle chose, and PPO does not run
again, so this says what the reward would have been, not where PPO would have gone with it. Nobody is named, and cohorts of few raters
stand merged.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from deploy.card import SMALLEST_COHORT
from trainer.config import RewardModelSettings
from trainer.evaluation import Answers, gain
from trainer.feature_map import FeatureMap
from trainer.held_out import centred_correlation, likelihood_gain
from trainer.labels import Answer, Labels
from trainer.problem import build_problem, minimise, one_thread, prompt_features
from trainer.ridge import CrossFit, Fold, folds_of
from trainer.tastes import properties

MOST_COHORTS = 12
"""That stand alone; each costs a fit."""
SHUFFLES = 5
UNTAGGED = "(no cohort)"


@dataclass(frozen=True)
class View:
    """What one reward model makes of the candidate's answers beside base's to the same prompts."""

    scores_PS: tuple[Tensor, Tensor]
    """Of base's and of the candidate's, in sd of base's answers to a prompt."""
    likes: dict[str, float]
    """Correlation of the score with what can be counted in these answers, within prompts."""

    @property
    def gains_P(self) -> Tensor:
        base_PS, candidate_PS = self.scores_PS
        return (candidate_PS - base_PS).mean(1)

    def as_json(self) -> dict[str, Any]:
        base_PS, candidate_PS = self.scores_PS
        margins_PSS = candidate_PS[:, :, None] - base_PS[:, None]
        prefers = ((margins_PSS > 0).double() + (margins_PSS == 0).double() / 2).mean()
        return {"gap": gain(candidate_PS.flatten(), base_PS.flatten(), base_PS.shape[1]), "prefers": float(prefers), "likes": self.likes}


class Refits:
    """One map and one ridge, fitted to any of the ratings. Answers of base and candidate to one prompt lie together."""

    def __init__(self, labels: Labels, settings: RewardModelSettings, kind: str, ridge: float, answers: tuple[Answers, Answers]) -> None:
        self.labels, self.settings, self.kind, self.ridge = labels, settings, kind, ridge
        feature_map = FeatureMap.fit(kind, labels.features_ND, labels.prompts_N)
        self.mapped_NP, self.prompts_QZ = feature_map(labels.features_ND), prompt_features(labels)
        self.held_out = [feature_map(each.features_ND) for each in answers]
        counted = [
            properties(Answer(0, t, r.finished, len(r.tokens))) for each in answers for t, r in zip(each.texts, each.replies, strict=True)
        ]
        self.names = list(counted[0])
        self.table_MF = torch.tensor([list(row.values()) for row in counted], dtype=torch.float64)
        self._start: Tensor | None = None

    def view(self, labels: Labels, samples: int) -> View:
        """Of the model of these ratings, some of all."""
        problem = build_problem(self.mapped_NP, labels, self.prompts_QZ, self.settings.max_rater_share)
        self._start = minimise(problem, self.ridge, self._start)
        raw = [(mapped_MP @ self._start[: problem.sizes[0]]).reshape(-1, samples) for mapped_MP in self.held_out]
        within_PS = raw[0] - raw[0].mean(1, keepdim=True)
        unit = max(float((within_PS.square().sum() / max(len(within_PS) * (samples - 1), 1)).sqrt()), 1e-9)
        scores = (raw[0] / unit, raw[1] / unit)
        return View(scores, self._likes(torch.cat([each.flatten() for each in scores]), samples))

    def _likes(self, scores_M: Tensor, samples: int) -> dict[str, float]:
        def within(values_M: Tensor) -> Tensor:
            # Base's answers come first, then the candidate's; a prompt's are those of both.
            values_2PS = values_M.reshape(2, -1, samples)
            return (values_2PS - values_2PS.mean((0, 2), keepdim=True)).flatten()

        columns = {name: centred_correlation(within(scores_M), within(self.table_MF[:, i])) for i, name in enumerate(self.names)}
        return {name: found for name, found in columns.items() if found is not None}

    def foresees(self, labels: Labels) -> dict[str, Any]:
        """Nats by which ratings of unseen prompts are likelier than by prompt and rater alone."""
        fold_of_Q = folds_of(int(labels.prompts_N.max()) + 1, self.settings.folds, self.settings.seed)
        folds = []
        for fold in range(int(fold_of_Q.max()) + 1):
            problem = build_problem(self.mapped_NP, labels.where_prompt(fold_of_Q != fold), self.prompts_QZ, self.settings.max_rater_share)
            folds.append(Fold(problem, labels.where_prompt(fold_of_Q == fold), minimise(problem, self.ridge)))
        return asdict(likelihood_gain(labels, CrossFit(self.kind, self.ridge, 0.0, False, (), fold_of_Q, tuple(folds))))


@one_thread()
def influence(fits: Refits, samples: int, shuffle: int | None) -> dict[str, Any]:
    """What everybody, everybody but each cohort, and shuffled labels would have rewarded. `shuffle` None: they are shuffled already."""
    labels = fits.labels
    whole = fits.view(labels, samples)
    ratings_U = torch.bincount(torch.cat([labels.choices.raters, labels.thumbs.raters]), minlength=len(labels.raters))
    groups, merged = cohorts(labels)
    rows = []
    for name, members in groups.items():
        inside_U = torch.tensor([rater in members for rater in range(len(labels.raters))])
        without = labels.where_rater(~inside_U)
        row: dict[str, Any] = {
            "cohort": name,
            "raters": len(members),
            "ratings": int(ratings_U[inside_U].sum()),
            "pull": None,
            "without": None,
        }
        if without.count:
            view = fits.view(without, samples)
            pull_P = whole.gains_P - view.gains_P
            row |= {"pull": gain(pull_P, torch.zeros_like(pull_P), 1), "without": view.as_json()}
        rows.append(row)
    body = {"raters": len(labels.raters), "ratings": labels.count, "everybody": whole.as_json(), "cohorts": rows, "merged": merged}
    if shuffle is None:
        return body | {"shuffled": None}
    # Any reward model prefers one of two sets of answers, also one that is noise: only over several shuffles does that come to nothing.
    gaps = [float(fits.view(labels.shuffled(shuffle + i), samples).gains_P.mean()) for i in range(SHUFFLES)]
    return body | {"shuffled": {"gaps": gaps, "likelihood_gain": fits.foresees(labels.shuffled(shuffle))}}


def cohorts(labels: Labels) -> tuple[dict[str, set[int]], int]:
    """Raters by cohort tag, the largest first, and how many cohorts stand merged as one because few raters are in them.

    Where even that one is small it stands nowhere: a share that is three people's would say what those three said.
    """
    tagged: dict[str, set[int]] = {}
    for rater in range(len(labels.raters)):
        for tag in (labels.cohorts[rater] if labels.cohorts else ()) or (UNTAGGED,):
            tagged.setdefault(tag, set()).add(rater)
    ranked = sorted(tagged.items(), key=lambda item: (-len(item[1]), item[0]))
    shown = [(name, members) for name, members in ranked if len(members) >= SMALLEST_COHORT][:MOST_COHORTS]
    rest = ranked[len(shown) :]
    others = {rater for _, members in rest for rater in members}
    groups = dict(shown)
    if len(others) >= SMALLEST_COHORT:
        groups[f"({len(rest)} other cohorts)"] = others
    return groups, len(rest)
