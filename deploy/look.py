"""What a look at a rollout finds beside its gates and its votes: is anybody able to answer and to watch, and do the guardrails hold?"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable

from deploy.config import RolloutSettings
from deploy.engine import Engine
from deploy.gates import Verdict
from deploy.guards import Guardrail, Guards
from deploy.records import RolloutRecord
from deploy.registry import Registry, arms
from deploy.watch import Watch
from feedback.archive import Archive
from feedback.errors import EngineRefused, EngineUnavailable
from feedback.subjects import Subjects

MINUTE_MS = 60_000
DAY_MS = 24 * 60 * MINUTE_MS
LATE_S = 30.0
"""The archive may lag behind the log by so much."""
LATER = ("wins", "guardrail ", "step", "data", "replicas", "look", "approval")
"""Verdicts on a canary begin so; the others are its gates', and stay."""


class Look:
    """One for each controller. It remembers of a canary only what the archive would tell it again."""

    def __init__(
        self,
        registry: Registry,
        archive: Archive,
        subjects: Subjects | None,
        guardrails: Iterable[Guardrail],
        newest: Callable[[], int] | None,
    ) -> None:
        self.registry, self.archive, self.subjects, self.newest = registry, archive, subjects, newest
        self._guardrails = tuple(guardrails)
        self._watch: Watch | None = None
        self._awaited = (0, 0.0)  # a stamp, and since when the archive has been waited for to reach it

    def forget(self) -> None:
        """A look that broke off may have taken in half of what it read."""
        self._watch = None

    def canary(self, running: RolloutRecord, alpha: float) -> list[Verdict]:
        """What nobody votes on."""
        return [*self._data(), *self._replicas(running), *self._guards(running, alpha)]

    def step(self, running: RolloutRecord, settings: RolloutSettings, larger: float) -> Verdict:
        """Whether enough people, or enough time, have shown nothing wrong at this weight."""
        people = self._watch.guards.people if self._watch else 0
        taken = max(1, sum(weight <= running.weight for weight in settings.weights))
        minutes = (self.registry.clock_ms() - (running.since_ms or running.canary_ms or running.started_ms)) / MINUTE_MS
        needed = settings.step_people * taken
        figures = (
            f"step {taken} of {len(settings.weights)}, {running.weight:.0%} of people: {people} people in the smaller arm, "
            f"needed >= {needed}, or {settings.step_days:g} days; {minutes:.0f} minutes, needed >= {settings.step_minutes:g}"
        )
        enough = people >= needed or minutes * MINUTE_MS >= settings.step_days * DAY_MS
        if enough and minutes >= settings.step_minutes:
            return Verdict.passed("step", f"{figures}; {larger:.0%} next")
        return Verdict.inconclusive("step", figures)

    def _data(self) -> list[Verdict]:
        """An error where the archive has not heard for long what the log holds."""
        if self.newest is None:
            return []
        stamp, since = self._awaited
        if self.archive.as_of() >= stamp:
            self._awaited = self.newest(), time.monotonic()
        elif time.monotonic() - since > LATE_S:
            return [Verdict.error("data", f"the archive is {LATE_S:g} s behind the log: nobody sees what happens; see the service's log")]
        return []

    def _replicas(self, running: RolloutRecord) -> list[Verdict]:
        """An error where a living replica does not hold both arms; nobody is sent there then."""
        lacking = arms(running.adapter, running.stable, running.id) - self.registry.held_everywhere()
        if not lacking:
            return []
        names = ", ".join(sorted(lacking))
        return [Verdict.error("replicas", f"not every replica holds {names}, so stable answers everybody; see the replica's log")]

    def _guards(self, running: RolloutRecord, alpha: float) -> list[Verdict]:
        if self._watch is None or self._watch.rollout != running.id:
            guards = Guards(alpha, self._guardrails)
            self._watch = Watch(self.archive, self.subjects, running.id, running.canary_ms or 0, guards)
        self._watch.look()
        return self._watch.guards.verdicts()


async def answers(engine: Engine, name: str, timeout_s: float) -> Verdict:
    """It loads and says something. A server that is away is no fault of the adapter's."""
    body = {"model": name, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8, "temperature": 0}
    try:
        async with asyncio.timeout(timeout_s):
            reply = await engine.complete(body)
    except EngineRefused as exc:
        return Verdict.failed("answers", f"the model server did not answer with it: {exc.message}")
    except EngineUnavailable as exc:
        return Verdict.error("answers", f"the model server cannot be asked: {exc.message}")
    except TimeoutError:
        return Verdict.error("answers", f"the model server has not answered within {timeout_s:g} s")
    tokens = int((reply.get("usage") or {}).get("completion_tokens", 0))
    if tokens < 1:
        return Verdict.failed("answers", "it answered with 0 tokens, at least 1 is needed")
    return Verdict.passed("answers", f"it is loaded on every replica and answered with {tokens} tokens")


def stored(running: RolloutRecord) -> list[Verdict]:
    """What its last look showed."""
    return [Verdict.model_validate(row) for row in running.verdicts]


def of_gates(verdicts: Iterable[Verdict]) -> list[Verdict]:
    """What a rollout's gates said, of all its verdicts."""
    return [each for each in verdicts if not each.name.startswith(LATER)]
