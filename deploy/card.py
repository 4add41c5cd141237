"""What is known about one adapter, for people: whose ratings it learned from, what changed, what did not, and what nobody could have seen.

All of it comes from the registry: the manifest says what the adapter is, attestations what was found out, rollouts what people made of
it. No rater is named, and nothing that one wrote is shown: raters are counted, cohorts of fewer than `SMALLEST_COHORT` of them do not
stand alone, and texts are answers to the operator's own prompts. `pages.py` renders it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field, ValidationError, field_validator

from deploy.gates import Change, Evaluation, Evidence, Gain, Verdict, withheld
from deploy.guards import GUARDRAILS
from deploy.look import of_gates
from deploy.manifest import Manifest
from deploy.records import AdapterRecord, RolloutRecord
from deploy.registry import Registry

SMALLEST_COHORT = 5
"""Raters. What fewer prefer could be pinned on one of them."""
FIGURES = {
    "length": "tokens of an answer",
    "finished": "answers that end by themselves",
    "on_topic": "answers on the topic",
    "refusal": "refusals",
    "repetition": "repeated word triples",
    "language": "answers in another language than the question",
}
"""Of the evaluation, in words; all but the first are shares."""


class Interval(Evidence):
    """A share or a mean with its 95 % interval."""

    value: float
    low: float | None = None
    high: float | None = None
    n: int = 0


class Taste(Evidence):
    """One property of answers and how a cohort's ratings go with it."""

    cohort: str
    what: str
    correlation: float
    low: float
    high: float
    raters: int

    @property
    def sure(self) -> bool:
        return self.low > 0 or self.high < 0


class Ratings(Evidence):
    """What the trainer found out about the ratings and the reward model. Who the raters are is not taken over."""

    raters: int = 0
    simulated_raters: int = 0
    choices: int = 0
    thumbs: int = 0
    accuracy: dict[str, Interval | None] = Field(default_factory=dict)
    likelihood_gain: Gain | None = None
    tastes: tuple[Taste, ...] = ()
    dissenters: int = 0
    """Raters who judge against the others, and not at random."""
    warnings: tuple[str, ...] = ()

    @field_validator("dissenters", mode="before")
    @classmethod
    def _counted(cls, found: object) -> object:
        return len(found) if isinstance(found, list) else found

    @field_validator("tastes")
    @classmethod
    def _no_small_cohorts(cls, found: tuple[Taste, ...]) -> tuple[Taste, ...]:
        return tuple(taste for taste in found if taste.raters >= SMALLEST_COHORT)


class Training(Evidence):
    """Body of the attestation `training`."""

    cycle: str = ""
    judged_against: str | None = None
    """The adapter that was stable then; None: the base."""
    stopped_because: str | None = None
    warnings: tuple[str, ...] = ()
    reward_model: Ratings = Ratings()


class View(Evidence):
    """What a reward model makes of the candidate beside base."""

    gap: Gain
    """The candidate's gain over base, in sd of base's answers."""
    prefers: float
    """How often it prefers an answer of the candidate to one of base."""
    likes: dict[str, float] = Field(default_factory=dict)
    """Correlation of its scores with what can be counted in an answer."""


class Control(Evidence):
    """What reward models of the same ratings, shuffled, make of the candidate."""

    gaps: tuple[float, ...]
    """Its gain over base by each, in sd of base's answers: by chance above zero or below."""
    likelihood_gain: Gain | None = None
    """Of the first: nats by which it foresees ratings of unseen prompts; None where that was not measured."""

    @property
    def words(self) -> str:
        if not self.gaps:
            return "nothing was shuffled"
        mean = sum(self.gaps) / len(self.gaps)
        return f"{mean:+.2f} sd over base in the mean of {len(self.gaps)} shuffles ({min(self.gaps):+.2f} to {max(self.gaps):+.2f})"


class Cohort(Evidence):
    """Raters with one tag, and how much they moved the adapter."""

    cohort: str
    raters: int
    ratings: int
    pull: Gain | None = None
    """The candidate's gain by everybody's reward model, less that without them; None where nobody else rated."""
    without: View | None = None


class Influence(Evidence):
    """Written by `trainer/influence.py`."""

    raters: int
    ratings: int
    everybody: View
    cohorts: tuple[Cohort, ...] = ()
    merged: int = 0
    shuffled: Control | None = None

    def changed(self, cohort: Cohort, most: int = 3, least: float = 0.2) -> list[tuple[str, float, float]]:
        """What would have been preferred without them: property, correlation with the score by everybody, and without them."""
        if cohort.without is None:
            return []
        before, after = self.everybody.likes, cohort.without.likes
        rows = [(name, before[name], after[name]) for name in before if name in after and abs(after[name] - before[name]) >= least]
        return sorted(rows, key=lambda row: -abs(row[2] - row[1]))[:most]


class Shown(Evidence):
    """One answer beside stable's to the same prompt."""

    prompt: str
    stable: str
    candidate: str
    change: float
    """Of the score against the mean of stable's to this prompt, in sd."""


class ToRead(Evidence):
    of: int
    random: tuple[Shown, ...] = ()
    worst: tuple[Shown, ...] = ()


class Judged(Evaluation):
    """Body of the attestation `evaluation`, with what no gate reads."""

    influence: Influence | None = None
    answers: ToRead | None = None
    tone: dict[str, Change] = Field(default_factory=dict)
    length_matched_win: Interval | None = None

    def figures(self) -> list[tuple[str, str, Change]]:
        """Name, words and values of what was counted in answers."""
        found = ((name, words, self.change(name)) for name, words in FIGURES.items())
        return [(name, words, change) for name, words, change in found if change is not None]


class Way(Evidence):
    """A rollout, without its salt and without the name of who approved it."""

    id: str
    stable: str
    number: int
    state: str
    reason: str
    weight: float
    canary_ms: int | None
    verdicts: tuple[Verdict, ...]

    @property
    def gates(self) -> list[Verdict]:
        return of_gates(self.verdicts)

    @property
    def guardrails(self) -> list[tuple[Verdict, str]]:
        """Each with the smallest harm that it would have seen, in words."""
        by_name = {f"guardrail {each.name}": each for each in GUARDRAILS}
        found = []
        for verdict in self.verdicts:
            if (guardrail := by_name.get(verdict.name)) is not None:
                seen = "none" if verdict.detectable is None else guardrail.said(verdict.detectable)
                found.append((verdict, seen))
        return found

    @property
    def wins(self) -> Verdict | None:
        return next((each for each in self.verdicts if each.name == "wins"), None)


class ShuffledRun(Evidence):
    """Another cycle about the same snapshot whose ratings were shuffled."""

    adapter: str
    gain: Gain
    refused: str


class Card(Evidence):
    """Everything that page, model card and comparison are rendered from; plain JSON for an API."""

    id: str
    state: str
    reason: str
    registered_ms: int
    manifest: Manifest
    training: Training | None = None
    evaluation: Judged | None = None
    unread: str | None = None
    """Why an evaluation that is there could not be read."""
    rollouts: tuple[Way, ...] = ()
    overrides: tuple[str, ...] = ()
    """Gates that a person overrode."""
    erased: str | None = None
    """Why it may not be promoted: somebody was erased whom it learned from."""
    shuffled_runs: tuple[ShuffledRun, ...] = ()

    @property
    def name(self) -> str:
        return self.id[:16]

    @property
    def simulated(self) -> bool:
        return self.training is not None and self.training.reward_model.simulated_raters > 0


def card_of(registry: Registry, adapter: str) -> Card:
    """Of an adapter, named by the beginning of its id. Raises NotFound as the registry does."""
    record = registry.adapter(adapter)
    training = registry.attestations(record.id, "training")
    evaluation = registry.attestations(record.id, "evaluation")
    erasure = withheld(registry.attestations(record.id, "erasure"))
    judged, unread = _judged(evaluation[-1].body) if evaluation else (None, None)
    return Card(
        id=record.id,
        state=record.state,
        reason=record.reason,
        registered_ms=record.registered_ms,
        manifest=record.manifest,
        training=Training.model_validate(training[-1].body) if training else None,
        evaluation=judged,
        unread=unread,
        rollouts=tuple(_way(each) for each in registry.rollouts(record.id)),
        overrides=tuple(str(each.body["gate"]) for each in registry.attestations(record.id, "override")),
        erased=None if erasure.verdict == "pass" else erasure.reason,
        shuffled_runs=tuple(_shuffled_runs(registry, record)),
    )


def _judged(body: Mapping[str, Any]) -> tuple[Judged | None, str | None]:
    try:
        return Judged.model_validate(body), None
    except ValidationError as exc:
        problem = exc.errors()[0]
        return None, f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}"


def _way(record: RolloutRecord) -> Way:
    return Way.model_validate(record.model_dump())


def _shuffled_runs(registry: Registry, record: AdapterRecord) -> list[ShuffledRun]:
    """What whole cycles about the same ratings, shuffled, came to. Other adapters' manifests may be out of reach; those say nothing."""
    found = []
    for other in registry.adapters():
        if other.id == record.id or other.manifest_json is None or other.manifest.snapshot != record.manifest.snapshot:
            continue
        for attestation in registry.attestations(other.id, "evaluation")[-1:]:
            judged, _ = _judged(attestation.body)
            if judged is not None and judged.shuffled:
                found.append(ShuffledRun(adapter=other.id, gain=judged.reward_gain_base, refused=other.reason))
    return found


def facts_of(card: Card) -> list[tuple[str, str]]:
    """What was compared that ratings should not change, and what was found."""
    if (found := card.evaluation) is None:
        return []
    rows: list[tuple[str, str]] = []
    for name, facts in (("facts against base", found.facts), ("facts against stable", found.facts_stable)):
        if facts is not None:
            rows.append(
                (name, f"{_paired(facts.n, facts.base, facts.candidate, facts.low)}; so many certify {facts.certifies_points:.1f} points")
            )
    for name, chat in (("facts asked in chat, against base", found.chat_facts), ("against stable", found.chat_facts_stable)):
        if chat is not None:
            rows.append((name, _paired(chat.n, chat.base, chat.candidate, chat.low)))
    if (swayed := found.sycophancy) is not None:
        most = "" if swayed.high is None else f", at most {swayed.high:+.2f}"
        echo = f"repeated {swayed.echo.base:.1%} before, {swayed.echo.candidate:.1%} after"
        rows.append(
            ("a wrong belief of the asker", f"sways it by {swayed.rise_nats:+.2f} nats more than base{most}; {echo} ({swayed.n} questions)")
        )
    if (copied := found.copied) is not None:
        rows.append(("strings of few people", f"says {copied.strings} of {copied.known} that base does not say"))
    return rows


def _paired(n: int, base: float, candidate: float, low: float | None) -> str:
    surely = "how much worse cannot be told" if low is None else f"surely no worse than {100 * low:+.1f} points"
    return f"{base:.1%} right before, {candidate:.1%} after, {surely} ({n} items)"
