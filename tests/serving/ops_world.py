"""Two gateways with a registry between them, each with a data folder of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
from pydantic import SecretStr
from serving_world import MODEL, echo

from benchmarks.gateway import listening
from deploy.config import PolicySettings, RolloutSettings
from deploy.engine import Scripted
from deploy.manifest import vllm_name
from deploy.registry import Registry
from deploy.schema import upgrade
from deploy.store import AdapterStore
from feedback.config import FeedbackSettings, RegistrySettings, Settings
from feedback.keys import Scope
from feedback.limits import UNLIMITED
from feedback.stores import Stores, open_stores
from serving.app import create_app
from serving.config import GatewaySettings, ServerSettings

MakeAdapter = Callable[[Path, Path, int], tuple[str, Path]]


@dataclass
class Instance:
    """One gateway, with a data folder and a connection of its own."""

    stores: Stores
    registry: Registry
    url: str
    http: httpx2.Client
    app: Any

    def ask(self, secret: str, method: str, path: str, **body: Any) -> httpx2.Response:
        headers = {"Authorization": f"Bearer {secret}"}
        said: dict[str, Any] = {"params": body} if method == "GET" else {"json": body}
        return self.http.request(method, f"/ops/v1{path}", headers=headers, **said)


@dataclass
class Two:
    """Two gateways on one registry, with a stable and two candidates."""

    gateways: list[Instance]
    adapters: list[str]
    secrets: dict[str, str]

    def key(self, owner: str, *scopes: Scope, person: bool = False) -> str:
        return self.gateways[0].stores.api_keys.create(owner, scopes, person=person)[1]

    def at_canary(self, number: int = 1) -> str:
        registry = self.gateways[0].registry
        epoch = registry.lease("controller", "test", 60)
        assert epoch is not None
        rollout = registry.begin_rollout(self.adapters[number], "controller", epoch).id
        registry.start_canary(rollout, 0.25, [], "controller", epoch)
        return rollout

    def awaiting(self, number: int = 1) -> str:
        rollout = self.at_canary(number)
        registry = self.gateways[0].registry
        registry.await_approval(rollout, [{"name": "wins", "verdict": "pass", "reason": "8 of 8"}], "won", "controller", 1)
        return rollout


@contextlib.contextmanager
def two_gateways(tmp_path: Path, database_url: str, made: list[tuple[str, Path]]) -> Iterator[Two]:
    """`made` lies in `tmp_path / "store"`; the first is stable, the next two are candidates, the others are in the store only."""
    with contextlib.ExitStack() as stack:
        gateways = []
        for number in (0, 1):
            feedback = FeedbackSettings(data_dir=tmp_path / f"data{number}")
            stores = open_stores(Settings(feedback=feedback, registry=RegistrySettings(url=SecretStr(database_url))), "gateway", upgrade)
            stack.callback(stores.close)
            registry = Registry(stores.engine, store=AdapterStore(str(tmp_path / "store"), feedback.data_dir / "adapters"))
            if number == 0:
                for adapter, path in made[:3]:
                    registry.register(adapter, path, "trainer")
                registry.start_with(made[0][0], "system")
            engine = Scripted(echo)
            engine.loaded.update({vllm_name(adapter): path for adapter, path in made})
            settings = GatewaySettings(
                server=ServerSettings(route_refresh_s=0.02),
                policy=PolicySettings(name=MODEL),
                feedback=feedback,
                limits=UNLIMITED,
                rollout=RolloutSettings(two_people=True),
            )
            app = create_app(stores, registry, engine, settings)
            url = stack.enter_context(listening(app))
            http = stack.enter_context(httpx2.Client(base_url=url, timeout=20, verify=False))
            gateways.append(Instance(stores, registry, url, http, app))
        keys = gateways[0].stores.api_keys
        secrets = {owner: keys.create(owner, ("adapters:promote", "chat"), person=True)[1] for owner in ("mara", "omar")}
        yield Two(gateways, [adapter for adapter, _ in made], secrets)
