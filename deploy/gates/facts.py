"""RLHF tunes behaviour, not facts: did the adapter lose any? Judged against base and against stable.

A bound counts only from as many items as it takes: few items on which nothing happened to change have a bound of zero width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from deploy.config import GateSettings
from deploy.gates import ChatFacts, Evaluation, Facts, Outcome, Verdict, unmeasured

MIN_CHAT = 300
"""Questions asked in chat below which their margin is not certified."""
ACCURACY = (0.6, 0.9)
"""Of base. Where it knows everything, or guesses, harm hardly shows: the distractors are too easy, or the questions too hard."""


@dataclass(frozen=True)
class FactsKept:
    """Is the right answer still likelier than its hardest distractor, on no fewer items than the margin allows?"""

    against: Literal["stable", "base"]

    @property
    def name(self) -> str:
        return f"facts against {self.against}"

    def judge(self, found: Evaluation, settings: GateSettings) -> Verdict:
        facts = found.facts if self.against == "base" or found.facts_stable is None else found.facts_stable
        if facts is None:
            return Verdict.error(self.name, "no facts were measured, so harm to them cannot be excluded; give the trainer a facts file")
        strict, demo = settings.facts_margin_points, settings.demo_facts_margin_points
        few = facts.n < settings.min_facts
        words = f" (so few items cannot certify {strict:g} points, only {facts.certifies_points:.1f}" if few else ""
        if facts.margin_change_nats is not None:
            words = f", margins {facts.margin_change_nats:+.2f} nats" + words
        if few or (low_high := _outside(facts)) is None:
            return _kept(self.name, facts, _Asked(strict, demo, settings.min_facts if few else None, words))
        reason = f"{self.against} is right on {facts.base:.1%} of {facts.n} items, needed {low_high}; choose other distractors or questions"
        return Verdict.inconclusive(self.name, reason)


@dataclass(frozen=True)
class ChatFactsKept:
    """Does it still say the right thing when it is asked in chat?"""

    against: Literal["stable", "base"]

    @property
    def name(self) -> str:
        return f"facts in chat against {self.against}"

    def judge(self, found: Evaluation, settings: GateSettings) -> Verdict:
        facts = found.chat_facts if self.against == "base" or found.chat_facts_stable is None else found.chat_facts_stable
        if facts is None:
            return unmeasured(self.name, "facts in chat were")
        strict = settings.chat_facts_margin_points
        few = facts.n < MIN_CHAT
        words = f" (so few questions cannot certify {strict:g} points" if few else ""
        return _kept(self.name, facts, _Asked(strict, settings.demo_facts_margin_points, MIN_CHAT if few else None, words))


@dataclass(frozen=True)
class _Asked:
    strict: float
    demo: float | None
    least: int | None
    """How many items the margin takes, where there are fewer."""
    words: str


def _kept(name: str, facts: Facts | ChatFacts, asked: _Asked) -> Verdict:
    if not all(map(math.isfinite, (facts.base, facts.candidate, facts.diff, 0.0 if facts.low is None else facts.low))):
        return Verdict.error(name, f"a difference of {facts.diff} with a lower bound of {facts.low} cannot be judged; evaluate again")
    margin = asked.strict if asked.least is None or asked.demo is None else asked.demo
    if facts.low is None:
        return Verdict.inconclusive(name, f"all {facts.n} items are about one thing, so there is no interval; add facts about other things")
    low, words = 100 * facts.low, asked.words
    if asked.least is not None:
        words += f"; judged by the demonstration's margin of {margin:g})" if asked.demo is not None else ")"
    figures = f"{facts.base:.1%} before, {facts.candidate:.1%} after on {facts.n} items, at worst {low:+.1f} points{words}"
    verdict: Outcome
    if 100 * facts.diff < -margin:
        verdict, reason = "fail", f"{figures}, needed >= {-margin:g}: facts were lost; train again with a smaller ppo.kl_target_nats"
    elif asked.least is not None and asked.demo is None:
        verdict, reason = "inconclusive", f"{figures}: {asked.least} items are needed; add facts"
    elif low >= -margin:
        verdict, reason = "pass", f"{figures} >= {-margin:g}"
    else:
        # The interval's width falls with the root of the items.
        width = 100 * facts.diff - low
        needed = math.ceil(facts.n * (width / (margin + 100 * facts.diff)) ** 2) if 100 * facts.diff > -margin else facts.n
        reason = f"{figures}, needed >= {-margin:g}: about {max(needed, facts.n + 1)} items can tell; add facts"
        verdict = "inconclusive"
    return Verdict(name=name, verdict=verdict, value=low, comparison=">=", threshold=-margin, reason=reason)


def _outside(facts: Facts) -> str | None:
    least, most = ACCURACY
    return None if least <= facts.base <= most else f"{least:.0%} to {most:.0%}"


GATES = (FactsKept("base"), FactsKept("stable"), ChatFactsKept("base"), ChatFactsKept("stable"))
