"""A gateway over real stores and the scripted engine, served by a real uvicorn on a free port."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
from sqlalchemy import Engine as Database
from waiting import until

from benchmarks.gateway import listening
from deploy.config import PolicySettings
from deploy.engine import Engine, Scripted
from deploy.registry import Registry
from deploy.routing import AdapterRef, RoutingTable
from feedback.config import FeedbackSettings, LimitSettings, Settings
from feedback.errors import NotFound
from feedback.events import Event, InteractionFinished, InteractionStarted
from feedback.limits import UNLIMITED
from feedback.partitions import SqliteLogs
from feedback.stores import Stores, open_stores
from serving.app import create_app
from serving.config import ComparisonSettings, GatewaySettings, RecordSettings, ServerSettings

STABLE = AdapterRef(adapter="a" * 64, temperature=0.7)
CANARY = AdapterRef(adapter="c" * 64, temperature=0.7)
MODEL = "plaudit"
NAMES = (STABLE.name, CANARY.name, RoutingTable(version=1, stable=STABLE, rollout="rollout-7").baseline_name or "")


class Routes(Registry):
    """An empty registry whose routing table tests change or make fail."""

    def __init__(self, engine: Database) -> None:
        super().__init__(engine)
        self.table = RoutingTable(version=1, stable=STABLE)
        self.broken = False

    def routing(self) -> RoutingTable:
        if self.broken:
            raise NotFound("the registry's database is away")
        return self.table

    def with_canary(self, weight: float = 0.5) -> None:
        self.table = RoutingTable(version=2, stable=STABLE, canary=CANARY, rollout="rollout-7", weight=weight, salt="s")


def echo(name: str, messages: Sequence[Mapping[str, Any]]) -> str:
    """Says which words came last, and which adapter says so."""
    voice = "new" if name.startswith("a-cccc") else "old"
    return f"{voice} heard {messages[-1]['content']}"


@dataclass
class World:
    """A running gateway and all it stands on."""

    url: str
    engine: Any
    """`Scripted`, unless the test brings another."""
    stores: Stores
    routes: Routes
    data_dir: Path
    secret: str
    app: Any
    http: httpx2.Client
    """Without a key; used again and again, because making one is slow."""
    seen: int = 0
    """Events of earlier tests, which `events` leaves out."""

    def fresh(self) -> World:
        """As if just started, for the next test."""
        self.engine.up = True
        self.engine.loaded.update(dict.fromkeys(NAMES, self.data_dir / "adapter"))
        self.routes.broken = False
        self.routes.table = RoutingTable(version=1, stable=STABLE)
        route = self.app.state.gateway.route
        until(lambda: route.fresh and route.current().version == 1)
        until(lambda: not self.app.state.gateway.tasks)
        self.seen += len(self.events())
        return self

    def client(self) -> httpx2.Client:
        """A client with the world's API key."""
        headers = {"Authorization": f"Bearer {self.secret}"}
        return httpx2.Client(base_url=self.url, headers=headers, timeout=10, verify=False)

    def chat(self, text: str = "hello", **fields: Any) -> httpx2.Response:
        body = {"model": MODEL, "messages": [{"role": "user", "content": text}], **fields}
        return self.http.post("/v1/chat/completions", json=body, headers={"Authorization": f"Bearer {self.secret}"})

    def feedback(self, token: str, body: object, **headers: str) -> httpx2.Response:
        return self.http.post("/v1/feedback", json=body, headers={"Authorization": f"Feedback {token}", **headers})

    def state(self, token: str) -> httpx2.Response:
        return self.http.get("/v1/feedback", headers={"Authorization": f"Feedback {token}"})

    def events(self) -> list[Event]:
        """Everything that this test has committed, in the order of commit."""
        records = SqliteLogs(self.data_dir / "log").read({}, 1_000_000)
        return [record.event for record in records if record.event is not None][self.seen :]

    def started(self) -> list[InteractionStarted]:
        return [event for event in self.events() if isinstance(event, InteractionStarted)]

    def finished(self) -> list[InteractionFinished]:
        return [event for event in self.events() if isinstance(event, InteractionFinished)]


@contextlib.contextmanager
def serve(
    data_dir: Path,
    *,
    engine: Engine | None = None,
    server: ServerSettings | None = None,
    record: RecordSettings | None = None,
    auth: bool = True,
    system_prompt: str | None = None,
    max_tokens: int = 64,
    limits: LimitSettings | None = None,
) -> Iterator[World]:
    """A running world."""
    feedback = FeedbackSettings(data_dir=data_dir, auth=auth)
    stores = open_stores(Settings(feedback=feedback))
    _, secret = stores.api_keys.create("tests", ("chat", "feedback"))
    engine = engine or Scripted(echo)
    adapter = data_dir / "adapter"
    adapter.mkdir(exist_ok=True)
    (adapter / "adapter_config.json").write_text("{}")
    if isinstance(engine, Scripted):
        engine.loaded.update(dict.fromkeys(NAMES, adapter))
    routes = Routes(stores.engine)
    settings = GatewaySettings(
        server=server or ServerSettings(route_refresh_s=0.02, route_max_age_s=0.3),
        record=record or RecordSettings(),
        comparison=ComparisonSettings(page_share=0),
        policy=PolicySettings(name=MODEL, system_prompt=system_prompt, max_tokens=max_tokens, max_model_len=512),
        feedback=feedback,
        limits=limits or UNLIMITED,
    )
    app = create_app(stores, routes, engine, settings)
    try:
        with listening(app) as url, httpx2.Client(base_url=url, timeout=10, verify=False) as http:
            yield World(url, engine, stores, routes, data_dir, secret, app, http)
    finally:
        stores.close()


def sse(text: str) -> list[Any]:
    """The data of a stream's events; `[DONE]` as it stands."""
    parts = [part.removeprefix("data: ") for part in text.split("\n\n") if part]
    return [part if part == "[DONE]" else json.loads(part) for part in parts]


def said(events: Sequence[Any], index: int = 0) -> str:
    """The text of one choice in a stream."""
    choices = [choice for event in events if event != "[DONE]" for choice in event.get("choices", []) if choice["index"] == index]
    return "".join(choice["delta"].get("content") or "" for choice in choices)
