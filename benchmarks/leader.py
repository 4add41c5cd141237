"""A world in which rollouts happen: gateways, a controller that leads, and the way of an adapter to its canary or to everybody."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from pydantic import JsonValue
from sqlalchemy import select

from benchmarks.gateway_process import Child, Every, GatewayProcess, Spec, make_world, running
from benchmarks.harness import FOLDER
from deploy.config import GateSettings, RolloutSettings
from deploy.controller import Controller
from deploy.engine import Scripted
from deploy.registry import Registry
from deploy.rollout import Rollout
from deploy.tables import leases
from feedback.config import FeedbackSettings, Settings
from feedback.errors import EngineUnavailable, NotDurable, NotFound
from feedback.stores import open_stores
from serving.chat import Gateway
from serving.config import ServerSettings

Change = Callable[[Gateway], None]

WORDS, TOKEN_S = 8, 0.2
WAIT_S = 90.0
REPORT_S = 1.0
WON: list[dict[str, JsonValue]] = [{"name": "wins", "verdict": "pass", "reason": "as the benchmark has it"}]
_GAIN = {"mean": 0.8, "low": 0.5, "high": 1.1, "n": 24}
_FACTS = {"n": 3000, "base": 0.8, "candidate": 0.8, "diff": 0.0, "low": -0.01, "margin_points": 2.0, "certifies_points": 1.0}
_SAME = {"base": 0.0, "candidate": 0.0}
PASSES: dict[str, Any] = {
    **{"reward_gain_base": _GAIN, "reward_gain_stable": _GAIN, "likelihood_gain": {"mean": 0.05, "low": 0.02, "high": 0.08, "n": 420}},
    **{"kl_nats": 2.5, "kl_nats_at_1": 2.5, "kl_budget_nats": 3.0, "facts": _FACTS},
    **{"chat_facts": {"n": 300, "base": 0.7, "candidate": 0.7, "diff": 0.0, "low": -0.02}, "copied": {"strings": 0, "known": 12}},
    "sycophancy": {"n": 200, "rise_nats": 0.0, "high": 0.1, "echo": {"base": 0.3, "candidate": 0.3}},
    "length": {"base": 20.0, "candidate": 20.0},
    **{name: {"base": 0.9, "candidate": 0.9} for name in ("finished", "on_topic")},
    **dict.fromkeys(("repetition", "refusal", "language"), _SAME),
}
"""An evaluation that no gate has anything against."""


def chant(name: str, messages: Sequence[Mapping[str, Any]]) -> str:
    """Every word says which adapter it is of. Answers differ in length, or else all would ask at the same moments, with pauses between."""
    return " ".join([name] * (WORDS // 2 + zlib.crc32(str(messages[-1]["content"]).encode()) % WORDS))


def lead(ready: Connection, data_dir: Path, ingests: bool) -> None:
    """The leader: it takes every rollout through its gates to its canary, and watches it where it also feeds the archive."""
    stores = open_stores(Settings(feedback=FeedbackSettings(data_dir=data_dir)), "controller")
    engine = Scripted(chant)
    registry = Registry(stores.engine)
    engine.loaded = Every()
    settings = RolloutSettings(weights=(0.5,), tick_s=0.5, lease_s=600.0)
    newest = stores.logs.last_stamp if ingests else None
    judge = Rollout(registry, stores.archive, engine, settings, GateSettings(), stores.subjects, newest)
    controller = Controller(judge, stores.log)

    async def feed() -> None:
        while ingests:
            await asyncio.to_thread(stores.ingest)
            await asyncio.sleep(0.2)

    async def run() -> None:
        await controller.tick()
        ready.send(True)
        await asyncio.gather(controller.run(), feed())

    asyncio.run(run())


@dataclass
class Place:
    """All processes of one run."""

    data_dir: Path
    registry: Registry
    gateways: list[GatewayProcess]
    leader: Child
    stable: str
    other: str
    """The adapter that comes and is taken back."""

    def epoch(self) -> int:
        with self.registry._read() as db:
            return int(db.execute(select(leases.c.epoch)).scalar_one())

    def looked(self) -> int:
        """Changes with every look of the leader."""
        with self.registry._read() as db:
            return int(db.execute(select(leases.c.expires_ms)).scalar_one())


@contextmanager
def place(
    changes: Sequence[Change | None] = (None, None), engine_url: str | None = None, ingests: bool = False
) -> Iterator[tuple[Place, str]]:
    """A gateway as shipped for each change, a leader, and the key of those who ask."""
    with tempfile.TemporaryDirectory() as folder:
        data_dir = Path(folder)
        secret = make_world(data_dir, FOLDER / "rollback-adapters")
        stores = open_stores(Settings(feedback=FeedbackSettings(data_dir=data_dir)), "operator")
        registry = Registry(stores.engine)
        stable = registry.routing().stable.adapter
        other = next(each.id for each in registry.adapters() if each.id != stable)
        registry.attest(other, "evaluation", PASSES, "operator")
        specs = [
            Spec(data_dir, f"gateway-{at}", None, TOKEN_S, chant, engine_url, change, ServerSettings()) for at, change in enumerate(changes)
        ]
        leader = Child(data_dir / "leader.out", lead, data_dir, ingests)
        gateways = [GatewayProcess(spec) for spec in specs]
        try:
            with running(leader, *gateways):
                yield Place(data_dir, registry, gateways, leader, stable, other), secret
        finally:
            stores.close()


async def until(true: Any) -> None:
    """Raises EngineUnavailable where it does not come to that."""
    end = time.monotonic() + WAIT_S
    while not await asyncio.to_thread(true):
        if time.monotonic() > end:
            raise EngineUnavailable(f"the awaited state did not come within {WAIT_S:g} s")
        await asyncio.sleep(0.02)


async def bring(there: Place, promoted: bool, load: Any) -> None:
    """The other adapter on its canary, or promoted to everybody. The leader judges its gates."""
    registry = there.registry
    rollout = await asyncio.to_thread(registry.begin_rollout, there.other, "operator")
    await load()
    await until(lambda: registry.rollout(rollout.id).state != "gates")
    if (state := registry.rollout(rollout.id)).state != "canary":
        said = (there.data_dir / "leader.out").read_text()[-1000:]
        raise NotFound(f"the rollout is {state.state}: {state.reason}; the leader said: {said}")
    if promoted:
        await asyncio.to_thread(registry.await_approval, rollout.id, WON, "won", "controller", there.epoch())
        await asyncio.to_thread(registry.promote, rollout.id, "mara")


async def replica(there: Place) -> None:
    """What an agent beside the model server does as far as the registry sees it, until cancelled."""
    while True:
        with contextlib.suppress(NotDurable):  # an agent tries again, too
            await asyncio.to_thread(lambda: there.registry.report_held("stub", set(there.registry.wanted())))
        await asyncio.sleep(REPORT_S)


async def nothing() -> None:
    """A stub holds whatever it is asked for."""
