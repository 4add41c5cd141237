"""What the rollout's tests stand on: a real registry, archive and controller, with a scripted engine in the model's place."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from good_evaluation import GOOD

from deploy.config import GateSettings, RolloutSettings
from deploy.controller import Controller
from deploy.engine import Scripted
from deploy.loading import Intake
from deploy.records import RolloutRecord
from deploy.registry import Registry
from deploy.replica import ReplicaAgent
from deploy.rollout import Rollout
from feedback.config import FeedbackSettings, Settings
from feedback.events import Arm, Event, FeedbackGiven, InteractionFinished, InteractionStarted, RolloutEvent, Side, new_id
from feedback.keys import ApiKey
from feedback.stores import Stores, open_stores

MakeAdapter = Callable[[Path, Path, int], tuple[str, Path]]
TRAINER = ApiKey(id="t", owner="trainer", person=False, scopes=("adapters:write",), created_ms=0)
MARA = ApiKey(id="m", owner="mara", person=True, scopes=("adapters:promote",), created_ms=0)
# What the same cycle shows on shuffled labels: a reward model at chance. PPO still raises that model's score.
SHUFFLED = GOOD | {"likelihood_gain": {"mean": 0.0, "low": -0.01, "high": 0.01, "n": 420}}


class Ring:
    """Everything but the model: registry, archive, a scripted engine, the agent beside it and the controller."""

    def __init__(self, folder: Path, policy: Path, make_adapter: MakeAdapter) -> None:
        self.folder, self.policy, self.make = folder, policy, make_adapter
        self.stores: Stores = open_stores(Settings(feedback=FeedbackSettings(data_dir=folder)))
        self.registry = Registry(self.stores.engine)
        self.engine = Scripted(lambda name, messages: "Good evening to you.")
        held = partial(self.registry.report_held, "one")
        self.agent = ReplicaAgent(self.engine, None, self.registry.wanted, held, 0.0, Intake.of(policy, folder / "private", 8))
        self.rollout = Rollout(self.registry, self.stores.archive, self.engine, RolloutSettings(weights=(0.3,)), GateSettings())
        self.controller = Controller(self.rollout, self.stores.log)
        self.base, path = make_adapter(policy, folder / "adapters", 0)
        self.registry.register(self.base, path, "system")
        self.registry.start_with(self.base, "system")

    def candidate(self, seed: int, evaluation: dict[str, Any] | None = GOOD, by: str = TRAINER.owner) -> str:
        adapter, path = self.make(self.policy, self.folder / "adapters", seed)
        self.registry.register(adapter, path, by)
        if evaluation is not None:
            self.registry.attest(adapter, "evaluation", evaluation, by)
        return adapter

    def look(self, times: int = 1) -> None:
        """The agent looks, then the controller."""

        async def both() -> None:
            for _ in range(times):
                await self.agent.step()
                assert await self.controller.tick()

        asyncio.run(both())

    def happened(self, *events: Event) -> None:
        asyncio.run(self.stores.log.append(events))
        self.stores.ingest()

    def compare(self, raters: int, votes: int, prefers: Arm = "canary") -> None:
        """Each rater compares the canary with the baseline so often."""
        self.happened(*compared(self.running(), raters, votes, prefers))

    def running(self) -> RolloutRecord:
        running = self.registry.active_rollout()
        assert running is not None
        return running

    def registry_events(self, kind: str) -> list[RolloutEvent]:
        """What the log was told of rollouts, by kind."""
        self.stores.ingest()
        return [event for event in self.stores.archive.events(kind) if isinstance(event, RolloutEvent)]

    def to_approval(self, seed: int) -> str:
        """A candidate that passes its gates and wins among 24 raters, whatever its number."""
        adapter = self.candidate(seed)
        self.look(3)
        self.compare(raters=24, votes=3)
        self.look()
        return adapter


def compared(running: RolloutRecord, raters: int, votes: int, prefers: Arm = "canary") -> list[Event]:
    """Each rater compares the canary with the baseline so often; the sides alternate."""
    events: list[Event] = []
    for turn in range(raters * votes):
        rater, comparison = f"rater {turn // votes}", new_id()
        arms: dict[Side, Arm] = {"a": "canary", "b": "baseline"} if turn % 2 else {"a": "baseline", "b": "canary"}
        for side, arm in arms.items():
            started, finished = answer(running, rater, arm, "stop")
            events += [started.model_copy(update={"comparison_id": comparison, "side": side}), finished]
        value = next(side for side, arm in arms.items() if arm == prefers)
        events.append(FeedbackGiven(event_id=new_id(), target=comparison, rater=rater, slot="choice", value=value))
    return events


def answer(running: RolloutRecord, who: str, arm: Arm, reason: str) -> tuple[InteractionStarted, InteractionFinished]:
    interaction = new_id()
    adapter = running.adapter if arm == "canary" else running.stable
    started = InteractionStarted(
        event_id=new_id(),
        interaction_id=interaction,
        subject=who,
        subject_kind="named",
        model="plaudit",
        adapter=adapter,
        arm=arm,
        rollout=running.id,
    )
    ended = InteractionFinished(event_id=new_id(), interaction_id=interaction, subject=who, finish_reason=reason, completion_tokens=4)
    return started, ended
