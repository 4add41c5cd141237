"""Twenty-four simulated people who rate by written rules, with noise. Reports show them as simulated.

Two cohorts. `brief` wants one or two plain sentences that end. `practical` wants something to do, told to "you". Both ask for
substance: an answer must name what was asked and say something about it. Raters who want only brevity teach a model to be
vacuous: "Cutting onions is a culinary tradition." ended, was short, and won.

The weights were chosen by what base answers show (see docs/lab.md): everything a rule looks at shows in at least
10 % and at most 90 % of them, and a choice agrees with the sign of its own utility 75 to 80 % of the time.
"""

from __future__ import annotations

import itertools
import math
import random
import re
from dataclasses import dataclass

import numpy as np

from examples.base import Choice, Thumb

COHORTS = ("brief", "practical")
RATERS = 24

_WORD = re.compile(r"[a-z0-9']+")
_SENTENCE = re.compile(r"(?<=[.!?:;])\s+|\n+")
_STOPWORDS = frozenset(
    """
    a about after all also always an and any are as at be because been before but by can could do does don't for from get give go
    had has have here here's how i i'm if in into is it it's its just keep let like make makes making many may might more most
    much must my need of off on one or other our out over really should so some such than that that's the their them then there
    there's these they thing things this those to too up us very want was way we well what when where which while who will with
    without would you you'll you're you've your tip tips today tonight best better good great important help helps different
    various ensure essential following steps
    """.split()
)
_IMPERATIVES = frozenset(
    """
    add apply ask avoid bake begin blend boil bring brush buy call check choose clean close combine compare consider cook cool
    count cover create cut dip divide do drain drink dry eat experiment fill find fix focus fold follow gather give grab grow heat
    hold hum identify insert inspect iron join keep learn leave let lift listen look loosen make measure melt mix move open pack
    paint pat patch pick place plan plant play position pour practice prepare preheat press pull pump push put read remove repeat
    replace rest rinse roll rub run save scrub season secure select set shake sit soak spend spray spread squeeze start stick stir
    stop stretch take talk test tie tighten track try turn unplug use visit wait walk warm wash watch water wear wipe wrap write
    """.split()
)


@dataclass(frozen=True)
class Traits:
    """What a rule can see of one answer; each is a plain count or a share."""

    finished: bool
    words: int
    named: float
    """Share of the question's content words that the answer contains, from 0 to 1."""
    steps: int
    """Sentences that open with something to do, that say how ("by soaking ...") or that hold a number."""
    substance: int
    """Different content words that the question did not contain."""
    addresses: bool
    """Speaks to the person: "you" or "your"."""
    repeats: float
    """Share of the content words that were said before."""


def traits(prompt: str, answer: str, finished: bool) -> Traits:
    """Look at one answer. `finished` says whether the model ended it before the limit."""
    words = _WORD.findall(answer.lower())
    content = [_stem(word) for word in words if word not in _STOPWORDS and len(word) > 2]
    asked = content_words(prompt)
    return Traits(
        finished=finished,
        words=len(words),
        named=len(asked & set(content)) / max(1, len(asked)),
        steps=sum(_is_step(sentence) for sentence in _SENTENCE.split(answer)),
        substance=len(set(content) - asked),
        addresses=bool({"you", "your", "you'll", "you're"} & set(words)),
        repeats=1 - len(set(content)) / len(content) if content else 0.0,
    )


def on_topic(prompt: str, answer: str) -> bool:
    """Whether the answer names at least half of what was asked and says at least four things that the question did not."""
    seen = traits(prompt, answer, True)
    return seen.named >= 0.5 and seen.substance >= 4


def content_words(text: str) -> set[str]:
    """What the text is about: its words without the small ones, cut to a common stem."""
    return {_stem(word) for word in _WORD.findall(text.lower()) if word not in _STOPWORDS and len(word) > 2}


def _stem(word: str) -> str:
    """Cut plural, -ing and -ed, so that "tomatoes" is "tomato" and "cutting" is "cut"."""
    for ending in ("'s", "ing", "ed", "es", "s"):
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            word = word[: -len(ending)]
            if ending in ("ing", "ed") and word[-1] == word[-2]:
                word = word[:-1]
            break
    return word.removesuffix("e")


def _is_step(sentence: str) -> bool:
    words = _WORD.findall(sentence.lower())
    if not words:
        return False
    clauses = [_WORD.findall(clause) for clause in re.split(r"[,:;]|\band\b|\bthen\b|\bfirst\b", sentence.lower())]
    opens = any(clause and clause[0] in _IMPERATIVES for clause in clauses)
    says_how = any(word == "by" and after.endswith("ing") for word, after in itertools.pairwise(words))
    return opens or says_how or any(word.isdigit() and len(word) < 5 for word in words)


@dataclass
class SmolRater:
    """One simulated person; an `examples.base.Rater`."""

    id: str
    cohort: str
    length: float
    """Words that this person likes best."""
    strictness: float
    """How good an answer must be for a thumb up."""
    scale: float
    """How strongly the rules weigh against the noise; a person with a small one is fickle."""

    def utility(self, prompt: str, answer: str, finished: bool) -> float:
        """How much this person likes the answer, without noise; a difference of 1 wins 73 % of the time."""
        seen = traits(prompt, answer, finished)
        substance = min(seen.named, 0.75) * 2.0 + min(seen.substance, 8) / 5 - 2.0 * seen.repeats
        if self.cohort == "brief":
            taste = 1.5 * seen.finished - min(abs(seen.words - self.length), 30) / 12
        else:
            taste = 0.8 * min(seen.steps, 2) + 0.6 * seen.addresses + 0.8 * seen.finished - max(0.0, seen.words - self.length) / 20
        return self.scale * (substance + taste)

    def thumb(self, prompt: str, answer: str, finished: bool, rng: np.random.Generator) -> Thumb | None:
        """A thumb for one answer; every tenth time none, because people do not always bother."""
        noise = _logistic(rng)
        if rng.random() < 0.1:
            return None
        return "up" if self.utility(prompt, answer, finished) + noise > self.strictness else "down"

    def choose(self, prompt: str, a: str, b: str, finished_a: bool, finished_b: bool, rng: np.random.Generator) -> Choice:
        """One of two answers by Bradley-Terry noise: equal when too close to tell, both bad when the winner is far below a thumb up."""
        utility_a, utility_b = self.utility(prompt, a, finished_a), self.utility(prompt, b, finished_b)
        difference = utility_a - utility_b + _logistic(rng)
        if max(utility_a, utility_b) + _logistic(rng) < self.strictness - 3.5:
            return "both_bad"
        if abs(difference) < 0.15:
            return "tie"
        return "a" if difference > 0 else "b"


def _logistic(rng: np.random.Generator) -> float:
    """One draw of standard logistic noise, which makes the choice a Bradley-Terry one."""
    uniform = min(max(rng.random(), 1e-12), 1 - 1e-12)
    return math.log(uniform / (1 - uniform))


def raters(seed: int = 0) -> list[SmolRater]:
    """Twelve raters of each cohort, each a little different; the same ones for the same seed."""
    rng = random.Random(f"smollm2 raters {seed}")
    made = []
    for index in range(RATERS):
        cohort = COHORTS[index % 2]
        made.append(
            SmolRater(
                id=f"sim-{cohort}-{index // 2 + 1:02d}",
                cohort=cohort,
                length=rng.uniform(18, 28) if cohort == "brief" else rng.uniform(24, 34),
                strictness=rng.gauss(2.7 if cohort == "brief" else 8.4, 0.9),
                scale=rng.uniform(2.2, 3.3) if cohort == "brief" else rng.uniform(1.5, 2.4),
            )
        )
    return made
