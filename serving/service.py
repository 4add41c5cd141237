"""Everything of one machine that needs no torch, in one process: gateway, controller, archive and the model server's agent."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import structlog
import uvicorn

from deploy import lineage
from deploy.address import announcing
from deploy.config import EngineSettings, GateSettings, RolloutSettings, WebhookSettings
from deploy.controller import Controller
from deploy.engine import VLLM, Engine, Scripted
from deploy.loading import Intake
from deploy.manifest import ManifestFields, base_config, base_digests, identity_adapter
from deploy.registry import Registry
from deploy.replica import Progress, ReplicaAgent, VllmServer
from deploy.rollout import Rollout
from deploy.signing import Signatures
from deploy.webhooks import Deliveries, Webhooks
from feedback.errors import ConfigError, PlauditError
from feedback.stores import Stores
from serving.app import create_app
from serving.config import KEEP_ALIVE_S, GatewaySettings

ARCHIVE_EVERY_S = 0.3
ERASURES_EVERY_S = 10.0
"""How often to look for erasures that broke off or came from another machine."""
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
        webhooks: WebhookSettings,
    ) -> None:
        self.stores, self.registry, self.gateway = stores, registry, gateway
        self.engine_settings, self.rollout_settings, self.gate_settings, self.webhook_settings = engine, rollout, gates, webhooks
        self.data_dir = stores.settings.feedback.data_dir
        self.server: VllmServer | None = None
        self.engine: Engine | None = None
        self.intake: Intake | None = None

    def prepare(self, policy: Path) -> None:
        """Check the settings, make the identity adapter the first stable, choose the engine."""
        server, policy_settings = self.gateway.server, self.gateway.policy
        if not self.gateway.feedback.auth and server.host not in ("127.0.0.1", "::1", "localhost"):
            raise ConfigError(f"server.host is '{server.host}' while feedback.auth is off; set feedback.auth = true or listen on 127.0.0.1")
        self.stores.start_reading()
        stable, base = self.registry.alias("stable"), base_digests(policy)
        if stable is None:
            fields = ManifestFields(
                kind="identity",
                base_model=policy_settings.name,
                base=base,
                temperature=policy_settings.temperature,
                system_prompt=policy_settings.system_prompt,
                max_tokens=policy_settings.max_tokens,
            )
            adapter_id, path = identity_adapter(policy, self.data_dir / "adapters", fields, rank=self.engine_settings.max_lora_rank)
            self.registry.register(adapter_id, path, SYSTEM)
            self.registry.start_with(adapter_id, SYSTEM)
        elif self.registry.adapter(stable).manifest.base != base:
            told = f"policy.base is {policy}, but the adapters in {self.data_dir} belong to another model"
            raise ConfigError(f"{told}; set it back, or choose a new feedback.data_dir", field="policy.base")
        key = self.engine_settings.adapter_public_key
        self.intake = Intake(
            self.data_dir / "replica" / "adapters",
            base,
            base_config(policy),
            self.engine_settings.max_lora_rank,
            Signatures(key) if key else None,
        )
        if self.engine_settings.kind == "scripted":
            self.engine = Scripted(echo)
        elif self.engine_settings.url:
            self.engine = VLLM(self.engine_settings.url)
        else:
            folder = self.data_dir / "replica"
            self.server = VllmServer(policy, "base", self.engine_settings, folder, max_model_len=policy_settings.max_model_len)
            self.engine = VLLM(self.server.url)

    async def run(self, progress: Progress, ready: Callable[[str], None]) -> int:
        """Serve until SIGINT or SIGTERM; returns the exit status. `ready` hears the address once stable is loaded."""
        assert self.engine is not None and self.intake is not None, "prepare first"
        held = asyncio.Event()
        loop = asyncio.get_running_loop()

        def report(names: set[str]) -> None:
            self.registry.report_held(self.server.url if self.server else self.engine_settings.url or "scripted", names)
            if self.registry.routing().stable.name in names:
                loop.call_soon_threadsafe(held.set)

        agent = ReplicaAgent(self.engine, self.server, self.registry.wanted, report, self.rollout_settings.drain_s, self.intake)
        stores = self.stores
        judge = Rollout(
            self.registry,
            stores.archive,
            self.engine,
            self.rollout_settings,
            self.gate_settings,
            stores.subjects,
            stores.logs.last_stamp,
        )
        app = create_app(self.stores, self.registry, self.engine, self.gateway)
        listener = listen(self.gateway.server.host, self.gateway.server.port)
        http = _Http(uvicorn.Config(app, log_level="warning", timeout_keep_alive=KEEP_ALIVE_S, timeout_graceful_shutdown=5))
        tasks = [
            asyncio.create_task(agent.run(progress)),
            asyncio.create_task(Controller(judge, self.stores.log).run()),
            asyncio.create_task(self._archive()),
            asyncio.create_task(_announce(listener, held, ready)),
        ]
        if self.webhook_settings.endpoints:
            deliveries = Deliveries(stores.engine, self.gateway.feedback.tenant)
            tasks.append(asyncio.create_task(Webhooks(deliveries, self.webhook_settings).run()))
        serving = asyncio.create_task(http.serve([listener]))
        with announcing(self.data_dir, *listener.getsockname()[:2]):
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
        return http.status

    async def _archive(self) -> None:
        """Carry committed events into the archive, and forget what nobody rated in time."""
        erased_at, expired_at, said = 0.0, 0.0, ""
        while True:
            try:
                await asyncio.to_thread(self.stores.ingest)
                if asyncio.get_running_loop().time() - erased_at > ERASURES_EVERY_S:
                    await asyncio.to_thread(lineage.finish, self.stores, self.registry, self.gateway.erasure)
                    erased_at = asyncio.get_running_loop().time()
                if asyncio.get_running_loop().time() - expired_at > 3600:
                    await asyncio.to_thread(self.stores.expire)
                    expired_at = asyncio.get_running_loop().time()
                said = ""
            except PlauditError as error:
                if error.message != said:  # a failure that lasts is told once: on a full disk the log would grow by itself
                    log.warning("archive not written", reason=error.message)
                    said = error.message
            await asyncio.sleep(ARCHIVE_EVERY_S)


class _Http(uvicorn.Server):
    """uvicorn that remembers which signal ended it, instead of raising it again while everything else is still ending.

    A second signal changes nothing: what is still to be done is bounded in time."""

    status = 1
    """The exit status: 128 and the signal's number, as shells count."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, self.handle_exit, number, None)
        yield

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.status, self.should_exit = 128 + sig, True


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises ConfigError where another process has the port or the address is not this machine's."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as exc:
        taken = f"server.port is {port}, which cannot be listened on at server.host {host} ({exc.strerror})"
        raise ConfigError(f"{taken}; choose another one, or 0 for a free one", field="server.port") from exc


async def _announce(listener: socket.socket, held: asyncio.Event, ready: Callable[[str], None]) -> None:
    host, port = listener.getsockname()[:2]
    await held.wait()
    ready(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")


def echo(name: str, messages: Sequence[Mapping[str, Any]]) -> str:
    """What the scripted engine says."""
    return f"You said: {messages[-1]['content']}"
