"""What do you think of it? `POST` and `GET /v1/feedback`.

A token names what may be rated and in whose name, so an answer can be rated by any gateway, while it still streams, without a look-up.
A 2xx means committed. The last word on a slot counts; saying the same again, or repeating a request, changes nothing.
"""

from __future__ import annotations

import asyncio
from typing import Annotated, Literal

from fastapi import Request
from fastapi.responses import JSONResponse
from pydantic import Field, StringConstraints, ValidationError

from feedback.errors import InvalidInput, NotAllowed
from feedback.events import FeedbackCleared, FeedbackGiven, FeedbackText, Slot
from feedback.tokens import Action, Claims
from serving import metrics
from serving.access import caller_of
from serving.chat import Gateway
from serving.openai_api import Strict, refusal, shown
from serving.receipt import OF_AN_ANSWER
from serving.standing import Standing
from serving.who import Caller
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
    key = request.headers.get("idempotency-key")
    if key is not None and not 1 <= len(key) <= MAX_KEY_CHARS:
        raise InvalidInput(f"Idempotency-Key has {len(key)} characters, it may have 1 to {MAX_KEY_CHARS}.", field="Idempotency-Key")
    said = parse(body)
    caller = caller_of(request)
    claims = caller.claims
    if claims is None:
        claims = await asyncio.to_thread(claims_of_key, gateway, caller, said.interaction_id)
    elif said.interaction_id not in (None, claims.target):
        raise InvalidInput(
            f"interaction_id: {shown(said.interaction_id)} is not what the token is about; leave it out.", field="interaction_id"
        )
    require(claims, said.kind)
    if said.slot:
        require(claims, said.slot)
    text = FeedbackText(comment=said.comment, correction=said.correction)
    async with gateway.speaking.setdefault((claims.target, claims.subject), asyncio.Lock()):
        # Off the event loop: sealing may write a new person's key, and what they said so far is read from disk.
        standing, event, repeated = await asyncio.to_thread(hear, gateway, claims, said, body, key)
        if repeated is None:
            with metrics.COMMIT.labels("feedback").time():
                stored, durable = await gateway.give(event)
            standing = standing.after(stored, text)
        else:
            stored, durable = repeated, await gateway.stores.confirm([repeated])
    metrics.FEEDBACK.labels(said.kind).inc()
    reply = {"feedback_id": stored.event_id, "version": stored.stamp, "state": standing.shown(), "durable": durable}
    return JSONResponse(reply, headers={"Cache-Control": "no-store"})


def hear(
    gateway: Gateway, claims: Claims, said: Said, body: bytes, key: str | None
) -> tuple[Standing, FeedbackGiven | FeedbackCleared, FeedbackGiven | FeedbackCleared | None]:
    """What the person holds so far, the event of what they say now, and the earlier one where that is the same. Raises TooMany for
    news over their limits; a repetition counts under none, so a client may always ask again whether it was heard."""
    standing = gateway.standings.of(claims)
    gateway.stores.clock.observe(standing.newest)  # another gateway may have given that stamp; what is said now comes after it
    event = as_event(gateway, claims, said, body, key)
    text = FeedbackText(comment=said.comment, correction=said.correction)
    repeated = standing.repeated_by(event, text) if key is None else standing.earlier(event)
    if repeated is None:
        gateway.limits.feedback(claims.subject, claims.target)
    return standing, event, repeated


async def read(request: Request) -> JSONResponse:
    """`GET /v1/feedback`: what counts now, and what became of it."""
    gateway: Gateway = request.app.state.gateway
    caller = caller_of(request)
    claims = caller.claims
    if claims is None:
        claims = await asyncio.to_thread(claims_of_key, gateway, caller, request.query_params.get("interaction_id"))
    require(claims, "read")
    standing: Standing = await asyncio.to_thread(gateway.standings.of, claims)
    reply = {"state": standing.shown(), "as_of": standing.as_of, "became": standing.became}
    return JSONResponse(reply, headers={"Cache-Control": "no-store"})


def claims_of_key(gateway: Gateway, caller: Caller, interaction_id: str | None) -> Claims:
    """With an API key: what a token of this interaction would allow. Raises InvalidInput, or NotFound, also for an interaction that was
    asked for with another owner's key, or with none."""
    if interaction_id is None:
        raise InvalidInput("interaction_id: is missing; with an API key it says what is rated.", field="interaction_id")
    key = caller.key
    if key is None:  # feedback.auth is off: everybody speaks for everybody
        return gateway.standings.claims(interaction_id, OF_AN_ANSWER, lambda _: True)
    return gateway.standings.claims(interaction_id, OF_AN_ANSWER, lambda other: gateway.stores.api_keys.speaks_for(key, other))


def require(claims: Claims, action: Action) -> None:
    """Raises NotAllowed where the token does not allow this."""
    if action not in claims.actions:
        allowed = ", ".join(claims.actions)
        raise NotAllowed(f"kind: {action} is not possible on this {claims.target_kind}; its token allows {allowed}.", field="kind")


def as_event(gateway: Gateway, claims: Claims, said: Said, body: bytes, key: str | None) -> FeedbackGiven | FeedbackCleared:
    """The event of what was said. Its stamp, if any, is the client's `version`, which the log's clock advances past."""
    ids = gateway.stores.subjects.ids
    slot: Slot = said.slot if said.kind == "clear" and said.slot else said.kind  # type: ignore[assignment]  # every other kind is a slot
    event_id = ids.feedback(claims.tenant, claims.subject, slot, claims.target, body, key)
    idempotency = ids.idempotency(claims.tenant, claims.subject, key)
    if said.kind == "clear":
        return FeedbackCleared(
            event_id=event_id,
            stamp=said.version or 0,
            tenant=claims.tenant,
            target=claims.target,
            rater=claims.subject,
            slot=slot,
            idempotency=idempotency,
        )
    written = FeedbackText(comment=said.comment, correction=said.correction)
    return FeedbackGiven(
        event_id=event_id,
        stamp=said.version or 0,
        tenant=claims.tenant,
        target=claims.target,
        rater=claims.subject,
        slot=slot,
        value=said.value,
        reasons=tuple(said.reasons),
        source=claims.source,
        idempotency=idempotency,
        sealed=gateway.stores.subjects.seal((claims.subject,), written, create=False) if said.comment or said.correction else None,
    )
