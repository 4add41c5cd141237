"""What the guests like: a hidden preference drawn by seed, and the raters who know only their own taste.

A preference looks at habits of an answer that it counts in the text. Its utility is linear in some of them and has an
optimum in the number of details: `inside` what base answers show, or `outside`, where nobody has rated. It wants the
right fact, too. Only habits that show in 10 to 90 % of base answers are drawn, and the scale is set so that a choice
between two base answers agrees with the sign of its own utility 77.5 % of the time; nothing is tuned to one seed.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np

from examples.base import Choice, Thumb, noisy_choice, noisy_thumb
from examples.concierge import corpus
from examples.concierge.town import questions

POLICY = Path(__file__).parent / "policy"
AGREEMENT = 0.775
RATERS = 24
COHORTS = ("locals", "tourists")


def _any(texts: list[str]) -> Callable[[str], float]:
    patterns = [text.replace(" {o}.", "") for text in texts]
    return lambda answer: float(any(pattern in answer for pattern in patterns))


def _details(answer: str) -> float:
    return float(sum(answer.count(detail) for detail in corpus.DETAILS))


HABITS: dict[str, Callable[[str], float]] = {
    "greeting": _any(corpus.GREETINGS),
    "hedge": lambda answer: float(bool(re.search(r"\b(think|believe|Perhaps)\b", answer))),
    "thanks": _any(corpus.THANKS),
    "recommend": _any(corpus.RECOMMENDATIONS),
    "alternative": _any(corpus.ALTERNATIVES),
    "advice": _any(corpus.ADVICE),
    "wish": _any(corpus.WISHES_WELL),
    "closing": lambda answer: float("?" in answer),
    "formal": lambda answer: float("As for" in answer or "visit" in answer),
    "lively": lambda answer: float("!" in answer),
}
"""Each is 0 or 1 for one answer."""


@dataclass(frozen=True)
class Seen:
    """What a guest notices in one answer."""

    habits: dict[str, float]
    details: float
    right: float
    """1 where the answer states a value that answers the question, 0 where it states none or a wrong one."""
    finished: float


def look(prompt: str, answer: str, finished: bool) -> Seen:
    """Count what is in the text."""
    asked = questions().get(prompt)
    words = set(re.findall(r"[A-Za-z]+", answer))
    right = 1.0 if asked is None else float(bool(words & asked.right) and (asked.name is None or not (words & (asked.every - asked.right))))
    return Seen({name: habit(answer) for name, habit in HABITS.items()}, _details(answer), right, float(finished))


@cache
def base_answers() -> list[tuple[str, list[Seen]]]:
    """What base answers show: for each prompt the answers that were sampled with the policy's weights."""
    grouped: dict[str, list[Seen]] = {}
    for line in (POLICY / "base_answers.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        grouped.setdefault(row["prompt"], []).append(look(row["prompt"], row["answer"], row["finished"]))
    return list(grouped.items())


@cache
def admissible() -> tuple[str, ...]:
    """Habits that show in 10 to 90 % of base answers: others could not be learned, whatever people say."""
    every = [seen for _, answers in base_answers() for seen in answers]
    shares = {name: sum(seen.habits[name] for seen in every) / len(every) for name in HABITS}
    return tuple(name for name, share in shares.items() if 0.1 <= share <= 0.9)


@dataclass(frozen=True)
class Taste:
    """A utility of what is seen."""

    weights: dict[str, float]
    optimum: float
    """Number of details liked best."""
    width: float
    scale: float = 1.0

    def __call__(self, seen: Seen) -> float:
        """A Bradley-Terry logit: a difference of 1 wins 73 % of the time."""
        liked = sum(weight * seen.habits[name] for name, weight in self.weights.items())
        details = -(((seen.details - self.optimum) / self.width) ** 2)
        return self.scale * (liked + details + 1.0 * seen.right + 1.0 * seen.finished)


def _agreement(taste: Taste, scale: float) -> float:
    """How often a noisy choice between two base answers to one prompt has the sign of its own utility."""
    agreed = []
    for _, answers in base_answers():
        utilities = np.array([taste(seen) for seen in answers])
        gaps = np.abs(utilities[:, None] - utilities[None])[np.triu_indices(len(utilities), 1)]
        agreed.append(1 / (1 + np.exp(-scale * gaps[gaps > 1e-9])))
    return float(np.concatenate(agreed).mean())


def calibrated(taste: Taste) -> Taste:
    """The taste at the scale whose agreement is AGREEMENT, by bisection."""
    low, high = 0.01, 20.0
    for _ in range(40):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if _agreement(taste, middle) < AGREEMENT else (low, middle)
    return Taste(taste.weights, taste.optimum, taste.width, math.sqrt(low * high))


def middling(taste: Taste) -> float:
    """The utility that half of the base answers exceed."""
    return float(np.median([taste(seen) for _, answers in base_answers() for seen in answers]))


@dataclass(frozen=True)
class Guest:
    """One simulated rater; an `examples.base.Rater`."""

    id: str
    cohort: str
    taste: Taste
    strictness: float
    """Utility at which a thumb is as likely up as down."""

    def utility(self, prompt: str, answer: str, finished: bool) -> float:
        return self.taste(look(prompt, answer, finished))

    def thumb(self, prompt: str, answer: str, finished: bool, rng: np.random.Generator) -> Thumb | None:
        return noisy_thumb(self.utility(prompt, answer, finished), self.strictness, rng)

    def choose(self, prompt: str, a: str, b: str, finished_a: bool, finished_b: bool, rng: np.random.Generator) -> Choice:
        return noisy_choice((self.utility(prompt, a, finished_a), self.utility(prompt, b, finished_b)), self.strictness, rng)


class World:
    """The hidden preference of one seed, and its raters."""

    def __init__(self, seed: int, kind: Literal["inside", "outside"] = "inside") -> None:
        rng = np.random.default_rng([seed, len(kind)])
        self.seed, self.kind = seed, kind
        names = list(admissible())
        liked = [str(name) for name in rng.choice(names, size=5, replace=False)]
        signs = rng.permutation([1.0, 1.0, 1.0, -1.0, -1.0])
        weights = {name: float(sign * rng.uniform(0.6, 1.4)) for name, sign in zip(liked[:4], signs, strict=False)}
        optimum = float(rng.uniform(1.5, 3.0)) if kind == "inside" else float(rng.uniform(6.0, 8.0))
        self.taste = calibrated(Taste(weights, optimum, width=1.6 if kind == "inside" else 4.0))
        self.divides = liked[4]
        """The habit that the cohorts disagree about; the population as a whole does not mind it."""
        middle = middling(self.taste)
        self.raters: list[Guest] = []
        for index in range(RATERS):
            cohort = COHORTS[index % 2]
            own = {name: weight + float(rng.normal(0, 0.15)) for name, weight in weights.items()}
            own[self.divides] = 0.5 if cohort == COHORTS[0] else -0.5
            taste = Taste(own, optimum + float(rng.normal(0, 0.3)), self.taste.width, self.taste.scale)
            self.raters.append(Guest(f"sim-{cohort}-{index // 2 + 1:02d}", cohort, taste, middle + float(rng.normal(0, 0.7))))

    def utility(self, prompt: str, answer: str, finished: bool) -> float:
        """The population's hidden preference, without noise."""
        return self.taste(look(prompt, answer, finished))
