"""Who may use which route: declared once, where the route is registered, and enforced from that declaration.

In the OpenAPI document the declaration is the standard field `security`; docs/api.md shows it as a table, and a test compares the two.
"""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from serving.who import COOKIE, Access, Caller

Handler = Callable[..., Awaitable[Response]]
PUBLIC = Access()
REFERENCE = "#/components/schemas/{model}"


@dataclass(frozen=True)
class Taken:
    """What a handler parses its request as and what it gives, for the OpenAPI document alone."""

    asks: type[BaseModel]
    """The body of a POST, the query of a GET."""
    parts: tuple[str, ...] = ()
    """Fields of `asks` that stand in the path."""
    gives: type[BaseModel] | None = None


def add_route(app: FastAPI, method: str, path: str, handler: Handler, access: Access, *, taken: Taken | None = None) -> None:
    """Register a route. The handler runs only for requests that `access` lets in; `caller_of` says who they are from."""

    @functools.wraps(handler)
    async def guarded(request: Request, **parts: Any) -> Response:
        if access != PUBLIC:
            request.state.caller = request.app.state.gateway.doorman.let_in(request, access)
        return await handler(request, **parts)

    told: dict[str, Any] = {"security": _security(access)}
    if taken is not None:
        told |= _told(method, taken)
    app.add_api_route(path, guarded, methods=[method], openapi_extra=told)


def _told(method: str, taken: Taken) -> dict[str, Any]:
    """As OpenAPI says it. Definitions stay inside the schemas; `document` moves them."""
    schema = taken.asks.model_json_schema(ref_template=REFERENCE)
    fields, required = schema.pop("properties", {}), schema.pop("required", [])
    parts = [{"name": name, "in": "path", "required": True, "schema": fields.pop(name)} for name in taken.parts]
    required = [name for name in required if name in fields]
    told: dict[str, Any] = {}
    if method == "GET":
        parts += [{"name": name, "in": "query", "required": name in required, "schema": each} for name, each in fields.items()]
    elif fields:
        body = schema | {"properties": fields} | ({"required": required} if required else {})
        told["requestBody"] = {"required": True, "content": {"application/json": {"schema": body}}}
    if parts:
        told["parameters"] = parts
    if taken.gives is not None:
        schema = taken.gives.model_json_schema(ref_template=REFERENCE, mode="serialization")
        told["responses"] = {"200": {"description": "Done", "content": {"application/json": {"schema": schema}}}}
    return told


def _security(access: Access) -> list[dict[str, list[str]]]:
    """As OpenAPI says it: alternatives, each naming a scheme; an empty list for a public route."""
    ways: list[dict[str, list[str]]] = [{"api_key": [access.scope]}] if access.scope else []
    return ways + [{name: []} for name, opens in (("page_session", access.session), ("feedback_token", access.token)) if opens]


def caller_of(request: Request) -> Caller:
    """Who sent the request, on a route that is not public."""
    caller: Caller = request.state.caller
    return caller


SCHEMES = {
    "api_key": {"type": "http", "scheme": "bearer", "description": "Authorization: Bearer pl_..., a key with the scope that is named."},
    "page_session": {"type": "apiKey", "in": "cookie", "name": COOKIE, "description": "Given out by the chat page."},
    "feedback_token": {"type": "apiKey", "in": "header", "name": "Authorization", "description": "Authorization: Feedback <token>."},
}


def document(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document of all routes."""
    found = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    components = found.setdefault("components", {})
    components["securitySchemes"] = SCHEMES
    schemas = components.setdefault("schemas", {})
    for operation in operations(found).values():
        for said in (operation.get("requestBody", {}), operation["responses"]["200"]):
            schemas.update(said.get("content", {}).get("application/json", {}).get("schema", {}).pop("$defs", {}))
    return found


def operations(found: Mapping[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    """(method, path) -> operation of an OpenAPI document."""
    return {(method.upper(), path): each for path, item in found["paths"].items() for method, each in item.items()}


def access_table(found: Mapping[str, Any]) -> str:
    """Every route of an OpenAPI document and what opens it, as a Markdown table. Raises KeyError for a route that does not declare it."""
    lines = ["| route | API key's scope | page's session | feedback token |", "|---|---|---|---|"]
    for (method, path), operation in sorted(operations(found).items(), key=lambda each: each[0][::-1]):
        ways = {name: scopes for way in operation["security"] for name, scopes in way.items()}
        scope = f"`{ways['api_key'][0]}`" if "api_key" in ways else "" if ways else "public"
        marks = ["yes" if name in ways else "" for name in ("page_session", "feedback_token")]
        lines.append(f"| `{method} {path}` | {scope} | {marks[0]} | {marks[1]} |".replace("|  |", "| |").replace("|  |", "| |"))
    return "\n".join(lines)
