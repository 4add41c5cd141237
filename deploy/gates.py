"""May a candidate be shown to anybody? One small class for each question; `judge` asks all of them.

The trainer measures (`Evaluation`), the gates compare. Only `pass` advances; a figure that is missing is `error`, and a
figure that cannot tell is `inconclusive`. Every reason names the value, the comparison, the threshold and the next step,
and the same words stand in the API, on the command line and in the audit record.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from pydantic import BaseModel, ConfigDict

from deploy.config import GateSettings
from deploy.records import Attestation

MIN_FINISHED = 30
"""Fewer answers that ended by themselves do not tell their KL."""

Outcome = Literal["pass", "fail", "inconclusive", "error"]
Comparison = Literal[">", ">=", "<", "<=", "=="]


class Evidence(BaseModel):
    """Base of what the trainer hands over. Figures that a newer trainer adds do not stop these gates."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Gain(Evidence):
    """A mean with its 95 % interval; the prompt is the unit."""

    mean: float
    low: float | None
    """None where the interval has no end, as with a single prompt."""
    high: float | None
    n: int


class Change(Evidence):
    """A figure of base's answers to the held-out prompts and of the candidate's."""

    base: float
    candidate: float


class Facts(Evidence):
    """Paired accuracy on facts, in [0, 1]; differences are candidate minus base. Points are percentage points."""

    n: int
    base: float
    candidate: float
    diff: float
    low: float
    """Lower bound of the difference, one-sided 95 %."""
    margin_points: float
    """The trainer's, for its own report; the gates go by their own."""
    certifies_points: float
    """Smallest margin that so many items certify 80 % of the time for an unharmed candidate."""


class Evaluation(Evidence):
    """Body of the attestation `evaluation`: everything that the gates read."""

    reward_gain_base: Gain
    """Mean over held-out prompts of the rise of the normalised score."""
    reward_gain_stable: Gain
    likelihood_gain: Gain
    """Of the reward model: nats by which ratings of unseen prompts are likelier than by prompt and rater alone; n counts ratings."""
    kl_nats: float
    """Of all replies at the serving temperature, also of those that were cut off."""
    kl_finished_nats: float | None = None
    """Of those that ended by themselves: what a reply would have gone on with is missing from the sum of one that was cut off."""
    finished_replies: int = 0
    """How many those are."""
    kl_nats_at_1: float | None = None
    """Of replies sampled at temperature 1; for people, because the budget is meant at the serving temperature."""
    kl_budget_nats: float
    facts: Facts | None = None
    length: Change
    """Tokens of an answer."""
    finished: Change
    """Share of answers that end by themselves."""
    repetition: Change
    """Share of repeated word triples."""
    refusal: Change
    """Share of answers that refuse."""
    on_topic: Change
    """Share of answers that name what was asked."""
    probes: list[dict[str, str]] = []
    """The operator's own questions with the answers of base, stable and candidate, for a person to read."""
    shuffled: bool = False
    """The ratings were shuffled: a control, which nobody may be answered by."""


class Verdict(BaseModel):
    """What a gate or a test says, in figures and in words."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    verdict: Outcome
    value: float | None = None
    comparison: Comparison | None = None
    threshold: float | None = None
    reason: str

    @classmethod
    def passed(cls, name: str, reason: str) -> Verdict:
        """Of a question without a figure."""
        return cls(name=name, verdict="pass", reason=reason)

    @classmethod
    def failed(cls, name: str, reason: str) -> Verdict:
        """Of a question without a figure."""
        return cls(name=name, verdict="fail", reason=reason)

    @classmethod
    def inconclusive(cls, name: str, reason: str) -> Verdict:
        """Of a question without a figure."""
        return cls(name=name, verdict="inconclusive", reason=reason)

    @classmethod
    def error(cls, name: str, reason: str) -> Verdict:
        """Something is missing, so nothing was compared."""
        return cls(name=name, verdict="error", reason=reason)


def withheld(found: Sequence[Attestation]) -> Verdict:
    """Whether somebody was erased whom the adapter learned from; by its attestations `erasure`."""
    if found:
        return Verdict.failed("erasure", f"{found[-1].body['reason']}; train again without them")
    return Verdict.passed("erasure", "nobody was erased whom it learned from")


class Gate(Protocol):
    """One question about an evaluation."""

    @property
    def name(self) -> str: ...

    def judge(self, found: Evaluation, settings: GateSettings) -> Verdict:
        """Never raises for figures that are there."""


@dataclass(frozen=True)
class Real:
    """Ratings as people gave them. A control run must not reach anybody, whatever its figures."""

    name: str = "real labels"

    def judge(self, found: Evaluation, settings: GateSettings) -> Verdict:
        if found.shuffled:
            return Verdict.failed(
                self.name, "the ratings were shuffled as a control, so it learned nothing that people said; train without"
            )
        return Verdict.passed(self.name, "the ratings are as people gave them")


@dataclass(frozen=True)
class RewardGain:
    """Do held-out prompts get better answers, surely, under the reward model?"""

    against: Literal["stable", "base"]

    @property
    def name(self) -> str:
        return f"gain over {self.against}"

    def judge(self, found: Evaluation, settings: GateSettings) -> Verdict:
        gain, least = (found.reward_gain_stable if self.against == "stable" else found.reward_gain_base), settings.min_gain
        if gain.n < settings.min_prompts:
            why = f"{gain.n} held-out prompts, at least {settings.min_prompts} are needed to judge a gain; add held-out prompts"
            return Verdict.inconclusive(self.name, why)
        if gain.low is None or not math.isfinite(gain.low):
            return Verdict.error(self.name, f"the gain {gain.mean:+.3f} over {self.against} came without a lower bound; evaluate again")
        figures = f"gain {gain.mean:+.3f} sd over {self.against}, at least {gain.low:+.3f}"
        if gain.low > least:
            verdict: Outcome = "pass"
            reason = f"{figures} > {least:g}"
        elif gain.mean <= least:
            verdict, reason = (
                "fail",
                f"{figures}, needed > {least:g}: it did not learn what was rated; collect more ratings and train again",
            )
        else:
            verdict = "inconclusive"
            reason = f"{figures}, needed > {least:g}: {gain.n} held-out prompts cannot tell; add held-out prompts or ratings"
        return Verdict(name=self.name, verdict=verdict, value=gain.low, comparison=">", threshold=least, reason=reason)


@dataclass(frozen=True)
class RewardModelWorks:
    """Does the reward model foresee ratings on prompts it never saw? A gain under one that does not means nothing.

    This is what refuses shuffled labels even unannounced: PPO raises the score of any reward model, also of a random one.
    """

    name: str = "reward model"

    def judge(self, found: Evaluation, settings: GateSettings) -> Verdict:
        gain, least = found.likelihood_gain, settings.min_likelihood_gain
        if gain.low is None or not math.isfinite(gain.low):
            return Verdict.inconclusive(
                self.name, f"{gain.n} ratings of a single prompt cannot be foreseen; have people rate other prompts"
            )
        figures = f"foresees {gain.n} ratings of unseen prompts by {gain.mean:+.3f} nats each, at least {gain.low:+.3f}"
        figure = {"name": self.name, "value": gain.low, "comparison": ">", "threshold": least}
        if gain.low > least:
            return Verdict(**figure, verdict="pass", reason=f"{figures} > {least:g}")
        verdict = "fail" if gain.mean <= least else "inconclusive"
        return Verdict(**figure, verdict=verdict, reason=f"{figures}, needed > {least:g}; collect more ratings and train again")


@dataclass(frozen=True)
class KlBudget:
    """How far did the policy move from base? Beyond the budget the reward model knows nothing."""

    name: str = "KL"

    def judge(self, found: Evaluation, settings: GateSettings) -> Verdict:
        most = found.kl_budget_nats * settings.kl_slack
        # The sum of a reply that was cut off is only a part of its KL, so the mean of all replies is too low and what exceeds the budget
        # in it surely does. Of those that ended nothing is missing, where they are enough to tell.
        whole = found.kl_finished_nats if found.finished_replies >= MIN_FINISHED else None
        figures_read = [found.kl_nats] if whole is None else [found.kl_nats, whole]
        kl = max(figures_read) if all(map(math.isfinite, figures_read)) else math.nan
        if not (math.isfinite(kl) and most > 0):
            told = f"KL {found.kl_nats} of a budget of {found.kl_budget_nats} nats cannot be judged; evaluate again"
            return Verdict.error(self.name, told)
        inside = kl <= most
        which = (
            "" if whole is None else f" ({whole:.2f} of the {found.finished_replies} that ended by themselves, {found.kl_nats:.2f} of all)"
        )
        figures = f"{kl:.2f} nats an answer from base {'<=' if inside else '>'} {most:.2f}{which}"
        return Verdict(
            name=self.name,
            verdict="pass" if inside else "fail",
            value=kl,
            comparison="<=",
            threshold=most,
            reason=figures if inside else f"{figures}; train again with a smaller ppo.kl_target_nats",
        )


@dataclass(frozen=True)
class FactsKept:
    """RLHF tunes behaviour, not facts: at the upper bound of the harm, facts got no worse than the margin.

    Judged against base; stable passed the same question, so a chain of adapters cannot creep away from base.
    """

    name: str = "facts"

    def judge(self, found: Evaluation, settings: GateSettings) -> Verdict:
        facts, strict, demo = found.facts, settings.facts_margin_points, settings.demo_facts_margin_points
        if facts is None:
            return Verdict.error(self.name, "no facts were measured, so harm to them cannot be excluded; give the trainer a facts file")
        certifies = facts.certifies_points <= strict
        margin = strict if certifies or demo is None else demo
        figures = f"{facts.base:.1%} before, {facts.candidate:.1%} after on {facts.n} items, at worst {100 * facts.low:+.1f} points"
        if not certifies:
            figures += f" (so few items cannot certify {strict:g} points, only {facts.certifies_points:.1f}"
            figures += f"; judged by the demonstration's margin of {margin:g})" if margin != strict else ")"
        if 100 * facts.low >= -margin:
            verdict: Outcome = "pass"
            reason = f"{figures} >= {-margin:g}"
        elif 100 * facts.diff < -margin:
            verdict, reason = "fail", f"{figures}, needed >= {-margin:g}: facts were lost; train again with a smaller ppo.kl_target_nats"
        else:
            # The bound's width falls with the root of the items.
            needed = math.ceil(facts.n * max(1.0, facts.certifies_points / margin) ** 2)
            verdict = "inconclusive"
            reason = f"{figures}, needed >= {-margin:g}: about {max(needed, facts.n + 1)} items can tell; add facts"
        return Verdict(name=self.name, verdict=verdict, value=100 * facts.low, comparison=">=", threshold=-margin, reason=reason)


@dataclass(frozen=True)
class Length:
    """Answers neither balloon nor shrivel."""

    name: str = "length"

    def judge(self, found: Evaluation, settings: GateSettings) -> Verdict:
        before, after, factor = found.length.base, found.length.candidate, settings.length_factor
        if before <= 0:
            return Verdict.error(self.name, f"base's answers have {before:g} tokens, so a change cannot be judged; evaluate again")
        ratio = after / before
        figures = f"{before:.1f} tokens before, {after:.1f} after, {ratio:.2f} times as long"
        least = 0.0 if settings.allow_shorter else 1 / factor
        longer = ratio >= 1 or settings.allow_shorter
        inside = least <= ratio <= factor
        limit = f"{factor:g} times at most" if longer else f"{least:.2f} times at least"
        hint = "gates.length_factor" if longer else "gates.allow_shorter"
        return Verdict(
            name=self.name,
            verdict="pass" if inside else "fail",
            value=ratio,
            comparison="<=" if longer else ">=",
            threshold=factor if longer else least,
            reason=f"{figures}, {limit}" + ("" if inside else f"; if that is what raters asked for, change {hint}"),
        )


@dataclass(frozen=True)
class Drift:
    """A share of answers that should not rise (`sign` 1) or fall (`sign` -1) by more than a limit."""

    name: str
    figure: Literal["repetition", "finished", "refusal", "on_topic"]
    sign: Literal[1, -1]
    limit: Literal["max_repetition_rise", "max_unfinished_rise", "max_refusal_rise", "max_on_topic_fall"]
    next_step: str

    def judge(self, found: Evaluation, settings: GateSettings) -> Verdict:
        change: Change = getattr(found, self.figure)
        most: float = getattr(settings, self.limit)
        worse = self.sign * (change.candidate - change.base)
        if not math.isfinite(worse):
            return Verdict.error(self.name, f"{change.base} before and {change.candidate} after cannot be compared; evaluate again")
        # Shares are counts by n: a rise of exactly the limit must not fail by the last bit.
        inside = worse <= most + 1e-9
        figures = f"{change.base:.1%} before, {change.candidate:.1%} after: worse by {worse:+.1%} {'<=' if inside else '>'} {most:.1%}"
        return Verdict(
            name=self.name,
            verdict="pass" if inside else "fail",
            value=worse,
            comparison="<=",
            threshold=most,
            reason=figures if inside else f"{figures}; {self.next_step}",
        )


GATES: tuple[Gate, ...] = (
    Real(),
    RewardModelWorks(),
    RewardGain("stable"),
    RewardGain("base"),
    KlBudget(),
    FactsKept(),
    Length(),
    Drift("repetition", "repetition", 1, "max_repetition_rise", "read the report's answers and train again with a smaller KL budget"),
    Drift("answers that end", "finished", -1, "max_unfinished_rise", "answers run into the length limit; rate brevity or raise max_tokens"),
    Drift("refusals", "refusal", 1, "max_refusal_rise", "it refuses more; read the report's answers and rate refusals down"),
    Drift(
        "on topic", "on_topic", -1, "max_on_topic_fall", "answers name less of what was asked; read the report's answers, then train again"
    ),
)


def judge(evaluation: Evaluation, settings: GateSettings) -> list[Verdict]:
    """The verdict of every gate, in their order; all of them, so that a person sees everything that is missing at once."""
    return [gate.judge(evaluation, settings) for gate in GATES]
