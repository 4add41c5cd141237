"""Guardrails of a canary: is it worse than the baseline arm in something that nobody votes on? Valid however often one looks.

People are assigned, so the person is the unit: one who writes a hundred times is one person. A person enters once for each of
`DEPTHS`, with the mean of their first 1, 4 or 16 figures; the first catches what breaks for everybody within few people, the others
what only long use shows, and steadier. Whoever enters is paired with the longest waiting person of the other arm, of the last `WAITING`
only: what happens to everybody for a while, as an outage does, would else be compared with the time before it. Each bounded difference
of a pair multiplies a fortune that cannot grow on average while the mean difference is the margin or less (betting as in `evalues.py`:
Waudby-Smith & Ramdas 2023); reaching 1/alpha' it stops the canary. All guardrails, depths and the sample-ratio check share one alpha in
equal parts (a union bound), so that all of them together stop a harmless canary with probability alpha at most.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Generic, Literal, TypeVar

import numpy as np

from deploy import answers
from deploy.answers import Answer
from deploy.gates import Verdict
from feedback.errors import ConfigError

Floats = np.ndarray[tuple[int, ...], np.dtype[np.float64]]
Arm = Literal["canary", "baseline"]

DEPTHS = (1, 4, 16)
"""A person enters with the mean of their first figures, so many."""
WAITING = 4
"""People of the arm that is ahead who wait for a partner; older ones go without. Where something begins and ends for both arms, twice so
many pairs are of different times: too few to stop a canary. One person in nine goes without for it."""
LEAST_PAIRS = 10
"""Pairs of people below which a guardrail that has not stopped the canary says nothing."""
BETS: Floats = np.geomspace(0.02, 0.9, 14)
"""Shares of the fortune, spread evenly because nobody knows the best one."""
SAMPLE_RATIO = "sample ratio"
PRIOR = 20.0
"""People of each arm that the sample-ratio check's prior is worth: a ratio off by a fifth is what it expects to find."""
HARMS: Floats = np.geomspace(0.002, 1.0, 60)
"""Shares of the span by which a canary is supposed to be worse, to say which harm would have stopped it."""
CHUNK = 256
"""Pairs that are weighed at once; bounds the memory of a look after a restart."""


@dataclass(frozen=True)
class Guardrail:
    """One way to be worse. Adding one is adding a row."""

    name: str
    what: str
    """Said in a verdict: '... rose by'."""
    margin: float
    """The canary may be worse by this much, in the unit below."""
    unit: Literal["points", "times", "sd"]
    """Shares, doublings (log2) or sd of the reward."""
    span: float
    """A difference of two people counts up to this, so that one extreme person cannot decide."""
    read: Callable[[Answer], float | None] | None = None
    """None: not of the answer itself; a score or a thumb comes later."""
    less_is_worse: bool = False

    def said(self, change: float) -> str:
        """A change to the worse in words, e.g. '+4.1 points', 'x2.00' or '-0.50 sd'."""
        towards = -change if self.less_is_worse else change
        if self.unit == "points":
            return f"{100 * towards:+.1f} points"
        return f"x{2**towards:.2f}" if self.unit == "times" else f"{towards:+.2f} sd"


GUARDRAILS = (
    Guardrail("errors", "answers that broke off", 0.01, "points", 1.0, answers.error),
    Guardrail("empty answers", "answers that say nothing", 0.01, "points", 1.0, answers.empty),
    Guardrail("latency", "time to the first token", math.log2(1.25), "times", 3.0, answers.latency),
    Guardrail("pace", "time for each further token", math.log2(1.25), "times", 3.0, answers.pace),
    Guardrail("longer", "length of an answer", math.log2(1.5), "times", 3.0, answers.length),
    Guardrail("shorter", "length of an answer", math.log2(1.5), "times", 3.0, answers.length, less_is_worse=True),
    Guardrail("refusals", "answers that refuse", 0.03, "points", 1.0, answers.refusal),
    Guardrail("repetition", "repeated word triples", 0.03, "points", 1.0, answers.repetition),
    Guardrail("language", "answers in another language than the question", 0.03, "points", 1.0, answers.foreign),
    Guardrail("JSON", "malformed answers where JSON was asked for", 0.03, "points", 1.0, answers.malformed),
    Guardrail("reward", "score by the reward model", 0.1, "sd", 4.0, less_is_worse=True),
    Guardrail("thumbs", "thumbs up among thumbs", 0.02, "points", 1.0, less_is_worse=True),
)


def with_margins(margins: Mapping[str, float]) -> tuple[Guardrail, ...]:
    """The guardrails with some margins changed. Raises ConfigError for a name that there is not, or a margin outside [0, span)."""
    spans = {each.name: each.span for each in GUARDRAILS}
    for name, margin in margins.items():
        if name not in spans:
            raise ConfigError(
                f"rollout.guard_margins: there is no guardrail '{name}'; there are {', '.join(spans)}", field="rollout.guard_margins"
            )
        if not 0 <= margin < spans[name]:
            raise ConfigError(f"rollout.guard_margins: {name} = {margin:g} is not in [0, {spans[name]:g})", field="rollout.guard_margins")
    return tuple(replace(each, margin=margins.get(each.name, each.margin)) for each in GUARDRAILS)


def bar(alpha: float) -> float:
    """The e-value at which any one test stops the canary: the number of tests by alpha."""
    return (len(GUARDRAILS) * len(DEPTHS) + 1) / alpha


def gains(differences: Floats, margins: Floats) -> Floats:
    """What each bet makes of each pair, in logs: log(1 + b·(d - m)/(1 + m)); pairs x margins x bets.

    Differences and margins are shares of the span, in [-1, 1]; a bet below 1 of what can be lost never loses all.
    """
    fair = (differences[:, None] - margins) / (1 + margins)
    return np.log1p(fair[:, :, None] * BETS)


def mixed(logs: Floats) -> Floats:
    """Log of the mean fortune over the bets, the last axis."""
    top = logs.max(axis=-1)
    found: Floats = top + np.log(np.exp(logs - top[..., None]).mean(axis=-1))
    return found


def path(differences: Floats, margin: float) -> Floats:
    """Log e-value after each pair, of the mean difference being `margin` or less; both as shares of the span."""
    return mixed(gains(differences, np.array([margin]))[:, 0].cumsum(axis=0))


T = TypeVar("T")


class Partners(Generic[T]):
    """Who waits for somebody of the other arm."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[Arm, T]] = deque(maxlen=WAITING)

    def meet(self, arm: Arm, entering: T) -> tuple[T, T] | None:
        """The canary's and the baseline's; None where the entering one has to wait, too."""
        if not self._waiting or self._waiting[0][0] == arm:
            self._waiting.append((arm, entering))
            return None
        _, partner = self._waiting.popleft()
        return (entering, partner) if arm == "canary" else (partner, entering)


@dataclass
class Evidence:
    """Of one guardrail at one depth: a confidence sequence of the mean difference of pairs, canary minus baseline, towards the worse."""

    guardrail: Guardrail
    entered: dict[Arm, int] = field(default_factory=lambda: {"canary": 0, "baseline": 0})
    pairs: int = 0
    total: float = 0.0

    def __post_init__(self) -> None:
        steps = np.geomspace(0.002, 0.99, 24)
        self.margins: Floats = np.concatenate([-steps[::-1], [0.0, self.guardrail.margin / self.guardrail.span], steps])
        self.margins.sort()
        self._logs = {1: np.zeros((len(self.margins), len(BETS))), -1: np.zeros((len(self.margins), len(BETS)))}
        self._best = {1: np.zeros(len(self.margins)), -1: np.zeros(len(self.margins))}
        self._harmed = np.zeros((len(HARMS), len(BETS)))
        self._spoiled_total = 0.0
        self._partners: Partners[float] = Partners()
        self._new: list[tuple[float, float]] = []

    def add(self, arm: Arm, value: float) -> None:
        """One more person's mean; weighed by `look`."""
        self.entered[arm] += 1
        if (pair := self._partners.meet(arm, value)) is not None:
            self._new.append(pair)

    def look(self) -> None:
        """Weigh the pairs that have come together."""
        sign = -1.0 if self.guardrail.less_is_worse else 1.0
        for start in range(0, len(self._new), CHUNK):
            canary, baseline = np.array(self._new[start : start + CHUNK]).T
            differences = np.clip(sign * (canary - baseline) / self.guardrail.span, -1.0, 1.0)
            self.total += float(differences.sum())
            self._suppose(differences, sign * ((sign > 0) - baseline))
            for side in self._logs:
                self._logs[side] += gains(side * differences, side * self.margins).sum(axis=0)
                self._best[side] = np.maximum(self._best[side], mixed(self._logs[side]))
        self.pairs += len(self._new)
        self._new.clear()

    @property
    def mean(self) -> float:
        """Of the pairs' differences, in the guardrail's unit."""
        return self.guardrail.span * self.total / max(self.pairs, 1)

    @property
    def log_e(self) -> float:
        """Highest log e-value so far against 'no worse than the margin'."""
        return float(self._best[1][self._at])

    @property
    def _at(self) -> int:
        return int(np.searchsorted(self.margins, self.guardrail.margin / self.guardrail.span))

    def _suppose(self, differences: Floats, spoiled: Floats) -> None:
        """What the pairs had made of each bet, had the canary done each harm. `spoiled`: their differences with the canary at its worst."""
        self._spoiled_total += float(spoiled.sum())
        shares = self.guardrail.unit == "points"
        worse = spoiled[:, None] if shares else np.clip(differences[:, None] + HARMS, -1.0, 1.0)
        margin = self.guardrail.margin / self.guardrail.span
        self._harmed += np.log1p((worse - margin)[:, :, None] / (1 + margin) * BETS).sum(axis=0)

    def detectable(self, bar: float) -> float | None:
        """The smallest mean difference, in the guardrail's unit, with which these pairs would have stopped the canary; None: none would.

        Latency, length and reward change for everybody, so every pair is worse by as much. A share is all or nothing: that share of the
        canary's people, drawn at random, had seen it at its worst, and the logs mix accordingly. Of `HARMS` the next one outwards.
        """
        logs, mean = self._logs[1][self._at], self.mean
        if float(mixed(logs)) >= math.log(bar):
            return mean
        supposed, means = self._harmed, mean + self.guardrail.span * HARMS
        if self.guardrail.unit == "points":
            supposed = (1 - HARMS[:, None]) * logs + HARMS[:, None] * self._harmed
            means = (1 - HARMS) * mean + HARMS * self._spoiled_total / max(self.pairs, 1)
        stopped = mixed(supposed) >= math.log(bar)
        return float(means[stopped.argmax()]) if stopped.any() else None

    def bounds(self, bar: float) -> tuple[float, float]:
        """Of the mean difference, each valid at all times with probability 1 - 1/bar; of the grid's points the next one outwards."""
        below = self.margins[self._best[1] >= math.log(bar)]
        above = self.margins[self._best[-1] >= math.log(bar)]
        span = self.guardrail.span
        return span * float(below.max(initial=-1.0)), span * float(above.min(initial=1.0))


def ratio_log_e(counts: Sequence[float], shares: Sequence[float]) -> float:
    """Log e-value of people not falling into the arms by `shares`: multinomial against a Dirichlet mixture around the shares.

    Lindon & Malek 2022, "Anytime-valid inference for multinomial count data": prod over arms of the rising factorials
    (p·K)_n over (K)_N, by prod p^n; K is `PRIOR` an arm. A martingale in people, so one may look after each.
    """
    weight, people = PRIOR * len(shares), float(sum(counts))
    found = math.lgamma(weight) - math.lgamma(weight + people)
    for count, share in zip(counts, shares, strict=True):
        found += math.lgamma(weight * share + count) - math.lgamma(weight * share) - count * math.log(share)
    return found


class Guards:
    """All guardrails of one canary. Figures come in the order in which answers ended."""

    def __init__(self, alpha: float, guardrails: Iterable[Guardrail] = GUARDRAILS) -> None:
        self.bar = bar(alpha)
        self.guardrails = tuple(guardrails)
        self._evidence = {(each.name, depth): Evidence(each) for each in self.guardrails for depth in DEPTHS}
        self._sums: dict[tuple[str, str], tuple[int, float]] = {}
        self._people: dict[str, Arm] = {}
        self._counts: dict[Arm, int] = {"canary": 0, "baseline": 0}
        self._ratio = 0.0

    def arrived(self, person: str, arm: Arm) -> None:
        """Somebody was assigned; told as often as one likes."""
        if person not in self._people:
            self._people[person] = arm
            self._counts[arm] += 1
            self._ratio = max(self._ratio, ratio_log_e(list(self._counts.values()), (0.5, 0.5)))

    def answered(self, person: str, arm: Arm, answer: Answer) -> None:
        """An answer has ended."""
        for each in self.guardrails:
            if each.read is not None and (value := each.read(answer)) is not None:
                self.measured(each.name, person, arm, value)

    def measured(self, name: str, person: str, arm: Arm, value: float) -> None:
        """One figure of one answer."""
        count, total = self._sums.get((name, person), (0, 0.0))
        count, total = count + 1, total + value
        self._sums[name, person] = count, total
        if count in DEPTHS:
            self._evidence[name, count].add(arm, total / count)

    @property
    def people(self) -> int:
        """Of the smaller arm, who have got an answer."""
        return min(self._evidence["errors", DEPTHS[0]].entered.values())

    def forget(self, people: Iterable[str]) -> None:
        """Drop what is kept by person. Sums over pairs stay: nobody can be found in them."""
        gone = set(people) & self._people.keys()
        for person in gone:
            del self._people[person]
        if gone:
            self._sums = {key: value for key, value in self._sums.items() if key[1] not in gone}

    def verdicts(self) -> list[Verdict]:
        """One for each guardrail and one of the sample ratio."""
        for evidence in self._evidence.values():
            evidence.look()
        return [*(self._judge(each) for each in self.guardrails), self._ratio_verdict()]

    def _judge(self, guardrail: Guardrail) -> Verdict:
        depths: Mapping[int, Evidence] = {depth: self._evidence[guardrail.name, depth] for depth in DEPTHS}
        depth, worst = max(depths.items(), key=lambda item: item[1].log_e)
        name, margin = f"guardrail {guardrail.name}", guardrail.margin
        harms = [harm for each in depths.values() if (harm := each.detectable(self.bar)) is not None]
        detectable = min(harms, default=None)
        if worst.log_e >= math.log(self.bar):
            # Where the margin is excluded, so is every smaller rise, and the bound is no smaller than the margin.
            low = max(worst.bounds(self.bar)[0], margin)
            counted = f"{worst.pairs} people an arm, the first {f'{depth} figures' if depth > 1 else 'figure'} of each"
            reason = (
                f"{guardrail.what}: {guardrail.said(worst.mean)} against the baseline, surely {guardrail.said(low)}, "
                f"worse than {guardrail.said(margin)} allowed ({counted}); train again, or see what the canary's answers share"
            )
            figures = {"value": low, "comparison": "<", "threshold": margin, "detectable": detectable}
            return Verdict(name=name, verdict="fail", reason=reason, **figures)
        first = depths[DEPTHS[0]]
        if first.pairs < LEAST_PAIRS:
            few = f"{guardrail.what}: {first.pairs} people in the smaller arm, at least {LEAST_PAIRS} are needed"
            return Verdict(name=name, verdict="inconclusive", reason=few, detectable=detectable)
        low, high = first.bounds(self.bar)
        reason = (
            f"{guardrail.what}: {guardrail.said(first.mean)} against the baseline, not surely worse than {guardrail.said(margin)}; "
            f"{guardrail.said(high)} cannot be ruled out with {first.pairs} people an arm"
        )
        figures = {"value": low, "comparison": "<", "threshold": margin, "detectable": detectable}
        return Verdict(name=name, verdict="pass", reason=reason, **figures)

    def _ratio_verdict(self) -> Verdict:
        counted = " and ".join(f"{count} in the {arm}" for arm, count in self._counts.items())
        name, evidence = f"guardrail {SAMPLE_RATIO}", math.exp(min(self._ratio, 700.0))
        figures = f"{counted}, evidence {evidence:.3g}"
        if self._ratio >= math.log(self.bar):
            reason = (
                f"people: {figures} >= {self.bar:g}: the arms are not of equal size, so they cannot be compared; "
                "find out where people of one arm get lost"
            )
            return Verdict(name=name, verdict="error", value=evidence, comparison="<", threshold=self.bar, reason=reason)
        reason = f"people: {figures} < {self.bar:g}, as assigned"
        return Verdict(name=name, verdict="pass", value=evidence, comparison="<", threshold=self.bar, reason=reason)
