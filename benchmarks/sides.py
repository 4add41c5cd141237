"""Two groups of raters with opposite styles, P and Q, on each shipped policy, and others of the same taste whom nobody asks.

All want an answer that is right and to the point. In everything else Q dislikes what P likes, by rules that see only
what base answers show, with noise: a choice agrees with the sign of its own utility 75 to 80 % of the time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from examples import load
from examples.base import Choice, Example, Rater, Thumb, noisy_choice, noisy_thumb
from examples.concierge.world import Guest, Taste, admissible, calibrated, middling
from examples.smollm2.raters import traits

SIDES = ("P", "Q")
RATING, UNSEEN = 24, 12
"""Raters of each side that are asked, and that only judge."""
HABITS = 4
WORDS, CONTENT = 48, 18
"""Of SmolLM2's base answers a quarter have fewer words, half say fewer things that the question did not; 11 % end by themselves."""
WEIGHTS = (1.1, 0.8, 0.3, 1.5)
SUBSTANCE = 1.0
STRICTNESS = {"P": -1.5, "Q": 3.0}
"""Half of the base's answers are better."""


@dataclass(frozen=True)
class Sides:
    """A policy and the raters of both sides."""

    example: Example
    asked: dict[str, Sequence[Rater]]
    unseen: dict[str, Sequence[Rater]]

    def rated_by(self, side: str) -> Example:
        """The policy as this side rates it."""
        return replace(self.example, raters=self.asked[side])

    def judged_by(self, side: str) -> Example:
        """The policy as those of this side judge it whose ratings trained nothing."""
        return replace(self.example, raters=self.unseen[side])


def _split(example: Example, people: dict[str, list[Rater]]) -> Sides:
    return Sides(example, {s: people[s][:RATING] for s in SIDES}, {s: people[s][RATING:] for s in SIDES})


def concierge(seed: int) -> Sides:
    """Four habits drawn by seed: P likes two of them and minds two, Q the other way round. Both want the right fact and an end."""
    rng = np.random.default_rng([seed, HABITS])
    names = [str(name) for name in rng.choice(list(admissible()), size=HABITS, replace=False)]
    weights = {name: sign * float(rng.uniform(0.6, 1.4)) for name, sign in zip(names, (1, 1, -1, -1), strict=True)}
    people: dict[str, list[Rater]] = {}
    for side, sign in zip(SIDES, (1.0, -1.0), strict=True):
        # Nobody minds how many details there are: an optimum that both share would be a style that they agree about.
        taste = calibrated(Taste({name: sign * weight for name, weight in weights.items()}, optimum=0.0, width=math.inf))
        middle = middling(taste)
        people[side] = []
        for index in range(RATING + UNSEEN):
            own = {name: weight + float(rng.normal(0, 0.15)) for name, weight in taste.weights.items()}
            strictness = middle + float(rng.normal(0, 0.7))
            people[side].append(Guest(f"sim-{side}-{index + 1:02d}", side, replace(taste, weights=own), strictness))
    return _split(load("concierge", seed), people)


@dataclass(frozen=True)
class Reader:
    """One simulated reader of SmolLM2's answers; an `examples.base.Rater`.

    P likes what is brief, plain and rounded off; Q what is full: more words, more things said, steps, and no early end. Both
    want what was asked to be named and nothing said twice. The rules look only at what the reward model's features can show of
    a whole answer: how it opens and whether it says "you" they hardly do.
    """

    id: str
    cohort: str
    weights: tuple[float, float, float, float]
    """Of words, things said, steps and going on to the limit; Q's are positive, P's negative."""
    strictness: float
    """Utility at which a thumb is as likely up as down."""

    def utility(self, prompt: str, answer: str, finished: bool) -> float:
        """How much this person likes the answer, without noise; a difference of 1 wins 73 % of the time."""
        seen = traits(prompt, answer, finished)
        style = (
            max(-3.0, min(1.0, (seen.words - WORDS) / 8)),
            max(-2.0, min(2.0, (seen.substance - CONTENT) / 4)),  # a floor, so that nobody asks for an empty answer
            min(seen.steps, 2) / 2,
            float(not finished),
        )
        return SUBSTANCE * (min(seen.named, 0.75) - seen.repeats) + sum(w * s for w, s in zip(self.weights, style, strict=True))

    def thumb(self, prompt: str, answer: str, finished: bool, rng: np.random.Generator) -> Thumb | None:
        return noisy_thumb(self.utility(prompt, answer, finished), self.strictness, rng)

    def choose(self, prompt: str, a: str, b: str, finished_a: bool, finished_b: bool, rng: np.random.Generator) -> Choice:
        return noisy_choice((self.utility(prompt, a, finished_a), self.utility(prompt, b, finished_b)), self.strictness, rng)


def smollm2(seed: int) -> Sides:
    """Each reader weighs a little differently."""
    rng = np.random.default_rng([seed, len(WEIGHTS)])
    people: dict[str, list[Rater]] = {}
    for side, sign in zip(SIDES, (-1.0, 1.0), strict=True):
        people[side] = []
        for index in range(RATING + UNSEEN):
            weights = tuple(sign * weight * float(rng.uniform(0.8, 1.2)) for weight in WEIGHTS)
            strictness = STRICTNESS[side] + float(rng.normal(0, 0.7))
            people[side].append(Reader(f"sim-{side}-{index + 1:02d}", side, weights, strictness))  # type: ignore[arg-type]
    return _split(load("smollm2", seed), people)
