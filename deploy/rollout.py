"""How an adapter comes to answer people, and how it stops.

                 gates pass               win test passes            a person approves
    candidate ──────────────▶  canary  ──────────────────▶  awaiting ──────────────────▶  promoted (stable)
        │                     │ ▲    │                          │                              │
        │                     └─┘    │                          │                              │
        │         enough people: the │ next weight              │                              │
        │                            │                          │                              │
        │ a gate fails, it is        │ a guard fails, it cannot │ a guard fails, nobody        │ rollback: `previous` answers
        ▼ not loaded in time         ▼ win any more, it is late ▼ approves in time             ▼ again, in one transaction
      stopped ◀──────────────────────┴──────────────────────────┘                           retired

A person may stop it anywhere. Only a verdict `pass` advances. At the gates everything else ends the rollout and says what is
missing: a candidate does not change, the next one may do better. A canary that is inconclusive waits for more people. What cannot be
judged (`error`: the archive cannot be read, its data is late, a replica has lost the adapter, the arms are of unequal size) waits too,
is shown, and ends the rollout after `error_minutes`: nobody stays on a canary that nobody watches. So no state lasts for ever.

The weight grows in steps; whoever is on the canary stays there, and the baseline grows with it. Every step is one transaction in the
registry before anything acts on it, so a controller that is killed anywhere leaves no more weight than the last durable decision.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import structlog
from pydantic import JsonValue

from deploy.config import GateSettings, RolloutSettings
from deploy.engine import Engine
from deploy.evalues import win_test
from deploy.gates import Verdict, judge, read, withheld
from deploy.guards import with_margins
from deploy.look import DAY_MS, MINUTE_MS, Look, answers, of_gates, stored
from deploy.manifest import vllm_name
from deploy.records import RolloutRecord
from deploy.registry import Registry, arms
from deploy.votes import votes
from feedback.archive import Archive
from feedback.errors import Conflict, PlauditError
from feedback.subjects import Subjects

CONTROLLER = "controller"

log = structlog.get_logger()


@dataclass
class Rollout:
    """Decides; the registry makes it durable. Raises ConfigError for margins of guardrails that there cannot be."""

    registry: Registry
    archive: Archive
    engine: Engine
    settings: RolloutSettings
    gates: GateSettings
    subjects: Subjects | None = None
    """Opens what people wrote, for the guardrails that read it."""
    newest: Callable[[], int] | None = None
    """The newest stamp in the log, which the archive has to reach; without, nobody notices that its data is late."""

    def __post_init__(self) -> None:
        guardrails = with_margins(self.settings.guard_margins)
        self.look = Look(self.registry, self.archive, self.subjects, guardrails, self.newest)

    async def advance(self, epoch: int) -> None:
        """Look once and take the step that is due. Raises Conflict where another controller has taken over."""
        running = self.registry.active_rollout()
        if running is None:
            if (candidate := self.registry.next_candidate()) is not None:
                self.registry.begin_rollout(candidate.id, CONTROLLER, epoch)
            return
        try:
            if running.state == "gates":
                await self._judge_gates(running, epoch)
            else:
                # In a thread: reading thousands of answers takes long enough for people to see their streams stand still.
                await asyncio.to_thread(self._judge_canary, running, epoch)
        except Conflict:
            raise
        except Exception as exc:  # noqa: BLE001  the look's edge: it is shown as a verdict, and after `error_minutes` the rollout ends
            await asyncio.to_thread(self._broken, running, exc, epoch)

    async def _judge_gates(self, running: RolloutRecord, epoch: int) -> None:
        name, timeout_s = vllm_name(running.adapter), self.gates.probe_timeout_s
        erasure = withheld(self.registry.attestations(running.adapter, "erasure"))
        evaluation = read(self.registry.attestations(running.adapter, "evaluation")[-1])
        if erasure.verdict != "pass" or isinstance(evaluation, Verdict):
            self._stop(running, [each for each in (erasure, evaluation) if isinstance(each, Verdict)], epoch)
            return
        if not arms(running.adapter, running.stable, running.id) <= self.registry.held_everywhere():
            if self._lasts(running.started_ms, 1000 * timeout_s):
                loads = Verdict.failed("loads", f"no replica has loaded {name} within {timeout_s:g} s; see the replica's log")
                self._stop(running, [loads], epoch)
            return
        overrides = self.registry.attestations(running.adapter, "override")
        answered = await answers(self.engine, name, timeout_s)
        verdicts = [answered, *judge(evaluation, self.gates, overrides)]
        if all(verdict.verdict == "pass" for verdict in verdicts):
            self.registry.start_canary(running.id, self.settings.weights[0], _rows(verdicts), CONTROLLER, epoch)
        elif answered.verdict == "error":
            self._wait(running, verdicts, [answered], epoch)
        else:
            self._stop(running, verdicts, epoch)

    def _judge_canary(self, running: RolloutRecord, epoch: int) -> None:
        guards = self.look.canary(running, self.settings.guard_alpha)
        so_far = [*of_gates(stored(running)), *guards]
        errors = [each for each in guards if each.verdict == "error"]
        if any(each.verdict == "fail" for each in guards):
            self._stop(running, so_far, epoch, [each for each in guards if each.verdict in ("fail", "error")])
            return
        if running.state == "awaiting":
            self._judge_awaiting(running, so_far, errors, epoch)
            return
        wins = win_test(votes(self.archive, running.id, self.settings.votes_per_rater), running.number, self.settings).verdict
        verdicts = [*so_far, wins]
        if wins.verdict == "fail":
            self._stop(running, verdicts, epoch, [wins])
        elif self._lasts(running.canary_ms, self.settings.max_days * DAY_MS):
            late = Verdict.failed("wins", f"inconclusive after {self.settings.max_days:g} days: {wins.reason}")
            self._stop(running, [*so_far, late], epoch, [late])
        elif errors:
            self._wait(running, verdicts, errors, epoch)
        elif larger := [weight for weight in self.settings.weights if weight > running.weight]:
            step = self.look.step(running, self.settings, larger[0])
            if step.verdict == "pass":
                self.registry.grow_canary(running.id, larger[0], _rows([*verdicts, step]), CONTROLLER, epoch)
            else:
                self._note(running, f"{wins.reason}; {step.reason}", [*verdicts, step], epoch)
        elif wins.verdict == "pass":
            reason = f"{wins.reason}; waits for approval by a person: plaudit adapters promote {running.adapter[:16]}"
            self.registry.await_approval(running.id, _rows(verdicts), reason, CONTROLLER, epoch)
        else:
            self._note(running, wins.reason, verdicts, epoch)

    def _judge_awaiting(self, running: RolloutRecord, so_far: Sequence[Verdict], errors: Sequence[Verdict], epoch: int) -> None:
        verdicts = [*so_far, *(each for each in stored(running) if each.name == "wins")]
        if self._lasts(running.since_ms, self.settings.approval_days * DAY_MS):
            late = Verdict.failed("approval", f"nobody approved it within {self.settings.approval_days:g} days (rollout.approval_days)")
            self._stop(running, [*verdicts, late], epoch, [late])
        elif errors:
            self._wait(running, verdicts, errors, epoch)
        else:
            won = next(each.reason for each in verdicts if each.name == "wins")
            self._note(running, f"{won}; waits for approval by a person: plaudit adapters promote {running.adapter[:16]}", verdicts, epoch)

    def _lasts(self, since_ms: int | None, limit_ms: float) -> bool:
        return since_ms is not None and self.registry.clock_ms() - since_ms > limit_ms

    def _note(self, running: RolloutRecord, reason: str, verdicts: Sequence[Verdict], epoch: int) -> None:
        if (running.reason, running.verdicts, running.error_ms) != (reason, _rows(verdicts), None):
            self.registry.note(running.id, reason, _rows(verdicts), epoch)

    def _wait(self, running: RolloutRecord, verdicts: Sequence[Verdict], errors: Sequence[Verdict], epoch: int) -> None:
        """Nothing advances while something cannot be judged; after `error_minutes` of it in a row the rollout ends."""
        if self._lasts(running.error_ms, self.settings.error_minutes * MINUTE_MS):
            self._stop(running, verdicts, epoch, errors)
            return
        reason = "; ".join(f"cannot be judged: {each.name}: {each.reason}" for each in errors)
        if running.error_ms is None or (running.reason, running.verdicts) != (reason, _rows(verdicts)):
            self.registry.note(running.id, reason, _rows(verdicts), epoch, error=True)

    def _broken(self, running: RolloutRecord, exc: Exception, epoch: int) -> None:
        """A look that could not be finished."""
        self.look.forget()
        said = exc.message if isinstance(exc, PlauditError) else f"{type(exc).__name__}: {exc}"
        error = Verdict.error("look", f"{said}; nothing was judged; see the controller's log")
        if (reason := f"cannot be judged: look: {error.reason}") != running.reason:  # a failure that lasts is told once
            log.error("rollout not judged", rollout=running.id, reason=reason, exc_info=None if isinstance(exc, PlauditError) else exc)
        won = [each for each in stored(running) if running.state == "awaiting" and each.name == "wins"]
        self._wait(running, [*of_gates(stored(running)), *won, error], [error], epoch)

    def _stop(self, running: RolloutRecord, verdicts: Sequence[Verdict], epoch: int, because: Sequence[Verdict] = ()) -> None:
        """`because`: what ends it; without, everything that is no `pass`."""
        ending = because or [each for each in verdicts if each.verdict != "pass"]
        reason = "; ".join(f"{each.name}: {each.reason}" for each in ending)
        self.registry.end_rollout(running.id, reason, CONTROLLER, _rows(verdicts), epoch)


def _rows(verdicts: Sequence[Verdict]) -> list[dict[str, JsonValue]]:
    return [verdict.model_dump(mode="json") for verdict in verdicts]
