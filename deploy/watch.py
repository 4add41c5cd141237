"""Carries what the archive holds about a canary to its guardrails, each event once, looking only at what is new.

Nothing here is durable: a controller that takes over reads the canary from its beginning.
"""

from __future__ import annotations

from collections.abc import Iterator

from deploy.answers import JSON_FORMATS, Answer
from deploy.guards import Arm, Guards
from feedback.archive import Archive, Interaction
from feedback.clock import COUNTER_BITS
from feedback.errors import Gone, InvalidInput
from feedback.events import Event, FeedbackGiven, FinishedText, InteractionFinished, InteractionScored, InteractionStarted, StartedText
from feedback.subjects import Subjects

THUMBS = {"up": 1.0, "down": 0.0}
LATE_MS = 60_000
"""Events of other machines may arrive with stamps this much older than what was read."""
KINDS = ("interaction.started", "interaction.finished", "interaction.scored", "feedback.given")


class Watch:
    """Of one rollout. `subjects` opens what people wrote; without it the guardrails that read text say nothing."""

    def __init__(self, archive: Archive, subjects: Subjects | None, rollout: str, canary_ms: int, guards: Guards) -> None:
        self.archive, self.subjects, self.rollout, self.guards = archive, subjects, rollout, guards
        self._after = dict.fromkeys(KINDS, canary_ms << COUNTER_BITS)
        self._begun = canary_ms << COUNTER_BITS
        self._seen: dict[str, dict[str, int]] = {kind: {} for kind in KINDS}
        self._thumbed: set[str] = set()
        self._withdrawn: set[str] = set()
        self._erased: dict[str, int] = {}
        """Subjects that were forgotten, with the stamp of that erasure."""

    def look(self) -> None:
        """Take in what has happened since."""
        self._withdrawn = self.archive.withdrawn()
        for kind in KINDS:
            for event in self._new(kind):
                self._take(event)
        erased = self.archive.erasures()
        # Each erasure once: who came back afterwards would otherwise enter as somebody new at every look.
        self.guards.forget(person for person, stamp in erased.items() if self._erased.get(person) != stamp)
        self._erased = erased

    def _new(self, kind: str) -> Iterator[Event]:
        """Events not seen before, oldest first; `_seen` remembers as many as could still come late."""
        seen, newest = self._seen[kind], self._after[kind]
        after = max(self._begun, newest - (LATE_MS << COUNTER_BITS))
        while batch := self.archive.events(kind, after):
            after = batch[-1].stamp
            for event in batch:
                if event.event_id not in seen:
                    seen[event.event_id] = event.stamp
                    yield event
            newest = max(newest, after)
        self._after[kind] = newest
        horizon = newest - (LATE_MS << COUNTER_BITS)
        self._seen[kind] = {event_id: stamp for event_id, stamp in seen.items() if stamp >= horizon}

    def _take(self, event: Event) -> None:
        if isinstance(event, InteractionStarted):
            if (arm := self._arm(event)) is not None:
                self.guards.arrived(event.subject, arm)
            return
        if isinstance(event, FeedbackGiven):
            # The first thumb counts: one that is changed later would change a mean that was bet on.
            if event.slot != "rating" or event.value not in THUMBS or event.target in self._thumbed or event.rater in self._withdrawn:
                return
            about = event.target
        elif isinstance(event, InteractionFinished | InteractionScored):
            about = event.interaction_id
        else:
            return
        interaction = self.archive.interaction(about)
        arm = self._arm(interaction.started) if interaction else None
        if interaction is None or arm is None:
            return
        person = interaction.started.subject
        if isinstance(event, InteractionFinished):
            self.guards.answered(person, arm, self._answer(interaction, event))
        elif isinstance(event, InteractionScored):
            self.guards.measured("reward", person, arm, event.score)
        else:
            self._thumbed.add(about)
            self.guards.measured("thumbs", person, arm, THUMBS[event.value or ""])

    def _arm(self, started: InteractionStarted) -> Arm | None:
        """None for stable, for another rollout, and for a comparison, which shows both arms to the same person."""
        if started.rollout != self.rollout or started.comparison_id is not None or started.arm == "stable":
            return None
        return started.arm

    def _answer(self, interaction: Interaction, finished: InteractionFinished) -> Answer:
        asked, said = self._texts(interaction.started, finished)
        wanted = interaction.started.sampling.get("response_format")
        return Answer(
            finish_reason=finished.finish_reason,
            tokens=finished.completion_tokens,
            first_token_ms=finished.first_token_ms,
            total_ms=finished.total_ms,
            wants_json=isinstance(wanted, dict) and wanted.get("type") in JSON_FORMATS,
            calls_tools=bool(said and said.tool_calls) or finished.finish_reason == "tool_calls",
            question=_question(asked) if asked else None,
            text=said.answer if said else None,
        )

    def _texts(self, started: InteractionStarted, finished: InteractionFinished) -> tuple[StartedText | None, FinishedText | None]:
        if self.subjects is None or started.sealed is None or finished.sealed is None:
            return None, None
        try:
            return self.subjects.open(started.sealed, StartedText), self.subjects.open(finished.sealed, FinishedText)
        except (Gone, InvalidInput):
            return None, None  # erased meanwhile, or damaged: the figures without text still count


def _question(asked: StartedText) -> str | None:
    """The last message of the person where it is plain text."""
    said = next((message.get("content") for message in reversed(asked.messages) if message.get("role") == "user"), None)
    return said if isinstance(said, str) else None
