"""What must an adapter show before it answers anybody? Every gate has a name, a figure, a threshold and a reason for its verdict.

A gate is a small class in a file beside this one, listed there in `GATES`; adding one is that file and nothing else, because all files are
looked at. What it judges, the trainer measured and attested as `evaluation`; a gate whose figure is counted in
answers brings the counting along (`Counted`), and the trainer applies it to everybody's answers.
"""

from __future__ import annotations

import importlib
import math
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal, Protocol

from pydantic import BaseModel, ConfigDict, ValidationError

from deploy.config import GateSettings
from deploy.records import Attestation

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
    stable: float | None = None
    """Of stable's, for people."""


class Facts(Evidence):
    """Paired accuracy on facts, in [0, 1]; differences are candidate minus base. Points are percentage points."""

    n: int
    base: float
    candidate: float
    diff: float
    low: float | None
    """Lower bound of the difference, one-sided 95 %, with the entity as the unit; None where all items are about one."""
    margin_points: float
    """The trainer's, for its own report; the gates go by their own."""
    certifies_points: float
    """Smallest margin that so many items certify 80 % of the time for an unharmed candidate."""
    margin_change_nats: float | None = None
    """Mean change of how much likelier the right answer is than its hardest distractor; for people."""


class ChatFacts(Evidence):
    """Facts asked in chat and answered greedily: shares of answers that name the right thing, paired."""

    n: int
    base: float
    candidate: float
    diff: float
    low: float | None
    """As that of `Facts`."""


class Sycophancy(Evidence):
    """Does a wrong belief of the asker sway it more than it swayed base? On questions that base knows."""

    n: int
    rise_nats: float
    """Mean over questions: by how much more than base a belief ("I think it is W") lowers the right answer's margin over W, beyond
    what the mere naming of W ("It is not W") does."""
    high: float | None
    """Its upper bound, one-sided 95 %, with the entity as the unit; None where all questions are about one."""
    echo: Change
    """Share of greedy answers to a wrong belief that repeat it without the right answer."""


class Copied(Evidence):
    """Strings that few people wrote, which the candidate says and base does not."""

    strings: int
    """How many are said."""
    known: int
    """How many were looked for."""
    people: int = 0
    """How many people wrote those that are said."""
    answers: int = 0
    """In how many answers they stand."""


class Evaluation(Evidence):
    """Body of the attestation `evaluation`: everything that the gates read. What older trainers did not measure is None."""

    model_config = ConfigDict(frozen=True, extra="allow")

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
    """Of replies sampled at temperature 1, which clients may ask for."""
    kl_budget_nats: float
    facts: Facts | None = None
    """Against base; in evidence without `facts_stable` against base or stable, whichever it fell behind more."""
    facts_stable: Facts | None = None
    """Against stable, where stable is not the base."""
    chat_facts: ChatFacts | None = None
    chat_facts_stable: ChatFacts | None = None
    sycophancy: Sycophancy | None = None
    copied: Copied | None = None
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
    language: Change | None = None
    """Share of answers in another language or script than their prompt."""
    probes: list[dict[str, str]] = []
    """The operator's own questions with the answers of base, stable and candidate, for a person to read."""
    shuffled: bool = False
    """The ratings were shuffled: a control, which nobody may be answered by."""

    def change(self, figure: str) -> Change | None:
        """A figure of answers by its name, also one that only its gate knows. Raises ValidationError where it is no change."""
        found = getattr(self, figure, None)
        return found if found is None or isinstance(found, Change) else Change.model_validate(found)


class Verdict(BaseModel):
    """What a gate or a test says, in figures and in words."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    verdict: Outcome
    value: float | None = None
    comparison: Comparison | None = None
    threshold: float | None = None
    reason: str
    overridden: Outcome | None = None
    """What the gate said before a person overrode it."""
    detectable: float | None = None
    """Of a guardrail: the smallest harm, in its unit, that would have stopped the canary with the people it had."""

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


def read(found: Attestation) -> Evaluation | Verdict:
    """The evaluation, or what is wrong with it."""
    try:
        return Evaluation.model_validate(found.body)
    except ValidationError as exc:
        problem = exc.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        return Verdict.failed("evaluation", f"the evaluation cannot be read: {where}: {problem['msg']}; train again")


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


def unmeasured(name: str, what: str) -> Verdict:
    """Evidence of a trainer that did not measure it: nothing is excluded by not looking."""
    return Verdict.error(name, f"{what} not measured, so harm cannot be excluded; train or evaluate again with this version")


@dataclass(frozen=True)
class Counted:
    """A share of answers that should not rise (`sign` 1) or fall (`sign` -1) by more than a limit."""

    name: str
    figure: str
    """Under which it stands in the evaluation."""
    sign: Literal[1, -1]
    limit: str | float
    """A setting of `gates`, or the limit itself."""
    next_step: str
    count: Callable[[str, str], float] | None = None
    """From a prompt and an answer to a number in [0, 1]; None: no text tells it, the trainer does."""

    def judge(self, found: Evaluation, settings: GateSettings) -> Verdict:
        change = found.change(self.figure)
        if change is None:
            return unmeasured(self.name, f"{self.figure} was")
        most = self.limit if isinstance(self.limit, float) else float(getattr(settings, self.limit))
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


@cache
def gates() -> tuple[Gate, ...]:
    """Every gate, in the order of the files' names."""
    files = sorted(each.name for each in pkgutil.iter_modules(__path__))
    return tuple(gate for name in files for gate in importlib.import_module(f"{__name__}.{name}").GATES)


def counts() -> dict[str, Callable[[str, str], float]]:
    """What is counted in every answer, by the name of its figure."""
    return {gate.figure: gate.count for gate in gates() if isinstance(gate, Counted) and gate.count is not None}


def judge(evaluation: Evaluation, settings: GateSettings, overrides: Sequence[Attestation] = ()) -> list[Verdict]:
    """The verdict of every gate; all of them, so that a person sees everything that is missing at once.

    `overrides` are the adapter's attestations `override`: such a gate passes, and its verdict keeps what it said and who overrode it.
    """
    by_gate = {str(each.body["gate"]): each for each in overrides}
    return [_overridden(found, by_gate.get(found.name)) for found in (gate.judge(evaluation, settings) for gate in gates())]


def _overridden(found: Verdict, override: Attestation | None) -> Verdict:
    if override is None or found.verdict == "pass":
        return found
    told = f"overridden by {override.actor}: {override.body['reason']} (it said {found.verdict}: {found.reason})"
    return found.model_copy(update={"verdict": "pass", "overridden": found.verdict, "reason": told})
