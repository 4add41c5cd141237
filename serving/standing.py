"""What one person's word on one answer is now: the fold of what they said, read from every process's partition."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from feedback.clock import stamp_ms
from feedback.errors import Gone, NotFound
from feedback.events import (
    Event,
    FeedbackCleared,
    FeedbackGiven,
    FeedbackText,
    InteractionFinished,
    InteractionStarted,
    Slot,
    SubjectErased,
)
from feedback.sqlite_log import SqliteLogs
from feedback.subjects import Subjects
from feedback.tokens import Action, Claims

BROKEN_OFF = ("error", "client_closed")


@dataclass(frozen=True)
class Standing:
    """The last word in each slot."""

    given: Mapping[Slot, FeedbackGiven] = field(default_factory=dict)
    texts: Mapping[Slot, FeedbackText] = field(default_factory=dict)
    as_of: int = 0
    """Stamp of the newest event that this state knows."""
    became: str = "nothing_said"
    """`nothing_said`, `waiting_for_answer`, `not_counted` (the answer broke off) or `counts` (from the next learning cycle on)."""

    def repeated_by(self, event: FeedbackGiven | FeedbackCleared, text: str | None) -> FeedbackGiven | None:
        """The event that already says what `event` says; None where it is news."""
        old = self.given.get(event.slot)
        if old is None or isinstance(event, FeedbackCleared):
            return None
        known = self.texts.get(event.slot, FeedbackText())
        same = (old.value, old.reasons, known.comment or known.correction) == (event.value, event.reasons, text)
        return old if same else None

    def after(self, event: FeedbackGiven | FeedbackCleared, comment: str | None, correction: str | None) -> Standing:
        """The state once this event is committed too."""
        given, texts = dict(self.given), dict(self.texts)
        given.pop(event.slot, None)
        texts.pop(event.slot, None)
        if isinstance(event, FeedbackGiven):
            given[event.slot] = event
            texts[event.slot] = FeedbackText(comment=comment, correction=correction)
        return replace(self, given=given, texts=texts, as_of=max(self.as_of, event.stamp))

    def shown(self) -> dict[str, Any]:
        """As the API shows it; a slot in which nothing is said is null."""

        def value(slot: Slot) -> str | None:
            return self.given[slot].value if slot in self.given else None

        first = self.given.get("rating") or self.given.get("choice")
        comments = (self.texts[slot].comment for slot in ("comment", "rating", "choice") if slot in self.texts)  # type: ignore[index]
        return {
            "rating": value("rating"),
            "choice": value("choice"),
            "reasons": list(first.reasons) if first else [],
            "comment": next((comment for comment in comments if comment), None),
            "correction": self.texts["correction"].correction if "correction" in self.texts else None,
            "signal": value("signal"),
        }


class Standings:
    """Reads standings. Blocks on disk."""

    def __init__(self, logs: SqliteLogs, subjects: Subjects, tenant: str, token_expiry_s: int) -> None:
        self._logs = logs
        self._subjects = subjects
        self._tenant = tenant
        self._token_expiry_s = token_expiry_s

    def of(self, claims: Claims) -> Standing:
        """The standing that a token is about. Raises Gone where the person was erased after the token was given out."""
        issued_ms = (claims.expires - self._token_expiry_s) * 1000
        for event in self._logs.about(claims.subject):
            # In the second of both, the erasure is taken to be later: it may refuse a new answer's token, never keep an erased one.
            if isinstance(event, SubjectErased) and stamp_ms(event.stamp) >= issued_ms:
                self._subjects.forget(claims.subject)
                raise Gone("This answer was erased with everything else about the person; it can no longer be rated.")
        standing = self._fold(self._logs.about(claims.target), claims)
        return replace(standing, became=self._became(standing, claims))

    def claims(self, interaction_id: str, actions: tuple[Action, ...]) -> Claims:
        """What a token of this interaction says. Raises NotFound."""
        for event in self._logs.about(interaction_id):
            if isinstance(event, InteractionStarted) and event.tenant == self._tenant:
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

    def _fold(self, events: list[Event], claims: Claims) -> Standing:
        standing = Standing(as_of=int(time.time() * 1000) << 16)
        mine = [event for event in events if isinstance(event, FeedbackGiven | FeedbackCleared) and event.rater == claims.subject]
        for event in sorted(mine, key=lambda event: (event.stamp, event.event_id)):
            sealed = event.sealed if isinstance(event, FeedbackGiven) else None
            text = self._subjects.open(sealed, FeedbackText) if sealed else FeedbackText()
            standing = standing.after(event, text.comment, text.correction)
        return standing

    def _became(self, standing: Standing, claims: Claims) -> str:
        if not {"rating", "choice", "comment", "correction"} & standing.given.keys():
            return "nothing_said"
        about = (self._logs.about(each) for each in claims.interactions)
        ends = [event.finish_reason for events in about for event in events if isinstance(event, InteractionFinished)]
        if any(reason in BROKEN_OFF for reason in ends):
            return "not_counted"
        return "counts" if len(ends) == len(claims.interactions) else "waiting_for_answer"
