"""Which HTTP status each error becomes, in the shape of OpenAI's errors, and for operators as problem details (RFC 9457).

One table for JSON replies and for errors inside a stream; the messages are the ones that the errors were raised with.
"""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from deploy.operations import PREFIX
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
    PromotionRefused,
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
    (PromotionRefused, 409, "conflict_error", "promotion_refused"),
    (Gone, 410, "invalid_request_error", "gone"),
    (Busy, 503, "overloaded_error", "busy"),
    (NotDurable, 503, "server_error", "not_durable"),
    (EngineUnavailable, 503, "server_error", "engine_unavailable"),
    (PlauditError, 500, "server_error", "internal"),
)
RETRY_AFTER_S = 1
PROBLEM_JSON = "application/problem+json"
PROBLEM = "urn:plaudit:"
"""Before the code in a problem's `type`."""


def status_of(error: PlauditError) -> int:
    """The HTTP status of an error."""
    return next(status for kind, status, _, _ in STATUS if isinstance(error, kind))


def body_of(error: PlauditError) -> dict[str, Any]:
    """The error in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`."""
    _, _, kind, code = next(row for row in STATUS if isinstance(error, row[0]))
    return {"error": {"message": error.message, "type": kind, "param": error.field, "code": code}}


def problem_of(error: PlauditError) -> dict[str, Any]:
    """The error as problem details; `field` is ours."""
    _, status, _, code = next(row for row in STATUS if isinstance(error, row[0]))
    return _problem(status, code, error.message) | ({"field": error.field} if error.field else {})


def error_of(problem: Mapping[str, Any]) -> PlauditError:
    """The error that `problem_of` described, for clients of ours."""
    code, detail, field = (problem.get(name) for name in ("type", "detail", "field"))
    kind = next((row[0] for row in STATUS if f"{PROBLEM}{row[3]}" == code and row[0] is not TooMany), PlauditError)
    return kind(str(detail), field=field if isinstance(field, str) else None)


def _problem(status: int, code: str, message: str) -> dict[str, Any]:
    return {"type": f"{PROBLEM}{code}", "title": HTTPStatus(status).phrase, "status": status, "detail": message}


def reply_of(error: PlauditError, *, operator: bool = False) -> JSONResponse:
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
    if operator:
        return JSONResponse(problem_of(error), status, headers, media_type=PROBLEM_JSON)
    return JSONResponse(body_of(error), status, headers)


def install(app: FastAPI) -> None:
    """Every error that leaves a route becomes one clear reply, without a traceback."""

    def of_operator(request: Request) -> bool:
        return request.url.path.startswith(f"{PREFIX}/")

    async def ours(request: Request, exc: Exception) -> JSONResponse:
        assert isinstance(exc, PlauditError)
        return reply_of(exc, operator=of_operator(request))

    async def routing(request: Request, exc: Exception) -> JSONResponse:
        assert isinstance(exc, HTTPException)
        message = f"{request.method} {request.url.path}: {exc.detail}."
        code = str(exc.detail).lower().replace(" ", "_")
        if of_operator(request):
            return JSONResponse(_problem(exc.status_code, code, message), exc.status_code, exc.headers, media_type=PROBLEM_JSON)
        body = {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": code}}
        return JSONResponse(body, exc.status_code, exc.headers)

    async def unforeseen(request: Request, exc: Exception) -> JSONResponse:
        # Starlette logs the traceback after this reply; the client learns nothing about our insides.
        mistake = PlauditError("The gateway made a mistake; it was logged. Please try again.")
        return reply_of(mistake, operator=of_operator(request))

    app.add_exception_handler(PlauditError, ours)
    app.add_exception_handler(HTTPException, routing)
    app.add_exception_handler(Exception, unforeseen)
