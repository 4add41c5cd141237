"""Processes to be killed, paused and started again: gateways over one data folder, and whatever else a benchmark runs beside them.

They are forked off a server that has imported everything already, so that one starts in a fraction of a second. A child ends with the
process that started it.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import uvicorn
from pydantic import JsonValue

from benchmarks import planted
from deploy.config import PolicySettings
from deploy.engine import VLLM, Answers, Engine, Scripted
from deploy.manifest import ManifestFields, base_digests, identity_adapter
from deploy.registry import Registry
from examples.concierge.world import POLICY
from feedback.config import FeedbackSettings, Settings
from feedback.errors import NotDurable
from feedback.limits import UNLIMITED
from feedback.stores import open_stores
from serving.app import create_app
from serving.chat import Gateway
from serving.config import KEEP_ALIVE_S, ComparisonSettings, GatewaySettings, ServerSettings

MODEL = "plaudit"
START_S, STOP_S = 30.0, 10.0
CONTEXT = multiprocessing.get_context("forkserver")
# A child imports its main module again, so what the benchmarks import is in the list too.
CONTEXT.set_forkserver_preload(["benchmarks.harness", "benchmarks.load", "feedback.snapshot", "pyarrow.parquet", "kafka"])


def echo(name: str, messages: Sequence[Mapping[str, Any]]) -> str:
    """Which adapter says it, and what it was asked: no two answers are the same."""
    return f"{name} heard {messages[-1]['content']} and has this to say about it"


@dataclass(frozen=True)
class Spec:
    """What a gateway is started with."""

    data_dir: Path
    name: str
    """Of its partition."""
    bug: str | None = None
    """One of `planted.BUGS`."""
    token_s: float = 0.002
    """How long the scripted engine takes for a word."""
    answers: Answers = echo
    """What the scripted engine says."""
    engine_url: str | None = None
    """A model server in the scripted engine's place."""
    change: Callable[[Gateway], None] | None = None
    """What is done to the gateway before it serves."""
    server: ServerSettings = field(default_factory=partial(ServerSettings, route_refresh_s=0.05))


class Child:
    """A process that runs `work(connection, *arguments)`, sends one thing when it is ready, and is ended by signals only."""

    def __init__(self, out: Path, work: Callable[..., None], *arguments: Any) -> None:
        self._out, self._work, self._arguments = out, work, arguments
        self._process: Any = None
        self._ready: Any = None
        self.told: Any = None
        """What it sent when it was ready."""

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.is_alive()

    def start(self) -> None:
        """Returns once it is ready. Raises NotDurable where it ends instead."""
        self.launch()
        self.wait()

    def launch(self) -> None:
        """Start it, and do not wait."""
        self._ready, theirs = CONTEXT.Pipe()
        self._process = CONTEXT.Process(target=_run, args=(self._out, self._work, theirs, *self._arguments))
        self._process.start()
        theirs.close()

    def wait(self) -> None:
        """Until it is ready."""
        with contextlib.suppress(EOFError):
            if self._ready.poll(START_S):
                self.told = self._ready.recv()
                return
        self.kill()
        raise NotDurable(f"a process did not start: {self._out.read_text()[-800:] if self._out.exists() else ''}")

    def kill(self) -> None:
        """kill -9, and wait until it is gone."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process.close()
            self._process = None

    def stop(self) -> None:
        """SIGTERM, and wait: what it was doing is done."""
        if self._process is not None:
            self._process.terminate()
            self._process.join(STOP_S)
            self.kill()

    def restart(self) -> None:
        self.stop()
        self.start()

    def signal(self, number: signal.Signals) -> None:
        """Pause it with SIGSTOP, let it go on with SIGCONT."""
        if self._process is not None:
            os.kill(self._process.pid, number)


class GatewayProcess(Child):
    """One gateway. It keeps its port over restarts; `clock_ms` moves its wall clock, also while it runs."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.clock_ms = CONTEXT.Value("q", 0)
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        super().__init__(spec.data_dir / f"{spec.name}.out", _serve, spec, self.port, self.clock_ms)


def _run(out: Path, work: Callable[..., None], connection: Connection, *arguments: Any) -> None:
    with out.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    work(connection, *arguments)


class Every(dict[str, Path]):
    """Adapters of a model server that holds whatever it is asked for."""

    def __contains__(self, name: object) -> bool:
        return True


def gateway_settings(feedback: FeedbackSettings, server: ServerSettings) -> GatewaySettings:
    return GatewaySettings(
        server=server,
        comparison=ComparisonSettings(page_share=0),
        policy=PolicySettings(name=MODEL),
        feedback=feedback,
        limits=UNLIMITED,
    )


def _serve(ready: Connection, spec: Spec, port: int, clock_ms: Any) -> None:
    _move_clock(clock_ms)
    bug = planted.BUGS[spec.bug] if spec.bug else planted.Bug()
    feedback = FeedbackSettings(data_dir=spec.data_dir)
    stores = open_stores(Settings(feedback=feedback), spec.name)
    bug.stores(stores)
    app = create_app(stores, Registry(stores.engine), _engine(spec), gateway_settings(feedback, spec.server))
    bug.gateway(app.state.gateway)
    if spec.change is not None:
        spec.change(app.state.gateway)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_keep_alive=KEEP_ALIVE_S, timeout_graceful_shutdown=1))

    async def run() -> None:
        serving = asyncio.create_task(server.serve([socket.create_server(("127.0.0.1", port))]))
        while not server.started and not serving.done():
            await asyncio.sleep(0.005)
        ready.send(port)
        await serving

    asyncio.run(run())


def _engine(spec: Spec) -> Engine:
    if spec.engine_url is not None:
        return VLLM(spec.engine_url)
    engine = Scripted(spec.answers, token_s=spec.token_s)
    engine.loaded = Every()
    return engine


def _move_clock(offset_ms: Any) -> None:
    """The whole process sees the wall clock with this offset, which may change at any time; the monotonic clock runs on."""
    real_ns, real_s = time.time_ns, time.time
    time.time_ns = lambda: real_ns() + offset_ms.value * 1_000_000
    time.time = lambda: real_s() + offset_ms.value / 1000


def make_world(data_dir: Path, adapters: Path) -> str:
    """Make a data folder with an API key and two adapters, the first of them stable. Returns the key's secret."""
    stores = open_stores(Settings(feedback=FeedbackSettings(data_dir=data_dir)), "operator")
    try:
        registry = Registry(stores.engine)
        for number, path in enumerate(two_adapters(adapters)):
            registry.register(path.name, path, "operator")
            if number == 0:
                registry.start_with(path.name, "operator")
        return stores.api_keys.create("load", ("chat", "feedback"))[1]
    finally:
        stores.close()


def two_adapters(folder: Path) -> list[Path]:
    """Identity adapters that differ in their temperature alone, made once."""
    found = sorted(path.parent for path in folder.glob("*/manifest.json"))
    if len(found) == 2:
        return found
    base = base_digests(POLICY)
    for temperature in (0.7, 0.8):
        fields = ManifestFields(kind="identity", base_model=MODEL, base=base, temperature=temperature, system_prompt=None, max_tokens=64)
        identity_adapter(POLICY, folder, fields)
    return two_adapters(folder)


def promote(registry: Registry, adapter: str, step: Callable[[str], None] = lambda state: None) -> None:
    """Move the alias stable the whole way round: gates, canary, approval."""
    epoch = registry.lease("controller", "benchmark", 60.0)
    assert epoch is not None
    rollout = registry.begin_rollout(adapter, "operator").id
    registry.start_canary(rollout, 0.5, [], "operator", epoch)
    step("canary")
    won: list[dict[str, JsonValue]] = [{"name": "wins", "verdict": "pass", "reason": "enough seen"}]
    registry.await_approval(rollout, won, "enough seen", "operator", epoch)
    registry.promote(rollout, "operator")


@contextlib.contextmanager
def running(*children: Child) -> Iterator[None]:
    """All of them up; killed at the end."""
    try:
        for child in children:
            child.launch()
        for child in children:
            child.wait()
        yield
    finally:
        for child in children:
            child.kill()
