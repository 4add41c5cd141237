"""Do people get better answers, as far as the reward model knows?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from deploy.config import GateSettings
from deploy.gates import Evaluation, Outcome, Verdict


@dataclass(frozen=True)
class RewardGain:
    """Do held-out prompts get better answers, surely, under the reward model?"""

    against: Literal["stable", "base"]

    @property
    def name(self) -> str:
        return f"gain over {self.against}"

    def judge(self, found: Evaluation, settings: GateSettings) -> Verdict:
        gain, least = (found.reward_gain_stable if self.against == "stable" else found.reward_gain_base), settings.min_gain
        if gain.n < settings.min_prompts:
            why = f"{gain.n} held-out prompts, at least {settings.min_prompts} are needed to judge a gain; add held-out prompts"
            return Verdict.inconclusive(self.name, why)
        if gain.low is None or not math.isfinite(gain.low):
            return Verdict.error(self.name, f"the gain {gain.mean:+.3f} over {self.against} came without a lower bound; evaluate again")
        figures = f"gain {gain.mean:+.3f} sd over {self.against}, at least {gain.low:+.3f}"
        if gain.low > least:
            verdict: Outcome = "pass"
            reason = f"{figures} > {least:g}"
        elif gain.mean <= least:
            verdict, reason = (
                "fail",
                f"{figures}, needed > {least:g}: it did not learn what was rated; collect more ratings and train again",
            )
        else:
            verdict = "inconclusive"
            reason = f"{figures}, needed > {least:g}: {gain.n} held-out prompts cannot tell; add held-out prompts or ratings"
        return Verdict(name=self.name, verdict=verdict, value=gain.low, comparison=">", threshold=least, reason=reason)


GATES = (RewardGain("stable"), RewardGain("base"))
