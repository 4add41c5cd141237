"""Do answers stay about as long, and do they end?"""

from __future__ import annotations

from dataclasses import dataclass

from deploy.config import GateSettings
from deploy.gates import Counted, Evaluation, Verdict


@dataclass(frozen=True)
class Length:
    """Answers neither balloon nor shrivel."""

    name: str = "length"

    def judge(self, found: Evaluation, settings: GateSettings) -> Verdict:
        before, after, factor = found.length.base, found.length.candidate, settings.length_factor
        if before <= 0:
            return Verdict.error(self.name, f"base's answers have {before:g} tokens, so a change cannot be judged; evaluate again")
        ratio = after / before
        figures = f"{before:.1f} tokens before, {after:.1f} after, {ratio:.2f} times as long"
        least = 0.0 if settings.allow_shorter else 1 / factor
        longer = ratio >= 1 or settings.allow_shorter
        inside = least <= ratio <= factor
        limit = f"{factor:g} times at most" if longer else f"{least:.2f} times at least"
        hint = "gates.length_factor" if longer else "gates.allow_shorter"
        return Verdict(
            name=self.name,
            verdict="pass" if inside else "fail",
            value=ratio,
            comparison="<=" if longer else ">=",
            threshold=factor if longer else least,
            reason=f"{figures}, {limit}" + ("" if inside else f"; if that is what raters asked for, change {hint}"),
        )


GATES = (
    Length(),
    Counted("answers that end", "finished", -1, "max_unfinished_rise", "they run into the length limit; rate brevity or raise max_tokens"),
)
