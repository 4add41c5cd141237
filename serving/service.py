"""Everything of one machine that needs no torch, in one process: gateway, controller, archive and the model server's agent."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import structlog
import uvicorn

from deploy.config import EngineSettings, GateSettings, RolloutSettings
from deploy.controller import Controller
from deploy.engine import VLLM, Engine, Scripted
from deploy.manifest import ManifestFields, base_digests, identity_adapter
from deploy.registry import Registry
from deploy.replica import Progress, ReplicaAgent, VllmServer
from deploy.rollout import Rollout
from feedback.errors import ConfigError, PlauditError
from feedback.stores import Stores
from serving.app import create_app
from serving.config import GatewaySettings

ARCHIVE_EVERY_S = 0.3
SYSTEM = "system"

log = structlog.get_logger()


class Service:
    """`plaudit up`: `prepare` once, then `run` until it is told to stop."""

    def __init__(
        self,
        stores: Stores,
        registry: Registry,
        gateway: GatewaySettings,
        engine: EngineSettings,
        rollout: RolloutSettings,
        gates: GateSettings,
    ) -> None:
        self.stores, self.registry, self.gateway = stores, registry, gateway
        self.engine_settings, self.rollout_settings, self.gate_settings = engine, rollout, gates
        self.data_dir = stores.settings.feedback.data_dir
        self.server: VllmServer | None = None
        self.engine: Engine | None = None

    def prepare(self, policy: Path) -> None:
        """Check the settings, make the identity adapter the first stable, choose the engine."""
        server, policy_settings = self.gateway.server, self.gateway.policy
        if not self.gateway.feedback.auth and server.host not in ("127.0.0.1", "::1", "localhost"):
            raise ConfigError(f"server.host is '{server.host}' while feedback.auth is off; set feedback.auth = true or listen on 127.0.0.1")
        if self.registry.alias("stable") is None:
            fields = ManifestFields(
                kind="identity",
                base_model=policy_settings.name,
                base=base_digests(policy),
                temperature=policy_settings.temperature,
                system_prompt=policy_settings.system_prompt,
                max_tokens=policy_settings.max_tokens,
            )
            adapter_id, path = identity_adapter(policy, self.data_dir / "adapters", fields, rank=self.engine_settings.max_lora_rank)
            self.registry.register(adapter_id, path, SYSTEM)
            self.registry.start_with(adapter_id, SYSTEM)
        if self.engine_settings.kind == "scripted":
            self.engine = Scripted(echo)
        elif self.engine_settings.url:
            self.engine = VLLM(self.engine_settings.url)
        else:
            folder = self.data_dir / "replica"
            self.server = VllmServer(policy, "base", self.engine_settings, folder, max_model_len=policy_settings.max_model_len)
            self.engine = VLLM(self.server.url)

    async def run(self, progress: Progress, ready: Callable[[str], None]) -> None:
        """Serve until SIGINT or SIGTERM. `ready` hears the address once stable is loaded."""
        assert self.engine is not None, "prepare first"
        held = asyncio.Event()
        loop = asyncio.get_running_loop()

        def report(names: set[str]) -> None:
            self.registry.report_held(self.server.url if self.server else self.engine_settings.url or "scripted", names)
            if self.registry.routing().stable.name in names:
                loop.call_soon_threadsafe(held.set)

        agent = ReplicaAgent(self.engine, self.server, self.registry.wanted, report, self.rollout_settings.drain_s)
        judge = Rollout(self.registry, self.stores.archive, self.engine, self.rollout_settings, self.gate_settings)
        app = create_app(self.stores, self.registry, self.engine, self.gateway)
        server = self.gateway.server
        http = uvicorn.Server(uvicorn.Config(app, host=server.host, port=server.port, log_level="warning", timeout_graceful_shutdown=5))
        tasks = [
            asyncio.create_task(agent.run(progress)),
            asyncio.create_task(Controller(judge, self.stores.log).run()),
            asyncio.create_task(self._archive()),
            asyncio.create_task(_announce(http, held, ready)),
        ]
        serving = asyncio.create_task(_serve(http))
        try:
            # The agent ends by itself only where the model server cannot be started at all.
            done, _ = await asyncio.wait([serving, tasks[0]], return_when=asyncio.FIRST_COMPLETED)
            http.should_exit = True
            await serving
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _archive(self) -> None:
        """Carry committed events into the archive, and forget what nobody rated in time."""
        expired_at = 0.0
        while True:
            try:
                await asyncio.to_thread(self.stores.ingest)
                if asyncio.get_running_loop().time() - expired_at > 3600:
                    await asyncio.to_thread(self.stores.expire)
                    expired_at = asyncio.get_running_loop().time()
            except PlauditError as error:
                log.warning("archive not written", reason=error.message)
            await asyncio.sleep(ARCHIVE_EVERY_S)


async def _serve(http: uvicorn.Server) -> None:
    """uvicorn exits the process where it cannot bind; here that is an error like others."""
    try:
        await http.serve()
    except SystemExit as exc:
        port = http.config.port
        raise ConfigError(f"server.port {port} on {http.config.host} cannot be listened on; is another process using it?") from exc


async def _announce(http: uvicorn.Server, held: asyncio.Event, ready: Callable[[str], None]) -> None:
    await held.wait()
    while not http.started:
        await asyncio.sleep(0.05)
    host, port = http.servers[0].sockets[0].getsockname()[:2]
    ready(f"http://{host}:{port}")


def echo(name: str, messages: Sequence[Mapping[str, Any]]) -> str:
    """What the scripted engine says."""
    return f"You said: {messages[-1]['content']}"
