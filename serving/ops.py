"""`/ops/v1`: the table of `deploy/operations.py` over HTTP, for operators' programs and the command line."""

from __future__ import annotations

import asyncio
from urllib.parse import unquote

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from pydantic_core import from_json, to_jsonable_python

from deploy.operations import OPERATIONS, PREFIX, Desk, Operation
from feedback.errors import InvalidInput
from feedback.events import Model
from serving.access import Handler, Taken, add_route, caller_of
from serving.openai_api import refusal
from serving.who import Access
from serving.wire import read_body


def add_operations(app: FastAPI, desk: Desk, max_body_bytes: int) -> None:
    """Register every operation. Its errors are problem details (`serving/errors.py`)."""
    for each in OPERATIONS:
        taken = Taken(each.asks, each.parts, each.gives)
        add_route(app, each.method, PREFIX + each.path, _handler(each, desk, max_body_bytes), Access(scope=each.scope), taken=taken)


def _handler(operation: Operation, desk: Desk, max_body_bytes: int) -> Handler:
    async def handle(request: Request) -> JSONResponse:
        asked = await _asked(operation, request, max_body_bytes)
        # In a thread: the registry's database may be far away, or a write waits for the one before it.
        done = await asyncio.to_thread(operation.run, desk, caller_of(request).key, asked)
        return JSONResponse(to_jsonable_python(done), headers={"Cache-Control": "no-store"})

    handle.__name__ = operation.run.__name__.lstrip("_")  # its title in the OpenAPI document
    return handle


async def _asked(operation: Operation, request: Request, max_body_bytes: int) -> Model:
    """What the request asks for. Raises InvalidInput and TooLarge."""
    try:
        body = b"" if operation.method == "GET" else await read_body(request, max_body_bytes)
        given = from_json(body) if body else dict(request.query_params)
        if not isinstance(given, dict):
            raise InvalidInput("The body is not a JSON object.")
        if twice := [name for name in operation.parts if name in given]:
            raise InvalidInput(f"{twice[0]}: stands in the path; leave it out here.", field=twice[0])
        return operation.asks.model_validate({**given, **{name: unquote(request.path_params[name]) for name in operation.parts}})
    except ValidationError as exc:
        raise refusal(exc) from exc
    except ValueError as exc:
        raise InvalidInput(f"The body is not JSON: {exc}.") from exc
