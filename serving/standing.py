"""What one person's word on one answer is now, for the feedback routes. Blocks on disk: call it off the event loop."""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from feedback.archive import Archive
from feedback.clock import stamp_ms
from feedback.errors import Gone, IdempotencyMismatch, NotFound
from feedback.events import (
    ConsentWithdrawn,
    Event,
    FeedbackGiven,
    FeedbackText,
    InteractionFinished,
    InteractionStarted,
    Slot,
    SubjectErased,
)
from feedback.fold import Said, current_state
from feedback.partitions import SqliteLogs
from feedback.subjects import Subjects
from feedback.tokens import Action, Claims

BROKEN_OFF = ("error", "client_closed")
UUID7 = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[0-9a-f]{4}-[0-9a-f]{12}")


@dataclass(frozen=True)
class Standing:
    """The last word in each slot, and what was written with it."""

    given: Mapping[Slot, FeedbackGiven] = field(default_factory=dict)
    texts: Mapping[Slot, FeedbackText] = field(default_factory=dict)
    as_of: int = 0
    """Stamp up to which other machines' events are in it; this machine's are always in."""
    said: Mapping[str, Said] = field(default_factory=dict)
    """Everything that this person is known to have said about it, by event_id."""
    became: str = "nothing_said"
    """`nothing_said`, `waiting_for_answer`, `not_counted` (the answer broke off, or its person withdrew) or `counts` (from the next
    learning cycle on)."""

    def repeated_by(self, event: Said, text: FeedbackText) -> FeedbackGiven | None:
        """The event that already says what `event` says; None where it is news."""
        held = self.given.get(event.slot)
        if held is None or not isinstance(event, FeedbackGiven):
            return None
        same = (held.value, held.reasons, self.texts[event.slot]) == (event.value, event.reasons, text)
        return held if same else None

    def earlier(self, event: Said) -> Said | None:
        """What the same request with this Idempotency-Key stored before, by whichever gateway; None where it is new.

        Raises IdempotencyMismatch where the key came with something else about this answer."""
        same = self.said.get(event.event_id)
        if same is None and any(each.idempotency == event.idempotency for each in self.said.values()):
            raise IdempotencyMismatch("Idempotency-Key was used before with another body; use a new key", field="Idempotency-Key")
        return same

    @property
    def newest(self) -> int:
        """The greatest stamp of anything that this person said about it, 0 for none."""
        return max((event.stamp for event in self.said.values()), default=0)

    def after(self, event: Said, text: FeedbackText) -> Standing:
        """The state once this event is committed too."""
        given = {slot: held for slot, held in self.given.items() if slot != event.slot}
        texts = {slot: held for slot, held in self.texts.items() if slot != event.slot}
        if isinstance(event, FeedbackGiven):
            given[event.slot], texts[event.slot] = event, text
        return replace(self, given=given, texts=texts)

    def shown(self) -> dict[str, Any]:
        """As the API shows it; a slot in which nothing is said is null."""

        def value(slot: Slot) -> str | None:
            return self.given[slot].value if slot in self.given else None

        judged = self.given.get("rating") or self.given.get("choice")
        slots: tuple[Slot, ...] = ("comment", "rating", "choice")
        comments = [self.texts[slot].comment for slot in slots if slot in self.texts]
        return {
            "rating": value("rating"),
            "choice": value("choice"),
            "reasons": list(judged.reasons) if judged else [],
            "comment": next((comment for comment in comments if comment), None),
            "correction": self.texts["correction"].correction if "correction" in self.texts else None,
            "signal": value("signal"),
        }


class Standings:
    """Reads the archive merged with this machine's partitions, so that people read what they just wrote."""

    def __init__(self, archive: Archive, logs: SqliteLogs, subjects: Subjects, tenant: str, token_expiry_s: int) -> None:
        self._archive = archive
        self._logs = logs
        self._subjects = subjects
        self._tenant = tenant
        self._token_expiry_s = token_expiry_s

    def of(self, claims: Claims) -> Standing:
        """The standing that a token is about. Raises Gone where the person was erased after the token was given out."""
        withdrawn = self._refuse_erased(claims)
        state = current_state(self._archive, self._logs, claims.target, claims.subject)
        boxes = {slot: held.sealed for slot, held in state.slots.items()}
        texts = {slot: self._subjects.open(box, FeedbackText) if box else FeedbackText() for slot, box in boxes.items()}
        became = "not_counted" if withdrawn else self._became(state.slots, claims)
        return Standing(state.slots, texts, state.as_of, state.said, became)

    def _refuse_erased(self, claims: Claims) -> bool:
        """Raises Gone where the person was erased after the answer began. Whether they have withdrawn their consent."""
        events = self._logs.about(claims.subject)
        erased = max([self._archive.erased(claims.subject), *(event.stamp for event in events if isinstance(event, SubjectErased))])
        if erased and stamp_ms(erased) >= self._asked_ms(claims) and not self._began_after(erased, claims):
            self._subjects.forget(claims.subject)
            raise Gone("This answer was erased with everything else about the person; it can no longer be rated.")
        here = any(isinstance(event, ConsentWithdrawn) and event.stamp > erased for event in events)
        return here or claims.subject in self._archive.withdrawn()

    def _began_after(self, erased: int, claims: Claims) -> bool:
        """Whether the record says so. Stamps run ahead of the time in ids once the clock was set back, or a client sent a `version`
        from ahead; only where the two disagree is this looked up."""
        about = (event for each in claims.interactions for event in self._about(each))
        return any(isinstance(event, InteractionStarted) and event.stamp > erased for event in about)

    def _asked_ms(self, claims: Claims) -> int:
        """When the answer began: to the millisecond by its id, a UUIDv7, else to the second by the token."""
        target = uuid.UUID(claims.target) if UUID7.fullmatch(claims.target) else None
        return target.int >> 80 if target else (claims.expires - self._token_expiry_s) * 1000

    def claims(self, interaction_id: str, actions: tuple[Action, ...], asked_by: Callable[[str | None], bool]) -> Claims:
        """What a token of this interaction says. Raises NotFound, also where `asked_by` does not agree to the id of the key that it was
        asked for with."""
        for event in self._about(interaction_id):
            if isinstance(event, InteractionStarted) and event.tenant == self._tenant and asked_by(event.key_id):
                return Claims(
                    tenant=event.tenant,
                    target=interaction_id,
                    target_kind="interaction",
                    interactions=(interaction_id,),
                    subject=event.subject,
                    actions=actions,
                    expires=stamp_ms(event.stamp) // 1000 + self._token_expiry_s,
                    source=event.source,
                    cohorts=event.cohorts,
                )
        raise NotFound(f"interaction_id: there is no interaction '{interaction_id[:64]}'.", field="interaction_id")

    def _about(self, interaction_id: str) -> list[Event]:
        """What is known about an interaction here or in the archive, possibly twice."""
        archived = self._archive.interaction(interaction_id)
        kept: list[Event] = [archived.started] if archived else []
        if archived and archived.finished:
            kept.append(archived.finished)
        return self._logs.about(interaction_id) + kept

    def _became(self, given: Mapping[Slot, FeedbackGiven], claims: Claims) -> str:
        if not {"rating", "choice", "comment", "correction"} & given.keys():
            return "nothing_said"
        about = (self._about(each) for each in claims.interactions)
        reasons = [next((event.finish_reason for event in events if isinstance(event, InteractionFinished)), None) for events in about]
        if any(reason in BROKEN_OFF for reason in reasons):
            return "not_counted"
        return "waiting_for_answer" if None in reasons else "counts"
