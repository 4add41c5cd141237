"""What do you think of it? `POST` and `GET /v1/feedback`.

A token names what may be rated and in whose name, so an answer can be rated by any gateway, while it still streams, without a look-up.
A 2xx means committed. The last word on a slot counts; saying the same again, or repeating a request, changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal, cast

from fastapi import Request
from fastapi.responses import JSONResponse
from pydantic import Field, StringConstraints, ValidationError
from starlette.concurrency import run_in_threadpool

from feedback.archive import TargetState
from feedback.errors import InvalidInput, NotAllowed, NotAuthenticated
from feedback.events import FeedbackCleared, FeedbackGiven, FeedbackText, Slot
from feedback.tokens import Action, Claims
from serving import metrics
from serving.chat import Gateway
from serving.openai_api import Strict, refusal, shown
from serving.wire import read_body

REASONS: dict[str, tuple[str, ...]] = {
    "up": ("accurate", "followed_instructions", "clear", "thorough", "other"),
    "down": ("incorrect", "ignored_instructions", "unnecessary_refusal", "too_long", "style", "unsafe", "other"),
}
VALUES: dict[str, tuple[str, ...]] = {
    "rating": ("up", "down"),
    "choice": ("a", "b", "tie", "both_bad"),
    "signal": ("copied", "regenerated", "edited", "stopped", "abandoned", "skipped", "continued_a", "continued_b"),
}
MAX_COMMENT_CHARS = 4_000
MAX_CORRECTION_CHARS = 32 * 1024
MAX_KEY_CHARS = 255

Reason = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]{0,39}$")]


class Said(Strict):
    """The body of `POST /v1/feedback`."""

    kind: Literal["rating", "choice", "comment", "correction", "signal", "clear"]
    value: str | None = None
    reasons: list[Reason] = Field(default=[], max_length=10)
    comment: str | None = Field(default=None, min_length=1, max_length=MAX_COMMENT_CHARS)
    correction: str | None = Field(default=None, min_length=1, max_length=MAX_CORRECTION_CHARS)
    version: int | None = Field(default=None, ge=0, lt=2**63)
    slot: Slot | None = None
    interaction_id: str | None = Field(default=None, max_length=64)
    """With an API key instead of a token: what is rated."""
    comparison_id: str | None = Field(default=None, max_length=64)


@dataclass(frozen=True)
class Rater:
    """In whose name, and on what, this request speaks."""

    claims: Claims

    def require(self, action: Action) -> None:
        """Raises NotAllowed where the token does not allow this."""
        if action not in self.claims.actions:
            kind, allowed = self.claims.target_kind, ", ".join(self.claims.actions)
            raise NotAllowed(f"kind: '{action}' is not possible on this {kind}; its token allows {allowed}.", field="kind")


def parse(body: bytes) -> Said:
    """What was said. Raises InvalidInput naming field, value and limit."""
    try:
        said = Said.model_validate_json(body)
    except ValidationError as exc:
        raise refusal(exc) from exc
    if (allowed := VALUES.get(said.kind)) and said.value not in allowed:
        raise InvalidInput(f"value: {shown(said.value)} is none of {', '.join(allowed)}, which a {said.kind} may be.", field="value")
    belongs = {
        "value": said.kind in VALUES,
        "reasons": said.kind in ("rating", "choice"),
        "comment": said.kind in ("rating", "choice", "comment"),
        "correction": said.kind == "correction",
        "slot": said.kind == "clear",
    }
    for name, fits in belongs.items():
        if getattr(said, name) and not fits:
            raise InvalidInput(f"{name}: does not belong to a {said.kind}.", field=name)
    for name in ("comment", "correction"):
        if said.kind == name and not getattr(said, name):
            raise InvalidInput(f"{name}: is missing; a {name} needs it.", field=name)
    if said.kind == "clear" and said.slot is None:
        raise InvalidInput("slot: is missing; say which of rating, choice, comment, correction or signal to clear.", field="slot")
    return said


async def give(request: Request) -> JSONResponse:
    """`POST /v1/feedback`."""
    gateway: Gateway = request.app.state.gateway
    body = await read_body(request, gateway.settings.server.max_body_bytes)
    rater = await who_rates(request, gateway, body)
    said = parse(body)
    rater.require(said.kind)
    claims = rater.claims
    key = idempotency_key(request)
    event = await run_in_threadpool(as_event, gateway, claims, said, body, key)
    with metrics.COMMIT.labels("feedback").time():
        stored = (await gateway.stores.commit([event]))[0]
    metrics.FEEDBACK.labels(said.kind).inc()
    state = await run_in_threadpool(gateway.stores.state, claims.target, claims.subject)
    reply = {
        "feedback_id": stored.event_id,
        "version": stored.stamp,
        "state": shown_state(gateway, state),
        "durable": gateway.settings.feedback.ack,
    }
    return JSONResponse(reply, headers={"Cache-Control": "no-store"})


async def read(request: Request) -> JSONResponse:
    """`GET /v1/feedback`: what counts now, and what became of it."""
    gateway: Gateway = request.app.state.gateway
    rater = await who_rates(request, gateway, b"")
    rater.require("read")
    state = await run_in_threadpool(gateway.stores.state, rater.claims.target, rater.claims.subject)
    reply = {"state": shown_state(gateway, state), "as_of": state.as_of, "became": state.became}
    return JSONResponse(reply, headers={"Cache-Control": "no-store"})
