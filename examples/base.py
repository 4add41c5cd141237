"""What a shipped policy brings beside its weights: prompts, simulated raters, facts. No torch here.

A rater is simulated and says so: everything it sends carries the cohort tag `simulated`, and every report shows it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

Thumb = Literal["up", "down"]
Choice = Literal["a", "b", "tie", "both_bad"]


class Rater(Protocol):
    """One simulated person. `finished` is False for an answer that was cut at max_tokens."""

    @property
    def id(self) -> str:
        """Names the rater; starts with `sim-`."""

    @property
    def cohort(self) -> str:
        """Cohort tag, sent beside `simulated`."""

    def thumb(self, prompt: str, answer: str, finished: bool, rng: np.random.Generator) -> Thumb | None:
        """A noisy thumb, or None from a person who does not care to give one."""

    def choose(self, prompt: str, a: str, b: str, finished_a: bool, finished_b: bool, rng: np.random.Generator) -> Choice:
        """A noisy choice between two answers to the same prompt."""

    def utility(self, prompt: str, answer: str, finished: bool) -> float:
        """How much this person likes the answer, without noise; the scale is that of a Bradley-Terry logit."""


TIE = 0.2
"""Two answers whose utilities differ by less, noise included, are called equal."""


def noisy_thumb(utility: float, strictness: float, rng: np.random.Generator) -> Thumb | None:
    """A thumb that is as likely up as down at this strictness. Every tenth time none, because people do not always bother."""
    if rng.random() < 0.1:
        return None
    return "up" if utility + rng.logistic() > strictness else "down"


def noisy_choice(utilities: tuple[float, float], strictness: float, rng: np.random.Generator) -> Choice:
    """Bradley-Terry; a tie when too close to tell, both bad when even the better one is far below a thumb up."""
    if max(utilities) + rng.logistic() < strictness - 3.0:
        return "both_bad"
    difference = utilities[0] - utilities[1] + rng.logistic()
    if abs(difference) < TIE:
        return "tie"
    return "a" if difference > 0 else "b"


@dataclass(frozen=True)
class FactItem:
    """A question whose right answer is known. The distractors are the same sentence with another thing's value."""

    prompt: str
    answer: str
    distractors: tuple[str, ...]
    entity: str
    """The unit of resampling: items about one thing stand or fall together."""


@dataclass(frozen=True)
class Example:
    """A policy that Plaudit ships, and the people who rate it."""

    name: str
    policy_dir: Callable[[Path], Path]
    """From the data folder to the policy's folder; converts it there first if that is needed."""
    system_prompt: str | None
    temperature: float
    max_tokens: int
    max_model_len: int
    prompts: list[str]
    """What the raters ask."""
    held_out: list[str]
    """Never asked by a rater: for evaluation."""
    probes: list[str]
    """The operator's own questions, shown side by side in every report."""
    raters: Sequence[Rater]
    facts: list[FactItem]
    hub_name: str | None = None
    """Of the base model on the Hub, for model cards."""
