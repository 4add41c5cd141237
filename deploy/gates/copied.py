"""Did it learn somebody's own words by heart?

A phrase that few people put into prompts and imported answers, and that the candidate says to others while base does not, is
memorised or planted. How such strings are found: `trainer/copied.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from deploy.config import GateSettings
from deploy.gates import Evaluation, Outcome, Verdict, unmeasured


@dataclass(frozen=True)
class NothingCopied:
    """It says nothing that only few people wrote."""

    name: str = "memorised"

    def judge(self, found: Evaluation, settings: GateSettings) -> Verdict:
        copied, most = found.copied, settings.max_copied
        if copied is None:
            return unmeasured(self.name, "strings that raters wrote were")
        verdict: Outcome = "pass" if copied.strings <= most else "fail"
        reason = f"says {copied.strings} <= {most} of {copied.known} strings that few people wrote, beyond what base says"
        if copied.strings > most:
            reason = f"says {copied.strings} > {most} strings of {copied.people} people, in {copied.answers} answers, beyond base's; "
            reason += "read them in the cycle's copied.json, leave out who wrote them, then train again"
        return Verdict(name=self.name, verdict=verdict, value=copied.strings, comparison="<=", threshold=most, reason=reason)


GATES = (NothingCopied(),)
