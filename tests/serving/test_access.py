"""Who may use which route: every route against every credential, exactly as its declaration says."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from fastapi import FastAPI, Request, Response
from fastapi.routing import APIRoute
from serving_world import World, serve

from feedback.clock import wall_ms
from feedback.events import new_id
from feedback.keys import SCOPES
from feedback.tokens import Claims
from serving.access import access_table, document, operations
from serving.who import COOKIE

ROOT = Path(__file__).resolve().parents[2]
Credential = dict[str, str]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with serve(tmp_path_factory.mktemp("world")) as world:
        yield world


@pytest.fixture(scope="module")
def described(world: World) -> dict[str, Any]:
    found: dict[str, Any] = world.http.get("/openapi.json").json()
    return found


def undeclared(app: FastAPI) -> list[str]:
    """Routes that the document leaves out, or that do not say who may use them."""
    declared = {(method, path) for (method, path), each in operations(document(app)).items() if "security" in each}
    found = []
    for route in app.routes:
        ways = [(method, route.path_format) for method in route.methods] if isinstance(route, APIRoute) else [("any", str(route))]
        found += [f"{method} {path}" for method, path in ways if (method, path) not in declared]
    return found


def test_every_route_declares_who_may_use_it(world: World) -> None:
    assert undeclared(world.app) == []


def test_the_check_misses_no_undeclared_route() -> None:
    async def open_door(_: Request) -> Response:
        return Response()

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_api_route("/undeclared", open_door)
    app.add_api_route("/hidden", open_door, include_in_schema=False)
    app.add_route("/plain", open_door)
    assert len(undeclared(app)) == 3


def test_the_table_in_the_docs_is_the_documents(described: dict[str, Any]) -> None:
    assert access_table(described) in (ROOT / "docs" / "api.md").read_text()


def test_the_document_can_be_read_by_others(described: dict[str, Any]) -> None:
    def refs(part: object) -> Iterator[str]:
        if isinstance(part, dict):
            yield from (value for key, value in part.items() if key == "$ref")
            for value in part.values():
                yield from refs(value)
        elif isinstance(part, list):
            for value in part:
                yield from refs(value)

    schemas = described["components"]["schemas"]
    assert {ref.rpartition("/")[2] for ref in refs(described)} <= schemas.keys()
    asked = described["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert {"messages", "model", "compare"} <= asked["properties"].keys()
    assert described["components"]["securitySchemes"].keys() == {"api_key", "page_session", "feedback_token"}


def credentials(world: World) -> dict[str, Credential]:
    """What somebody may come with, by name."""

    def bearer(*scopes: Any, expires_ms: int | None = None, disabled: bool = False) -> Credential:
        key, secret = world.stores.api_keys.create("matrix", scopes, expires_ms=expires_ms)
        if disabled:
            world.stores.api_keys.disable(key.id)
        return {"Authorization": f"Bearer {secret}"}

    claims = Claims(target=new_id(), target_kind="interaction", interactions=("i",), subject="s", actions=("rating", "read"), expires=2**40)
    mint = world.stores.tokens.mint
    return {
        "no key": {},
        "not a key": {"Authorization": "Bearer sk-something"},
        "malformed": {"Authorization": "Bearer pl_x"},
        "basic": {"Authorization": "Basic eDp5"},
        "unknown": {"Authorization": f"Bearer pl_{'A' * 12}_{'B' * 32}"},
        **{f"key {scope}": bearer(scope) for scope in SCOPES},
        "all scopes": bearer(*SCOPES),
        "expired": bearer(*SCOPES, expires_ms=wall_ms() - 1),
        "disabled": bearer(*SCOPES, disabled=True),
        "session": {"Cookie": f"{COOKIE}={secrets.token_urlsafe(24)}"},
        "malformed session": {"Cookie": f"{COOKIE}=x"},
        "token": {"Authorization": f"Feedback {mint(claims)}"},
        "expired token": {"Authorization": f"Feedback {mint(claims.model_copy(update={'expires': 1}))}"},
        "another tenant's token": {"Authorization": f"Feedback {mint(claims.model_copy(update={'tenant': 'acme'}))}"},
        "malformed token": {"Authorization": "Feedback x"},
    }


def declared(security: list[dict[str, list[str]]], name: str) -> int | None:
    """The status that stops this credential at the door; None where the route lets it in. Written against the words of docs/api.md."""
    ways = {way: scopes for each in security for way, scopes in each.items()}
    if not ways:
        return None
    if "api_key" in ways:
        scope = ways["api_key"][0]
        changes = ("key adapters:write", "key adapters:promote", "key gates:override")
        if name in ("all scopes", f"key {scope}") or (scope == "adapters:read" and name in changes):
            return None
        if name.startswith("key "):
            return 403
    if name == "session" and "page_session" in ways:
        return None
    if name == "token" and "feedback_token" in ways:
        return None
    if name == "expired token" and "feedback_token" in ways:
        return 410
    return 401


def test_every_route_against_every_credential(world: World, described: dict[str, Any]) -> None:
    held, wrong = credentials(world), []
    with httpx2.Client(base_url=world.url, timeout=10) as client:
        for (method, path), operation in operations(described).items():
            for name, headers in held.items():
                address = re.sub(r"\{[a-z]+\}", "plaudit", path)
                status = client.request(method, address, headers=headers, content=b"not json").status_code
                stopped = status if status in (401, 403, 410) else None
                if stopped != declared(operation["security"], name):
                    wrong.append((method, path, name, status))
                client.cookies.clear()
    assert wrong == []


def test_a_key_with_origins_is_refused_to_other_pages(world: World) -> None:
    _, secret = world.stores.api_keys.create("web app", ("chat",), origins=("https://app.example",))
    headers = {"Authorization": f"Bearer {secret}"}
    assert world.http.get("/v1/models", headers=headers).status_code == 200
    assert world.http.get("/v1/models", headers=headers | {"Origin": "https://app.example"}).status_code == 200
    for other in ("https://evil.example", "null", "https://app.example.evil", "HTTPS://APP.EXAMPLE"):
        refused = world.http.get("/v1/models", headers=headers | {"Origin": other})
        assert refused.status_code == 403 and "https://app.example" in refused.json()["error"]["message"]


def test_a_session_rates_by_its_tokens_only(world: World) -> None:
    """Its cookie is no key: an id of somebody's answer must not be enough."""
    someone = world.chat("hi", user="ann").json()["plaudit"]["interaction_id"]
    session = {"Cookie": f"{COOKIE}={secrets.token_urlsafe(24)}", "Authorization": "Bearer anything"}
    body = {"kind": "rating", "value": "down", "interaction_id": someone}
    assert world.http.post("/v1/feedback", json=body, headers=session).status_code == 401
    assert world.http.get("/v1/feedback", params={"interaction_id": someone}, headers=session).status_code == 401
