"""Did it learn from what people said?"""

from __future__ import annotations

import math
from dataclasses import dataclass

from deploy.config import GateSettings
from deploy.gates import Evaluation, Verdict


@dataclass(frozen=True)
class Real:
    """Ratings as people gave them. A control run must not reach anybody, whatever its figures."""

    name: str = "real labels"

    def judge(self, found: Evaluation, settings: GateSettings) -> Verdict:
        if found.shuffled:
            return Verdict.failed(
                self.name, "the ratings were shuffled as a control, so it learned nothing that people said; train without"
            )
        return Verdict.passed(self.name, "the ratings are as people gave them")


@dataclass(frozen=True)
class RewardModelWorks:
    """Does the reward model foresee ratings on prompts it never saw? A gain under one that does not means nothing.

    This is what refuses shuffled labels even unannounced: PPO raises the score of any reward model, also of a random one.
    """

    name: str = "reward model"

    def judge(self, found: Evaluation, settings: GateSettings) -> Verdict:
        gain, least = found.likelihood_gain, settings.min_likelihood_gain
        if gain.low is None or not math.isfinite(gain.low):
            return Verdict.inconclusive(
                self.name, f"{gain.n} ratings of a single prompt cannot be foreseen; have people rate other prompts"
            )
        figures = f"foresees {gain.n} ratings of unseen prompts by {gain.mean:+.3f} nats each, at least {gain.low:+.3f}"
        figure = {"name": self.name, "value": gain.low, "comparison": ">", "threshold": least}
        if gain.low > least:
            return Verdict(**figure, verdict="pass", reason=f"{figures} > {least:g}")
        verdict = "fail" if gain.mean <= least else "inconclusive"
        return Verdict(**figure, verdict=verdict, reason=f"{figures}, needed > {least:g}; collect more ratings and train again")


GATES = (Real(), RewardModelWorks())
