"""A real controller killed by kill -9 before every step it takes, from candidate to stable, back, and to a stop; on either database.

After each death: no weight above the last durable decision, no stable that nobody approved and that did not win.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from controller_process import SETTINGS
from good_evaluation import GOOD
from rollout_world import MakeAdapter, answer, compared

from deploy.records import RolloutRecord
from deploy.registry import Registry
from feedback import audit
from feedback.config import FeedbackSettings, RegistrySettings, Settings
from feedback.events import Event
from feedback.stores import open_stores

pytestmark = pytest.mark.slow
STEPS = {"sqlite": 1, "postgresql": 7}
"""Every step on SQLite, every seventh on PostgreSQL: the code is the same, the rest costs time."""


class World:
    """The stores and the registry as an onlooker sees them, and controllers that die."""

    def __init__(self, url: str, folder: Path, policy: Path, make_adapter: MakeAdapter, stride: int) -> None:
        self.stride, self.lives, self.deaths = stride, 0, 0
        self.hasty = False
        settings = Settings(feedback=FeedbackSettings(data_dir=folder), registry=RegistrySettings(url=url))
        self.stores = open_stores(settings, "people")
        self.registry = Registry(self.stores.engine)
        self.adapters = [make_adapter(policy, folder / "adapters", seed) for seed in (0, 1, 2)]
        self.base = self.adapters[0][0]
        self.registry.register(*self.adapters[0], "system")
        self.registry.start_with(self.base, "system")
        command = [sys.executable, str(Path(__file__).with_name("controller_process.py")), url, str(folder)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def close(self) -> None:
        self.process.stdin.close()  # type: ignore[union-attr]
        self.process.stdout.close()  # type: ignore[union-attr]
        self.process.wait(30)
        self.stores.close()
        self.stores.engine.dispose()

    def candidate(self, number: int) -> str:
        adapter, path = self.adapters[number]
        self.registry.register(adapter, path, "trainer")
        self.registry.attest(adapter, "evaluation", GOOD, "trainer")
        return adapter

    def happened(self, events: list[Event]) -> None:
        self.stores.log.append_sync(events)

    def people(self, count: int, reason: str = "stop") -> None:
        running = self.running()
        for number in range(count):
            for arm in ("canary", "baseline"):
                self.happened([*answer(running, f"{arm} {self.lives} {number}", arm, reason if arm == "canary" else "stop")])

    def running(self) -> RolloutRecord:
        found = self.registry.active_rollout()
        assert found is not None
        return found

    def live(self, act: str, adapter: str, kill_at: int) -> bool:
        """Whether it came to its end."""
        order = {"act": act, "adapter": adapter, "kill_at": kill_at, "hasty": self.hasty}
        self.process.stdin.write(json.dumps(order) + "\n")  # type: ignore[union-attr]
        self.process.stdin.flush()  # type: ignore[union-attr]
        said = self.process.stdout.readline().strip()  # type: ignore[union-attr]
        assert said in ("done", "killed"), said
        self.lives += 1
        self.deaths += said == "killed"
        return said == "done"

    def drive(self, act: str = "tick", adapter: str = "") -> None:
        """Kill it before the first step, the next one before the second, ...; from the first again whenever something was decided."""
        kill_at, before = 1, self.decided()
        while not self.live(act, adapter, kill_at):
            self.check()
            now = self.decided()
            if act != "tick" and now != before:
                return
            kill_at = kill_at + self.stride if now == before else 1
            before = now
        self.check()
        if act == "tick" and self.decided() != before:
            self.drive()

    def decided(self) -> list[tuple[object, ...]]:
        return [(each.id, each.state, each.weight) for each in self.registry.rollouts()] + [(self.registry.alias("stable"),)]

    def check(self) -> None:
        table, rows = self.registry.routing(), audit.read(self.stores.engine)
        weight, stable = 0.0, self.base
        for row in rows:
            if row["action"] == "rollout.canary":
                weight = SETTINGS.weights[0]
            elif row["action"] == "rollout.grown":
                weight = int(str(row["reason"]).split("%")[0]) / 100
            elif row["action"] in ("rollout.stopped", "rollout.promoted", "adapter.rolled_back"):
                weight = 0.0
            if row["action"] == "rollout.promoted":
                stable = self.registry.rollout(str(row["subject"])).adapter
            elif row["action"] == "adapter.rolled_back":
                stable = self.base
        assert table.weight <= weight, "people are sent where nobody decided to send them"
        assert table.stable.adapter == stable
        for each in self.registry.rollouts():
            if each.state == "promoted":
                won = [verdict["verdict"] for verdict in each.verdicts if verdict["name"] == "wins"]
                assert (won, each.approved_by) == (["pass"], "mara")
        assert audit.verify(self.stores.engine)[1] is None


@pytest.fixture
def world(database_url: str, tmp_path: Path, tiny_policy: Path, make_adapter: MakeAdapter) -> Iterator[World]:
    made = World(database_url, tmp_path / "data", tiny_policy, make_adapter, STEPS[database_url.split(":")[0].split("+")[0]])
    yield made
    made.close()


def test_killed_before_every_step_it_arrives_all_the_same(world: World) -> None:
    adapter = world.candidate(1)
    world.drive()
    assert (world.running().state, world.registry.routing().weight) == ("canary", 0.1), "through the gates, and waits for people"
    world.people(2)
    world.drive()
    assert (world.running().state, world.registry.routing().weight) == ("canary", 0.3)
    world.happened(compared(world.running(), raters=24, votes=3))
    world.drive()
    assert world.running().state == "awaiting"
    world.drive("approve", adapter)
    assert (world.registry.alias("stable"), world.registry.alias("previous")) == (adapter, world.base)
    world.drive("rollback", adapter)
    assert world.registry.alias("stable") == world.base

    second = world.candidate(2)
    world.drive()
    world.people(60, "error")
    world.drive()
    ended = world.registry.rollouts(second)[-1]
    assert ended.state == "stopped" and ended.reason.startswith("guardrail errors: ")
    assert world.deaths > 100 / world.stride

    world.stores.ingest()
    told = [event.type for kind in ("rollout.started", "rollout.approved", "rollout.ended") for event in world.stores.archive.events(kind)]
    assert told == ["rollout.started", "rollout.started", "rollout.approved", "rollout.ended"], "each event once, however often it was sent"


def test_a_weight_that_moves_before_its_decision_is_seen(world: World) -> None:
    """Negative control."""
    if world.stride > 1:
        pytest.skip("where every step is tried")
    world.candidate(1)
    world.drive()
    world.people(2)
    world.hasty = True
    with pytest.raises(AssertionError, match="people are sent where nobody decided"):
        world.drive()
