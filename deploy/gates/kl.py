"""How far did it move from base?"""

from __future__ import annotations

import math
from dataclasses import dataclass

from deploy.config import GateSettings
from deploy.gates import Evaluation, Verdict, unmeasured

MIN_FINISHED = 30
"""Fewer answers that ended by themselves do not tell their KL."""


def _most(found: Evaluation, settings: GateSettings) -> float:
    """Whoever trains without a budget must not thereby be judged without one."""
    return min(found.kl_budget_nats, settings.max_kl_budget_nats) * settings.kl_slack


def _compared(name: str, kl: float, most: float, where: str, which: str) -> Verdict:
    inside = kl <= most
    reason = f"{kl:.2f} nats an answer from base{where} {'<=' if inside else '>'} {most:.2f}{which}"
    if not inside:
        reason += "; train again with a smaller ppo.kl_target_nats"
    return Verdict(name=name, verdict="pass" if inside else "fail", value=kl, comparison="<=", threshold=most, reason=reason)


@dataclass(frozen=True)
class KlBudget:
    """How far did the policy move from base? Beyond the budget the reward model knows nothing."""

    name: str = "KL"

    def judge(self, found: Evaluation, settings: GateSettings) -> Verdict:
        most = _most(found, settings)
        # The sum of a reply that was cut off is only a part of its KL, so the mean of all replies is too low and what exceeds the budget
        # in it surely does. Of those that ended nothing is missing, where they are enough to tell.
        whole = found.kl_finished_nats if found.finished_replies >= MIN_FINISHED else None
        figures_read = [found.kl_nats] if whole is None else [found.kl_nats, whole]
        kl = max(figures_read) if all(map(math.isfinite, figures_read)) else math.nan
        if not (math.isfinite(kl) and most > 0):
            told = f"KL {found.kl_nats} of a budget of {found.kl_budget_nats} nats cannot be judged; evaluate again"
            return Verdict.error(self.name, told)
        which = ""
        if whole is not None:
            which = f" ({whole:.2f} of the {found.finished_replies} that ended by themselves, {found.kl_nats:.2f} of all)"
        return _compared(self.name, kl, most, "", which)


@dataclass(frozen=True)
class KlAtOne:
    """The same at temperature 1, which clients may ask for: what is likely there is what training at a lower one hardly visited."""

    name: str = "KL at temperature 1"

    def judge(self, found: Evaluation, settings: GateSettings) -> Verdict:
        if found.kl_nats_at_1 is None:
            return unmeasured(self.name, "the KL at temperature 1 was")
        kl, most = found.kl_nats_at_1, _most(found, settings)
        if not (math.isfinite(kl) and most > 0):
            return Verdict.error(self.name, f"KL {kl} of a budget of {found.kl_budget_nats} nats cannot be judged; evaluate again")
        return _compared(self.name, kl, most, " at temperature 1", "")


GATES = (KlBudget(), KlAtOne())
