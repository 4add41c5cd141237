"""Which HTTP status each error becomes, in the shape of OpenAI's errors.

One table for JSON replies and for errors inside a stream; the messages are the ones that the errors were raised with.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from feedback.errors import (
    Conflict,
    EngineRefused,
    EngineUnavailable,
    Gone,
    IdempotencyMismatch,
    InvalidInput,
    NotAllowed,
    NotAuthenticated,
    NotDurable,
    NotFound,
    PlauditError,
    TooMany,
)
from serving import metrics


class TooLarge(InvalidInput):
    """The body is longer than `server.max_body_bytes`."""


class PromptTooLong(InvalidInput):
    """Prompt and answer do not fit into the policy's context."""


class Busy(PlauditError):
    """As many answers as `server.max_streams` allows are in flight."""


# The first class that fits decides, so a subclass stands before its parent.
STATUS: tuple[tuple[type[PlauditError], int, str, str], ...] = (
    (TooLarge, 413, "invalid_request_error", "body_too_large"),
    (PromptTooLong, 400, "invalid_request_error", "context_length_exceeded"),
    (IdempotencyMismatch, 422, "invalid_request_error", "idempotency_mismatch"),
    (InvalidInput, 400, "invalid_request_error", "invalid_value"),
    (EngineRefused, 400, "invalid_request_error", "refused_by_engine"),
    (NotAuthenticated, 401, "authentication_error", "not_authenticated"),
    (NotAllowed, 403, "permission_error", "not_allowed"),
    (TooMany, 429, "rate_limit_error", "rate_limit_exceeded"),
    (NotFound, 404, "invalid_request_error", "not_found"),
    (Conflict, 409, "conflict_error", "conflict"),
    (Gone, 410, "invalid_request_error", "gone"),
    (Busy, 503, "overloaded_error", "busy"),
    (NotDurable, 503, "server_error", "not_durable"),
    (EngineUnavailable, 503, "server_error", "engine_unavailable"),
    (PlauditError, 500, "server_error", "internal"),
)
RETRY_AFTER_S = 1


def status_of(error: PlauditError) -> int:
    """The HTTP status of an error."""
    return next(status for kind, status, _, _ in STATUS if isinstance(error, kind))


def body_of(error: PlauditError) -> dict[str, Any]:
    """The error in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`."""
    _, _, kind, code = next(row for row in STATUS if isinstance(error, row[0]))
    return {"error": {"message": error.message, "type": kind, "param": error.field, "code": code}}


def reply_of(error: PlauditError) -> JSONResponse:
    """The error as a reply; with Retry-After where coming back later helps."""
    status = status_of(error)
    metrics.REFUSED.labels(str(status)).inc()
    headers: dict[str, str] = {}
    if status in (429, 503):
        headers["Retry-After"] = str(error.retry_after_s or RETRY_AFTER_S)
    if isinstance(error, TooMany):
        headers |= {"RateLimit-Limit": str(error.limit), "RateLimit-Remaining": "0", "RateLimit-Reset": headers["Retry-After"]}
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(body_of(error), status, headers)


def install(app: FastAPI) -> None:
    """Every error that leaves a route becomes one clear reply, without a traceback."""

    async def ours(_: Request, exc: Exception) -> JSONResponse:
        assert isinstance(exc, PlauditError)
        return reply_of(exc)

    async def routing(request: Request, exc: Exception) -> JSONResponse:
        assert isinstance(exc, HTTPException)
        message = f"{request.method} {request.url.path}: {exc.detail}."
        code = str(exc.detail).lower().replace(" ", "_")
        body = {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": code}}
        return JSONResponse(body, exc.status_code, exc.headers)

    async def unforeseen(_: Request, exc: Exception) -> JSONResponse:
        # Starlette logs the traceback after this reply; the client learns nothing about our insides.
        return reply_of(PlauditError("The gateway made a mistake; it was logged. Please try again."))

    app.add_exception_handler(PlauditError, ours)
    app.add_exception_handler(HTTPException, routing)
    app.add_exception_handler(Exception, unforeseen)
