"""Raters beside each other: how far they agree, who disagrees with everybody, who disagrees with herself.

Dissent is not noise: whoever judges against the others but says the same twice is a cohort to be shown. Only who fails
her own repeated questions may lose weight, if the settings ask for that, and never below zero: a vote is not turned round.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations, pairwise
from statistics import NormalDist

import torch
from torch import Tensor

from trainer.held_out import NORMAL_95, UnseenRaters, clustered_mean, ends
from trainer.labels import Labels
from trainer.likelihood import UP, A, B

MIN_VOTES = 20
MIN_FAILED = 3
FALSE_DISCOVERIES = 0.05
PRIOR_REPEATS = 4.0
"""Repeated questions' worth of weight that the share failed by all raters has in the estimate for one."""

Item = tuple[str, int, int]
"""A pair of answers, or one answer twice."""


def verdicts(labels: Labels) -> Iterator[tuple[int, Item, int]]:
    """(rater, what was judged, verdict) of decided choices, with sides put in order, and of thumbs."""
    choices, thumbs = labels.choices, labels.thumbs
    for first, second, outcome, rater in zip(
        choices.first.tolist(), choices.second.tolist(), choices.outcomes.tolist(), choices.raters.tolist(), strict=True
    ):
        if outcome in (A, B):
            yield rater, ("pair", min(first, second), max(first, second)), first if outcome == A else second
    for answer, outcome, rater in zip(thumbs.answers.tolist(), thumbs.outcomes.tolist(), thumbs.raters.tolist(), strict=True):
        yield rater, ("thumb", answer, answer), outcome


@dataclass(frozen=True)
class Agreement:
    """How often two raters say the same about the same pair or answer; 95 % interval, prompts are the units."""

    value: float | None
    """None where no two raters judged the same."""
    low: float | None
    high: float | None
    items: int

    @property
    def ceiling(self) -> float | None:
        """Share of single verdicts that the best of all models could foresee, at most.

        Two raters who each give the commoner verdict with chance p agree with chance p² + (1 - p)²; p is that solved, and as
        the root is concave, a mean over items lies below it.
        """
        return None if self.value is None else (1 + math.sqrt(max(2 * self.value - 1, 0.0))) / 2

    @property
    def words(self) -> str:
        if self.value is None or self.ceiling is None:
            return "no pair or answer was judged by two raters, so how far raters agree, and what could be foreseen at best, is unknown"
        interval = "" if self.low is None or self.high is None else f" ({100 * self.low:.0f}-{100 * self.high:.0f})"
        told = f"two raters agree on {100 * self.value:.0f} %{interval} of {self.items} pairs and answers that several judged"
        return f"{told}; at best {100 * self.ceiling:.0f} % of verdicts can be foreseen"


def agreement(labels: Labels) -> Agreement:
    """Each item counts once, with the share of pairs of its raters who agree; a rater's first verdict on it counts."""
    first: dict[Item, dict[int, int]] = defaultdict(dict)
    for rater, item, verdict in verdicts(labels):
        first[item].setdefault(rater, verdict)
    shared = {item: list(said.values()) for item, said in first.items() if len(said) > 1}
    if not shared:
        return Agreement(None, None, None, 0)
    same = [[a == b for a, b in combinations(said, 2)] for said in shared.values()]
    shares_N = torch.tensor([sum(each) / len(each) for each in same], dtype=torch.float64)
    mean, low, high = clustered_mean(shares_N, labels.prompts_N[[item[1] for item in shared]])
    return Agreement(mean, *ends(low, high, 0.0, 1.0), len(shared))


def repeats(labels: Labels) -> tuple[list[int], list[int]]:
    """For each rater, how often she judged again what she had judged, and how often she then said something else."""
    said: dict[tuple[int, Item], list[int]] = defaultdict(list)
    for rater, item, verdict in verdicts(labels):
        said[rater, item].append(verdict)
    asked, failed = [0] * len(labels.raters), [0] * len(labels.raters)
    for (rater, _), row in said.items():
        asked[rater] += len(row) - 1
        failed[rater] += sum(a != b for a, b in pairwise(row))
    return asked, failed


def reliability(labels: Labels) -> Tensor:
    """A weight in [0, 1] for each rater: 1 but for those with 20 votes who failed 3 repeated questions.

    Whoever answers at random fails half of them, so 1 - 2·(share failed) is how much of a rater's verdicts is her own view. The weight is
    that, by the same of all raters: people are noisy, and only who is noisier than people are loses. The share is pulled towards that
    of all raters by PRIOR_REPEATS questions.
    """
    asked, failed = repeats(labels)
    weights_U = torch.ones(len(labels.raters), dtype=torch.float64)
    votes = _votes(labels)
    usual = sum(failed) / max(sum(asked), 1)
    if usual >= 0.5:
        return weights_U  # nobody agrees with herself: then there is nobody to measure by
    for rater, (tries, wrong) in enumerate(zip(asked, failed, strict=True)):
        if votes[rater] >= MIN_VOTES and wrong >= MIN_FAILED:
            share = (wrong + PRIOR_REPEATS * usual) / (tries + PRIOR_REPEATS)
            weights_U[rater] = min(max((1 - 2 * share) / (1 - 2 * usual), 0.0), 1.0)
    return weights_U


def _votes(labels: Labels) -> list[int]:
    counts: list[int] = torch.bincount(torch.cat([labels.choices.raters, labels.thumbs.raters]), minlength=len(labels.raters)).tolist()
    return counts


@dataclass(frozen=True)
class Standing:
    """How one rater with enough votes stands to the others and to herself."""

    rater: str
    votes: int
    agrees: float
    """Share of her verdicts that a model fitted to the others foresees; a coin gets half."""
    low: float
    high: float
    repeated: int
    failed: int
    weight: float
    """`reliability`, whether it is used or not."""


def standings(labels: Labels, others: UnseenRaters | None) -> list[Standing]:
    """Of every rater with 20 verdicts that can be foreseen: choices, and thumbs above or below the median of what she rated.

    The median, because half lies above it: a coin then gets half, however rarely it says down.
    """
    if others is None:
        return []
    choices, thumbs = labels.choices, labels.thumbs
    margins_N = others.of(choices.raters, choices.first) - others.of(choices.raters, choices.second)
    scores_N = others.of(thumbs.raters, thumbs.answers)
    asked, failed = repeats(labels)
    weights_U = reliability(labels)
    found = []
    for rater, name in enumerate(labels.raters):
        chose = (choices.raters == rater) & (choices.outcomes <= B)
        thumbed = thumbs.raters == rater
        own_N = scores_N[thumbed]
        middle = (own_N.median() - (-own_N).median()) / 2  # torch's median is the lower of two
        right_R = torch.cat(
            [
                _foreseen(margins_N[chose], choices.outcomes[chose] == A),
                _foreseen(own_N - middle, thumbs.outcomes[thumbed] == UP),
            ]
        )
        if len(right_R) >= MIN_VOTES:
            prompt_R = torch.cat([labels.prompts_N[choices.first[chose]], labels.prompts_N[thumbs.answers[thumbed]]])
            mean, low, high = clustered_mean(right_R, prompt_R)
            found.append(Standing(name, len(right_R), mean, low, high, asked[rater], failed[rater], float(weights_U[rater])))
    return found


def _foreseen(margins_N: Tensor, positive_N: Tensor) -> Tensor:
    """1 where the margin has the verdict's sign, 1/2 where it is zero."""
    return ((margins_N > 0) == positive_N).double().masked_fill(margins_N == 0, 0.5)


def dissenters(found: list[Standing]) -> list[str]:
    """Raters who judge against the others more surely than a coin would, at a false discovery rate of 5 % (Benjamini, Hochberg 1995).

    Who is reliably wrong by the others' view must agree with herself: chance agrees with the others half of the time.
    """
    chances = sorted((_below_half(each), each.rater) for each in found if math.isfinite(each.low))
    passing = [rank for rank, (chance, _) in enumerate(chances, 1) if chance <= FALSE_DISCOVERIES * rank / len(chances)]
    return sorted(rater for _, rater in chances[: max(passing, default=0)])


def _below_half(standing: Standing) -> float:
    """One-sided chance of so little agreement from a coin, by the normal distribution."""
    # The clustered sd is zero where all verdicts are the same; a coin's own is the least that can be believed.
    sd = max((standing.high - standing.low) / (2 * NORMAL_95), 0.5 / math.sqrt(standing.votes))
    return NormalDist().cdf((standing.agrees - 0.5) / sd)


def findings(found: list[Standing], dissent: list[str], *, discounted: bool) -> list[str]:
    """What people should know about raters, in words."""
    told = []
    if dissent:
        names = ", ".join(rater[:12] for rater in dissent)
        told.append(f"{len(dissent)} of {len(found)} raters judge against the others and not at random: a cohort of their own ({names})")
    unsure = [each for each in found if each.weight < 1]
    if unsure:
        names = ", ".join(f"{each.rater[:12]} failed {each.failed} of {each.repeated}" for each in unsure)
        what = "their ratings count for less" if discounted else "they count in full unless reward_model.discount_unreliable is set"
        told.append(f"{len(unsure)} raters contradict themselves more than others do ({names}): {what}")
    return told
