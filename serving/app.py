"""The gateway as an ASGI application: routes, lifespan, health. Nothing durable hangs on its shutdown."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import json
import re
import shutil
from collections.abc import AsyncIterator
from importlib import resources
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.middleware.cors import CORSMiddleware

from deploy.engine import Engine
from deploy.operations import Desk
from deploy.registry import Registry
from feedback.errors import NotDurable
from feedback.limits import InFlight, Limits
from feedback.stores import Stores
from serving import consent, errors
from serving.access import PUBLIC, Taken, add_route, document
from serving.chat import Gateway, chat, check_model
from serving.config import GatewaySettings
from serving.metrics import DEAD_LETTERS, RELAY_PENDING
from serving.openai_api import ChatRequest
from serving.ops import add_operations
from serving.rating import REASONS, Said, give, read
from serving.record import Recorder
from serving.route import RouteWatch
from serving.standing import Standings
from serving.who import Access, Doorman, give_session

DRAIN_S = 5.0
"""How long a shutdown waits for answers in flight to record how far they came."""


def create_app(stores: Stores, registry: Registry, engine: Engine, settings: GatewaySettings) -> FastAPI:
    """The gateway over these stores. The caller closes `stores`; `engine` is closed at shutdown."""
    server = settings.server
    route = RouteWatch(registry.routing, server.route_refresh_s, server.route_max_age_s)
    doorman = Doorman(stores, settings)
    recorder = Recorder(stores.log, stores.subjects, settings.record.recording)
    standings = Standings(stores.archive, stores.logs, stores.subjects, settings.feedback.tenant, settings.feedback.token_expiry_s)
    limits = Limits(settings.feedback.data_dir / "limits.sqlite", settings.limits)
    gateway = Gateway(settings, engine, stores, route, doorman, recorder, standings, limits, InFlight(settings.limits))

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await route.refresh()
        watching = asyncio.create_task(route.run())
        try:
            yield
        finally:
            watching.cancel()
            if gateway.tasks:
                await asyncio.wait(gateway.tasks, timeout=DRAIN_S)
            limits.close()
            await engine.close()  # here, because its connections belong to this event loop

    app = FastAPI(title="Plaudit", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.gateway = gateway
    errors.install(app)
    if server.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(server.allowed_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type", "Idempotency-Key"],
            expose_headers=["Plaudit-Feedback-Token", "Plaudit-Recorded", "Retry-After", "RateLimit-Limit", "RateLimit-Remaining"],
        )
    add_route(app, "POST", "/v1/chat/completions", chat, Access(scope="chat", session=True), taken=Taken(ChatRequest))
    add_route(app, "GET", "/v1/models", models, Access(scope="chat", session=True))
    add_route(app, "GET", "/v1/models/{name:path}", model, Access(scope="chat", session=True))
    add_route(app, "POST", "/v1/feedback", give, Access(scope="feedback", token=True), taken=Taken(Said))
    add_route(app, "GET", "/v1/feedback", read, Access(scope="feedback", token=True))
    person = Access(scope="erase", session=True, token=True)
    add_route(app, "POST", "/v1/people/erase", consent.erase, person, taken=Taken(consent.Wish))
    add_route(app, "POST", "/v1/people/withdraw", consent.withdraw, person, taken=Taken(consent.Wish))
    add_operations(app, Desk(registry, stores.engine, settings.rollout), server.max_body_bytes)
    add_route(app, "GET", "/livez", live, PUBLIC)
    add_route(app, "GET", "/readyz", ready, PUBLIC)
    add_route(app, "GET", "/metrics", measured, PUBLIC)
    add_route(app, "GET", "/openapi.json", described, PUBLIC)
    if server.page:
        app.state.page = Page(settings)
        add_route(app, "GET", "/", page, PUBLIC)
    app.state.described = document(app)
    return app


async def models(request: Request) -> JSONResponse:
    """`GET /v1/models`: the one name that clients ask for."""
    return JSONResponse({"object": "list", "data": [_served(request)]})


async def model(request: Request, name: str) -> JSONResponse:
    """`GET /v1/models/{name}`. Raises NotFound where clients ask for another one."""
    served = _served(request)
    check_model(name, served["id"])
    return JSONResponse(served)


def _served(request: Request) -> dict[str, Any]:
    gateway: Gateway = request.app.state.gateway
    return {"id": gateway.settings.policy.name, "object": "model", "created": 0, "owned_by": "plaudit"}


async def live(request: Request) -> Response:
    """`GET /livez`: the process answers."""
    return Response("ok\n", media_type="text/plain")


async def ready(request: Request) -> JSONResponse:
    """`GET /readyz`: 200 when a chat would be answered and recorded now, else 503 with what is missing."""
    gateway: Gateway = request.app.state.gateway
    missing = {}
    if not gateway.route.fresh:
        missing["routing"] = gateway.route.problem or "the routing table is too old"
    if not await gateway.engine.ready():
        missing["engine"] = "the model server does not answer"
    if gateway.settings.record.recording == "required":
        try:
            await gateway.stores.log.append([])
        except NotDurable as error:
            missing["log"] = error.message
        # A small write may still fit into space that the log has already, where a long answer does not.
        free, needed = shutil.disk_usage(gateway.settings.feedback.data_dir).free, 4 * gateway.settings.server.max_body_bytes
        if free < needed:
            missing["disk"] = f"{free} bytes are free in feedback.data_dir, fewer than {needed}, room for a few of the largest requests"
    return JSONResponse({"ready": not missing, "missing": missing}, 503 if missing else 200)


async def measured(request: Request) -> Response:
    """`GET /metrics` for Prometheus."""
    stores: Stores = request.app.state.gateway.stores
    if stores.relay is not None:
        with contextlib.suppress(NotDurable):  # a partition that cannot be read is told by the relay
            RELAY_PENDING.set(await asyncio.to_thread(stores.relay.pending))
            DEAD_LETTERS.set(await asyncio.to_thread(stores.relay.dead_letters))
    return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)


async def described(request: Request) -> JSONResponse:
    """`GET /openapi.json`: every route, what it takes and who may use it."""
    return JSONResponse(request.app.state.described)


class Page:
    """The chat page: one file, allowed to run exactly the script and the style that it came with."""

    def __init__(self, settings: GatewaySettings) -> None:
        told = {
            "model": settings.policy.name,
            "compare": settings.comparison.page_share if settings.comparison.enabled else 0,
            "reasons": REASONS,
            "keep_days": settings.feedback.unrated_expiry_days,
        }
        source = resources.files("serving.page").joinpath("index.html").read_text("utf-8")
        # `<` would let a setting end the element that it stands in.
        self.html = source.replace("__SETTINGS__", json.dumps(told).replace("<", "\\u003c"))
        script, style = (self._hashes(self.html, tag) for tag in ("script", "style"))
        self.policy = (
            f"default-src 'none'; script-src {script}; style-src {style}; connect-src 'self'; img-src data:; "
            "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )

    @staticmethod
    def _hashes(html: str, tag: str) -> str:
        """The CSP sources of all inline elements of this tag."""
        found = re.findall(rf"<{tag}[^>]*>(.*?)</{tag}>", html, re.DOTALL)
        return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in found)


async def page(request: Request) -> HTMLResponse:
    """`GET /`: the chat page, and a session for whoever opens it."""
    shown: Page = request.app.state.page
    headers = {
        "Content-Security-Policy": shown.policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-store",
    }
    response = HTMLResponse(shown.html, headers=headers)
    give_session(request, response)
    return response
