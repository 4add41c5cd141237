"""What people prefer, in words: which countable properties of answers go with being preferred, for everybody and for each cohort."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from deploy.texts import refuses
from trainer.held_out import clustered_mean
from trainer.labels import Answer, Labels
from trainer.likelihood import UP, A, B

MIN_RATINGS_FOR_TASTE = 20
HEDGES = re.compile(r"\b(maybe|perhaps|might|possibly|probably|seems?|i think|i believe|not sure|it depends)\b", re.IGNORECASE)
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
        "refusals": float(refuses(text)),
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
                # Of one rater the interval has no end, and JSON has no infinity.
                found.append(Taste(cohort, name, mean, max(low, -1.0), min(high, 1.0), int(inside.sum()), len(members)))
    return found
