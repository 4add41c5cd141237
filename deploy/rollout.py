"""How an adapter comes to answer people, and how it stops.

                 gates pass               win test passes            a person approves
    candidate ──────────────▶  canary  ──────────────────▶  awaiting ──────────────────▶  promoted (stable)
        │                        │                              │                              │
        │ a gate fails           │ a guard fails, it cannot     │ stopped by a person          │ rollback: `previous` answers
        ▼                        ▼ win any more, it is late     ▼                              ▼ again, in one transaction
      stopped ◀──────────────────┴──────────────────────────────┘                           retired

Only a verdict `pass` advances. At the gates everything else ends the rollout and says what is missing: a candidate does not
change, the next one may do better. A canary that is inconclusive waits for more people. Every step is one
transaction in the registry before anything acts on it, so a controller that is killed anywhere leaves no more weight
than the last durable decision.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from pydantic import JsonValue, ValidationError

from deploy.config import GateSettings, RolloutSettings
from deploy.engine import Engine
from deploy.evalues import win_test
from deploy.gates import Evaluation, Verdict, judge, withheld
from deploy.guards import Guards, with_margins
from deploy.manifest import vllm_name
from deploy.records import AdapterRecord, RolloutRecord
from deploy.registry import Registry
from deploy.votes import votes
from deploy.watch import Watch
from feedback.archive import Archive
from feedback.clock import wall_ms
from feedback.errors import EngineError, NotFound, PromotionRefused
from feedback.keys import ApiKey
from feedback.subjects import Subjects

CONTROLLER = "controller"
DAY_MS = 24 * 3600 * 1000


@dataclass
class Rollout:
    """Decides; the registry makes it durable."""

    registry: Registry
    archive: Archive
    engine: Engine
    settings: RolloutSettings
    gates: GateSettings
    subjects: Subjects | None = None
    """Opens what people wrote, for the guardrails that read it."""
    _watch: Watch | None = field(default=None, init=False)

    async def advance(self, epoch: int) -> None:
        """Look once and take the step that is due. Raises Conflict where another controller has taken over."""
        running = self.registry.active_rollout()
        if running is None:
            if (candidate := self._next()) is not None:
                self.registry.begin_rollout(candidate.id, CONTROLLER, epoch)
        elif running.state == "gates":
            await self._judge_gates(running, epoch)
        else:
            # In a thread: reading thousands of answers takes long enough for people to see their streams stand still.
            await asyncio.to_thread(self._judge_canary, running, epoch)

    def _next(self) -> AdapterRecord | None:
        """The newest candidate whose evaluation is there; older ones learned from fewer ratings."""
        waiting = [each for each in self.registry.adapters() if each.state == "candidate" and each.kind == "trained"]
        return next((each for each in reversed(waiting) if self.registry.attestations(each.id, "evaluation")), None)

    # --- gates ------------------------------------------------------------------------------------------------------

    async def _judge_gates(self, running: RolloutRecord, epoch: int) -> None:
        name = vllm_name(running.adapter)
        erasure = withheld(self.registry.attestations(running.adapter, "erasure"))
        if erasure.verdict != "pass":
            self._stop(running, [erasure], epoch)
            return
        needed = {name, vllm_name(running.stable, running.id)}
        if not needed <= self.registry.held_everywhere():
            if wall_ms() - running.started_ms > 1000 * self.gates.probe_timeout_s:
                verdict = Verdict.failed(
                    "loads", f"no replica has loaded {name} within {self.gates.probe_timeout_s:g} s; see the replica's log"
                )
                self._stop(running, [verdict], epoch)
            return
        body = self.registry.attestations(running.adapter, "evaluation")[-1].body
        try:
            evaluation = Evaluation.model_validate(body)
        except ValidationError as exc:
            problem = exc.errors()[0]
            where = ".".join(map(str, problem["loc"]))
            unread = Verdict.failed("evaluation", f"the evaluation cannot be read: {where}: {problem['msg']}; train again")
            self._stop(running, [unread], epoch)
            return
        overrides = self.registry.attestations(running.adapter, "override")
        verdicts = [await self._answers(name), *judge(evaluation, self.gates, overrides)]
        if all(verdict.verdict == "pass" for verdict in verdicts):
            self.registry.start_canary(running.id, self.settings.weight, _rows(verdicts), CONTROLLER, epoch)
        else:
            self._stop(running, verdicts, epoch)

    async def _answers(self, name: str) -> Verdict:
        """It loads and says something."""
        body = {"model": name, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8, "temperature": 0}
        try:
            reply = await self.engine.complete(body)
        except EngineError as exc:
            return Verdict.failed("answers", f"the model server did not answer with it: {exc.message}")
        tokens = int((reply.get("usage") or {}).get("completion_tokens", 0))
        if tokens < 1:
            return Verdict.failed("answers", "it answered with 0 tokens, at least 1 is needed")
        return Verdict.passed("answers", f"it is loaded on every replica and answered with {tokens} tokens")

    # --- canary -----------------------------------------------------------------------------------------------------

    def _judge_canary(self, running: RolloutRecord, epoch: int) -> None:
        of_the_canary = ("wins", "guardrail ")
        gates = [Verdict.model_validate(row) for row in running.verdicts if not str(row.get("name")).startswith(of_the_canary)]
        guards = self._guards(running)
        if any(each.verdict == "fail" for each in guards):
            self._stop(running, [*gates, *guards], epoch, [each for each in guards if each.verdict in ("fail", "error")])
            return
        if running.state == "awaiting":
            return
        test = win_test(votes(self.archive, running.id, self.settings.votes_per_rater), running.number, self.settings)
        verdicts = [*gates, *guards, test.verdict]
        broken = next((each for each in guards if each.verdict == "error"), None)
        if test.verdict.verdict == "pass" and broken is None:
            reason = f"{test.verdict.reason}; waits for approval by a person: plaudit adapters promote {running.adapter[:16]}"
            self.registry.await_approval(running.id, _rows(verdicts), reason, CONTROLLER, epoch)
        elif test.verdict.verdict == "fail":
            self._stop(running, verdicts, epoch, [test.verdict])
        elif self._late(running):
            late = Verdict.failed("wins", f"inconclusive after {self.settings.max_days:g} days: {test.verdict.reason}")
            self._stop(running, [*gates, *guards, late], epoch, [late])
        else:
            self.registry.note(running.id, (broken or test.verdict).reason, _rows(verdicts), epoch)

    def _guards(self, running: RolloutRecord) -> list[Verdict]:
        if self._watch is None or self._watch.rollout != running.id:
            guards = Guards(self.settings.guard_alpha, with_margins(self.settings.guard_margins))
            self._watch = Watch(self.archive, self.subjects, running.id, running.canary_ms or 0, guards)
        self._watch.look()
        return self._watch.guards.verdicts()

    def _late(self, running: RolloutRecord) -> bool:
        return running.canary_ms is not None and wall_ms() - running.canary_ms > self.settings.max_days * DAY_MS

    def _stop(self, running: RolloutRecord, verdicts: Sequence[Verdict], epoch: int, because: Sequence[Verdict] = ()) -> None:
        """`because`: what ends it; without, everything that is no `pass`."""
        ending = because or [each for each in verdicts if each.verdict != "pass"]
        reason = "; ".join(f"{each.name}: {each.reason}" for each in ending)
        self.registry.end_rollout(running.id, reason, CONTROLLER, _rows(verdicts), epoch)


def _rows(verdicts: Sequence[Verdict]) -> list[dict[str, JsonValue]]:
    return [verdict.model_dump(mode="json") for verdict in verdicts]


def approve(registry: Registry, settings: RolloutSettings, adapter: str, key: ApiKey) -> RolloutRecord:
    """A person lets the adapter answer everybody. Raises NotAllowed, NotFound and PromotionRefused, each saying what to do next."""
    key.require("adapters:promote")
    record = registry.adapter(adapter)
    if not key.person:
        raise PromotionRefused(
            f"approval: key {key.id} of '{key.owner}' names no person; make one with plaudit keys create --person", field="key"
        )
    if settings.two_people and record.registered_by == key.owner:
        raise PromotionRefused(
            f"approval: '{key.owner}' registered {record.id[:16]} and so may not approve it; another person's key is needed", field="key"
        )
    erasure = withheld(registry.attestations(record.id, "erasure"))
    if erasure.verdict != "pass":
        raise PromotionRefused(f"approval: {record.id[:16]}: {erasure.reason}", field="adapter")
    waiting = [each for each in registry.rollouts(record.id) if each.state == "awaiting"]
    if not waiting:
        last = registry.rollouts(record.id)[-1:]
        why = f"its rollout is '{last[0].state}': {last[0].reason}" if last else f"it is '{record.state}': {record.reason}"
        raise PromotionRefused(f"approval: {record.id[:16]} does not wait for approval; {why}", field="adapter")
    registry.promote(waiting[0].id, key.owner)
    return registry.rollout(waiting[0].id)


def stop(registry: Registry, reason: str, key: ApiKey) -> RolloutRecord:
    """A person ends the running rollout; everybody is answered by stable again."""
    key.require("adapters:promote")
    running = registry.active_rollout()
    if running is None:
        raise NotFound("stop: no rollout is running", field="rollout")
    registry.end_rollout(running.id, f"stopped by {key.owner}: {reason}", key.owner)
    return registry.rollout(running.id)
