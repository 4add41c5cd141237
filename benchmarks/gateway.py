"""A real gateway on loopback for benchmarks: real stores, the scripted engine, no model server."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import uvicorn
from fastapi import FastAPI

from deploy.config import PolicySettings
from deploy.engine import Scripted
from deploy.registry import Registry
from deploy.routing import AdapterRef, RoutingTable
from feedback.config import FeedbackSettings, LimitSettings, Settings
from feedback.errors import EngineUnavailable
from feedback.limits import UNLIMITED
from feedback.stores import Stores, open_stores
from serving.app import create_app
from serving.config import GatewaySettings

MODEL = "plaudit"
STABLE = AdapterRef(adapter="a" * 64, temperature=0.7)
START_S = 10.0


class FixedRoutes:
    """The one thing that a gateway asks of the registry: everybody is answered by one adapter."""

    def routing(self) -> RoutingTable:
        return RoutingTable(version=1, stable=STABLE)


@dataclass
class Running:
    """A gateway that listens."""

    url: str
    stores: Stores
    app: Any


@contextlib.contextmanager
def gateway(data_dir: Path, *, limits: LimitSettings = UNLIMITED, token_s: float = 0.0) -> Iterator[Running]:
    """One more gateway over this data folder, in a thread of this process."""
    feedback = FeedbackSettings(data_dir=data_dir)
    stores = open_stores(Settings(feedback=feedback))
    engine = Scripted(echo, token_s=token_s)
    engine.loaded[STABLE.name] = data_dir
    settings = GatewaySettings(policy=PolicySettings(name=MODEL), feedback=feedback, limits=limits)
    app = create_app(stores, cast(Registry, FixedRoutes()), engine, settings)
    try:
        with listening(app) as url:
            yield Running(url, stores, app)
    finally:
        stores.close()


@contextlib.contextmanager
def listening(app: FastAPI) -> Iterator[str]:
    """A gateway's app on a free port, served by uvicorn in a thread of this process; its address."""
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="critical"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        end = time.monotonic() + START_S
        while not server.started:
            if time.monotonic() > end or not thread.is_alive():
                raise EngineUnavailable(f"the gateway did not start within {START_S:g} s")
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(START_S)


def echo(name: str, messages: Sequence[Mapping[str, Any]]) -> str:
    """What the scripted engine says."""
    return f"heard {messages[-1]['content']}"
