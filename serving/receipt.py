"""What a client gets beside an answer: the ids, and the tokens with which it may be rated."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from feedback.events import InteractionStarted
from feedback.tokens import Action, Claims, Tokens

OF_AN_ANSWER: tuple[Action, ...] = ("rating", "comment", "correction", "signal", "clear", "read")
OF_A_COMPARISON: tuple[Action, ...] = ("choice", "comment", "signal", "clear", "read")


@dataclass(frozen=True)
class Receipt:
    """Made once the beginning is committed. Without a record there is nothing to rate and no token."""

    recorded: bool
    interactions: tuple[tuple[str, str], ...] = ()
    """(id, token) of each choice, in their order."""
    comparison: tuple[str, str] | None = None
    """(id, token) of the comparison."""

    @classmethod
    def of(cls, started: Sequence[InteractionStarted], tokens: Tokens, expiry_s: int, recorded: bool) -> Receipt:
        """Tokens for these interactions, and for their comparison where both sides are there."""
        if not recorded:
            return cls(recorded=False)
        expires = int(time.time()) + expiry_s
        ids = tuple(event.interaction_id for event in started)
        first = started[0]

        def mint(target: str, interactions: tuple[str, ...], actions: tuple[Action, ...]) -> str:
            return tokens.mint(
                Claims(
                    tenant=first.tenant,
                    target=target,
                    target_kind="comparison" if actions is OF_A_COMPARISON else "interaction",
                    interactions=interactions,
                    subject=first.subject,
                    actions=actions,
                    expires=expires,
                    source=first.source,
                    cohorts=first.cohorts,
                )
            )

        comparison = None
        if first.comparison_id and len(ids) == 2:
            comparison = (first.comparison_id, mint(first.comparison_id, ids, OF_A_COMPARISON))
        return cls(True, tuple((each, mint(each, (each,), OF_AN_ANSWER)) for each in ids), comparison)

    def without_comparison(self, survivors: Sequence[InteractionStarted]) -> Receipt:
        """The receipt after a side has failed."""
        ids = {event.interaction_id for event in survivors}
        return replace(self, comparison=None, interactions=tuple(pair for pair in self.interactions if pair[0] in ids))

    def headers(self) -> dict[str, str]:
        """The token of the comparison, else of the first answer, before the body: an answer that breaks off can still be rated."""
        if not self.recorded:
            return {"Plaudit-Recorded": "false"}
        return {"Plaudit-Feedback-Token": (self.comparison or self.interactions[0])[1]}

    def body(self) -> dict[str, Any]:
        """The `plaudit` object of the reply, or of the stream's first chunk."""
        if not self.recorded:
            return {"recorded": False}
        if self.comparison is None and len(self.interactions) == 1:
            return {"interaction_id": self.interactions[0][0], "token": self.interactions[0][1]}
        listed = [{"index": index, "interaction_id": each, "token": token} for index, (each, token) in enumerate(self.interactions)]
        if self.comparison is None:
            return {"interactions": listed}
        return {"comparison_id": self.comparison[0], "token": self.comparison[1], "interactions": listed}
