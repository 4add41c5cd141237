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
        inside = kl <= most
        which = (
            "" if whole is None else f" ({whole:.2f} of the {found.finished_replies} that ended by themselves, {found.kl_nats:.2f} of all)"
        )
        figures = f"{kl:.2f} nats an answer from base {'<=' if inside else '>'} {most:.2f}{which}"
        return Verdict(
            name=self.name,
            verdict="pass" if inside else "fail",
            value=kl,
            comparison="<=",
            threshold=most,
            reason=figures if inside else f"{figures}; train again with a smaller ppo.kl_target_nats",
        )


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
        inside = kl <= most
        figures = f"{kl:.2f} nats an answer from base at temperature 1 {'<=' if inside else '>'} {most:.2f}"
        return Verdict(
            name=self.name,
            verdict="pass" if inside else "fail",
            value=kl,
            comparison="<=",
            threshold=most,
            reason=figures if inside else f"{figures}; train again with a smaller ppo.kl_target_nats",
        )


GATES = (KlBudget(), KlAtOne())
