"""A controller that dies by kill -9 just before its n-th step, for test_killed_controller.py.

A step is a statement or a commit in the registry's database, or an append to the event log, before and after it. One line of JSON on
standard input is one life: it is forked off, does one thing and is killed, or comes to its end. The answer is `killed` or `done`.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sqlalchemy import event, update

from deploy.approval import approve
from deploy.config import GateSettings, RolloutSettings
from deploy.controller import Controller
from deploy.engine import Scripted
from deploy.registry import Registry
from deploy.rollout import Rollout
from deploy.tables import rollouts
from feedback.config import FeedbackSettings, RegistrySettings, Settings
from feedback.events import Event
from feedback.keys import ApiKey
from feedback.stores import Stores, open_stores

SETTINGS = RolloutSettings(weights=(0.1, 0.3), step_people=2, step_minutes=0.0, lease_s=0.001)
MARA = ApiKey(id="m", owner="mara", person=True, scopes=("adapters:promote",), created_ms=0)


class Life:
    """Counts its steps and ends before the one that was ordered."""

    def __init__(self, kill_at: int) -> None:
        self.left = kill_at

    def step(self, *_: object) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


class Log:
    """The event log, with a chance to die on either side of an append."""

    def __init__(self, stores: Stores, life: Life) -> None:
        self._log, self._life = stores.log, life

    def __getattr__(self, name: str) -> Any:
        return getattr(self._log, name)

    async def append(self, events: Sequence[Event]) -> list[Event]:
        self._life.step()
        stored = await self._log.append(events)
        self._life.step()
        return stored


class Hasty(Registry):
    """The control: the weight first, the decision in a transaction of its own."""

    def grow_canary(self, rollout_id: str, weight: float, *rest: Any) -> None:
        with self._write() as db:
            db.execute(update(rollouts).where(rollouts.c.id == rollout_id).values(weight=weight))
        with self._write() as db:
            db.execute(update(rollouts).where(rollouts.c.id == rollout_id).values(weight=0.0))
            super().grow_canary(rollout_id, weight, *rest)


def live(url: str, data_dir: Path, order: Mapping[str, Any]) -> None:
    """One life."""
    stores = open_stores(Settings(feedback=FeedbackSettings(data_dir=data_dir), registry=RegistrySettings(url=url)))
    registry = (Hasty if order["hasty"] else Registry)(stores.engine)
    engine = Scripted(lambda name, messages: "Good evening to you.")
    engine.loaded = dict.fromkeys(registry.wanted(), data_dir)
    registry.report_held("one", set(engine.loaded))
    stores.ingest()
    life = Life(order["kill_at"])
    event.listen(stores.engine, "before_cursor_execute", life.step)
    event.listen(stores.engine, "commit", life.step)
    if order["act"] == "tick":
        rollout = Rollout(registry, stores.archive, engine, SETTINGS, GateSettings(), stores.subjects)
        asyncio.run(Controller(rollout, Log(stores, life)).tick())
    elif order["act"] == "approve":
        approve(registry, SETTINGS, order["adapter"], MARA)
    else:
        registry.rollback("mara", "bad", order["adapter"])


def main(url: str, data_dir: Path) -> None:
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                live(url, data_dir, json.loads(line))
                status = 0
            finally:
                os._exit(status)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print({0: "done", -signal.SIGKILL: "killed"}.get(code, f"failed {code}"), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
