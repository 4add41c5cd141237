"""Do the canary's statistics stop what is worse, for the right reason, and nothing else, with a look after every answer?

    make bench-canary           11 faults 100 times each, 400 canaries without a fault, 1,000 without a preference
    QUICK=1 make bench-canary   a few of each: shows that it runs

Simulated are people, not models: they arrive one after the other, most write once or twice and a few write a hundred times, and
answers to one person are alike. The rules are the product's: `deploy/guards.py`, `deploy/evalues.py`.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.harness import Report, quick
from deploy.config import RolloutSettings
from deploy.evalues import e_path, rater_means, threshold
from deploy.guards import DEPTHS, GUARDRAILS, SAMPLE_RATIO, Guardrail, Partners, bar, path, ratio_log_e

Floats = np.ndarray[Any, np.dtype[np.float64]]
Ints = np.ndarray[Any, np.dtype[np.int64]]

Pairs = tuple[Guardrail, Ints, Floats]

SETTINGS = RolloutSettings()
ANSWERS = 40_000
"""Of both arms together, before a canary counts as never stopped."""
ANSWERS_WITH_THUMBS = 100_000
"""Where thumbs must tell, which one answer in eight is given."""
LIMITS = (4_000, 16_000, ANSWERS_WITH_THUMBS)
"""Evidence is computed up to here first, because most is stopped early."""
FAULTS = {
    "errors": "errors",
    "latency": "latency",
    "empty answers": "empty answers",
    "early stop": "shorter",
    "repetition": "repetition",
    "refusals": "refusals",
    "wrong language": "language",
    "length": "longer",
    "broken JSON": "JSON",
    "reward": "reward",
    "thumbs": "thumbs",
}
"""What is planted, and the guardrail that must stop it."""
SAID = {
    "errors": "+5 points",
    "latency": "first token x2",
    "empty answers": "+5 points",
    "early stop": "each answer ends at a random point",
    "repetition": "one answer in five loops, half its triples",
    "refusals": "+10 points, and short",
    "wrong language": "+10 points",
    "length": "x3",
    "broken JSON": "+15 points of what asks for JSON",
    "reward": "-0.5 sd",
    "thumbs": "-10 points",
}
PEEKS = 50
"""Answers between two looks of the naive control."""
RATERS = 600


@dataclass(frozen=True)
class Traffic:
    """Answers of one canary in the order in which they ended."""

    person: Ints
    by_person: Ints
    """Their places, by person and in each person's order."""
    canary: np.ndarray[Any, np.dtype[np.bool_]]
    figures: Mapping[str, Floats]
    """By guardrail; NaN where an answer says nothing."""


def arrivals(rng: np.random.Generator, answers: int, lost: float) -> tuple[Ints, Ints]:
    """The person of each answer and the arm (1: canary) of each person. `lost`: share of the canary's people who are never recorded."""
    people = answers // 3
    # Most come once or twice, one in a hundred some fifty times; the canary's end cuts that to 3.8 in the mean.
    each = np.minimum(1 + rng.lognormal(0.4, 1.5, people).astype(int), 400)
    arm = rng.integers(0, 2, people)
    each[(arm == 1) & (rng.random(people) < lost)] = 0
    person = np.repeat(np.arange(people), each)
    # They arrive evenly over the canary, and come back after gaps that the busy ones have shorter.
    since = (rng.exponential(0.1, len(person)) / np.sqrt(each[person])).cumsum()
    first = np.concatenate([[0], each.cumsum()[:-1]])
    times = rng.random(people)[person] + since - since[np.minimum(first, len(since) - 1)][person]
    return person[np.argsort(times, kind="stable")][:answers], arm


def traffic(rng: np.random.Generator, fault: str | None) -> Traffic:
    """One canary. `fault` is one of `FAULTS`, `SAMPLE_RATIO` (one in five of the canary's people is lost) or None."""
    answers = ANSWERS_WITH_THUMBS if fault == "thumbs" else ANSWERS
    person, arm = arrivals(rng, answers, 0.2 if fault == SAMPLE_RATIO else 0.0)
    people, n = len(arm), len(person)
    canary = arm[person] == 1

    def share(mean: float, alike: float, rise: float = 0.0) -> Floats:
        """1 with a probability that is each person's own: Beta with this mean; the smaller `alike`, the more they differ."""
        of = rng.beta(mean * alike, (1 - mean) * alike, people)[person]
        # A rise makes that share of the other answers bad, so it is so many points nearly.
        found: Floats = (rng.random(n) < of + rise / (1 - mean) * canary * (1 - of)).astype(float)
        return found

    def normal(between: float, within: float, shift: float = 0.0) -> Floats:
        found: Floats = between * rng.normal(size=people)[person] + within * rng.normal(size=n) + shift * canary
        return found

    def planted(name: str, size: float) -> float:
        return size if fault == name else 0.0

    broke = share(0.01, 5, planted("errors", 0.05))
    silent = share(0.003, 5, planted("empty answers", 0.05))
    refuses = share(0.03, 4, planted("refusals", 0.1))
    length = 6.5 + normal(0.5, 0.8, planted("length", np.log2(3)))
    if fault == "early stop":
        length += np.where(canary, np.log2(np.maximum(rng.random(n), 0.01)), 0.0)
    length = np.where(refuses == 1, 4.0 + normal(0, 0.3), np.maximum(length, 0.0))
    repeats = np.minimum(0.02 * rng.lognormal(0, 0.7, people)[person] * rng.exponential(1, n), 1.0)
    if fault == "repetition":
        repeats = np.where(canary & (rng.random(n) < 0.2), 0.5, repeats)
    asks_json = (rng.random(people) < 0.15)[person] & (rng.random(n) < 0.8)
    thumbs = (rng.random(people) < 0.4)[person] & (rng.random(n) < 0.3)
    figures = {
        "errors": broke,
        "empty answers": silent,
        "latency": 8 + normal(0.5, 0.7, planted("latency", 1.0)),
        "pace": 5 + normal(0.3, 0.2),
        "longer": length,
        "shorter": length,
        "refusals": refuses,
        "repetition": repeats,
        "language": np.where(rng.random(n) < 0.7, share(0.01, 5, planted("wrong language", 0.1)), np.nan),
        "JSON": np.where(asks_json, share(0.05, 5, planted("broken JSON", 0.15)), np.nan),
        "reward": normal(0.5, 0.87, planted("reward", -0.5)),
        "thumbs": np.where(thumbs, 1 - share(0.3, 3, planted("thumbs", 0.1)), np.nan),
    }
    for name, values in figures.items():
        if name != "errors":
            gone = broke == 1 if name in ("empty answers", "latency") else (broke == 1) | (silent == 1)
            figures[name] = np.where(gone & (name != "thumbs"), np.nan, values)
    return Traffic(person, np.argsort(person, kind="stable"), canary, figures)


def entries(seen: Traffic, name: str) -> dict[int, tuple[Ints, Floats]]:
    """By depth: when each person's figure of this depth comes, and the mean of their figures up to it; in order."""
    values = seen.figures[name]
    mine = seen.by_person[~np.isnan(values[seen.by_person])]
    start = np.flatnonzero(np.diff(seen.person[mine], prepend=-1))
    nth = np.arange(1, len(mine) + 1) - np.repeat(start, np.diff(start, append=len(mine)))
    sums = np.concatenate([[0.0], values[mine].cumsum()])
    found = {}
    for depth in DEPTHS:
        at = np.flatnonzero(nth == depth)
        means = np.full(len(values), np.nan)
        means[mine[at]] = (sums[at + 1] - sums[at + 1 - depth]) / depth
        when = np.flatnonzero(~np.isnan(means))
        found[depth] = when, means[when]
    return found


def differences(guardrail: Guardrail, seen: Traffic) -> Iterator[tuple[Ints, Floats]]:
    """For each depth: when each pair of people is complete, and its difference as a share of the span."""
    sign = -1.0 if guardrail.less_is_worse else 1.0
    for when, means in entries(seen, guardrail.name).values():
        partners: Partners[int] = Partners()
        met = (partners.meet("canary" if on else "baseline", at) for at, on in enumerate(seen.canary[when].tolist()))
        one, other = np.array([pair for pair in met if pair is not None], int).reshape(-1, 2).T
        found = np.clip(sign * (means[one] - means[other]) / guardrail.span, -1.0, 1.0)
        yield np.maximum(when[one], when[other]), found


def first_stop(seen: Traffic) -> tuple[str, int] | None:
    """Which guardrail stops it first and after how many answers, looking after every one; None: never."""
    return stop_of(seen, pairs_of(seen), ratio_stop(seen))


def pairs_of(seen: Traffic) -> list[Pairs]:
    return [(each, *found) for each in GUARDRAILS for found in differences(each, seen)]


def stop_of(seen: Traffic, pairs: list[Pairs], lost: int | None, *, margins: bool = True) -> tuple[str, int] | None:
    for limit in LIMITS:
        stops = [(lost, SAMPLE_RATIO)] if lost is not None and lost <= limit else []
        for guardrail, when, found in pairs:
            if (until := int(np.searchsorted(when, limit))) == 0:
                continue
            over = path(found[:until], guardrail.margin / guardrail.span if margins else 0.0) >= np.log(bar(SETTINGS.guard_alpha))
            if over.any():
                stops.append((int(when[over.argmax()]) + 1, guardrail.name))
        if stops or limit >= len(seen.person):
            break
    return (min(stops)[1], min(stops)[0]) if stops else None


def ratio_stop(seen: Traffic) -> int | None:
    """After how many answers the arms turn out to be of unequal size."""
    first = np.sort(np.unique(seen.person, return_index=True)[1])
    in_canary = seen.canary[first].cumsum()
    for people in range(10, len(first) + 1, 10):
        counts = (float(in_canary[people - 1]), float(people - in_canary[people - 1]))
        if ratio_log_e(counts, (0.5, 0.5)) >= np.log(bar(SETTINGS.guard_alpha)):
            return int(first[people - 1]) + 1
    return None


def naive_stop(seen: Traffic) -> bool:
    """The control: the same figures and the same shared risk in z-tests of answers, looked at again and again."""
    # One-sided 2.5 % / 12 in a normal distribution.
    quantile = 2.865
    at = np.arange(500, ANSWERS + 1, PEEKS) - 1
    for guardrail in GUARDRAILS:
        values = seen.figures[guardrail.name] * (-1.0 if guardrail.less_is_worse else 1.0)
        means, variances = [], []
        for on in (seen.canary, ~seen.canary):
            use = on & ~np.isnan(values)
            value = np.where(use, values, 0.0)
            n = np.maximum(use.cumsum()[at], 1)
            mean = value.cumsum()[at] / n
            means.append(mean)
            variances.append(np.maximum((value**2).cumsum()[at] / n - mean**2, 1e-9) / n)
        if ((means[0] - means[1]) / np.sqrt(variances[0] + variances[1]) > quantile).any():
            return True
    return False


def faulty(fault: str, runs: int) -> dict[str, Any]:
    """The planted fault so many times: what stopped it, and after how many answers."""
    stops = [first_stop(traffic(rng, fault)) for rng in generators(fault, runs)]
    reason = FAULTS.get(fault, fault)
    right = [stop[1] for stop in stops if stop is not None and stop[0] == reason]
    return {
        "right": len(right) / runs,
        "median": float(np.median(right)) if right else None,
        "p90": float(np.quantile(right, 0.9)) if right else None,
        "reasons": dict(Counter(stop[0] if stop else "never" for stop in stops)),
    }


def harmless(runs: int) -> dict[str, Any]:
    """Canaries that are what the baseline is: how many are stopped with the margins, without any, and naively."""
    stopped, bare, naive = [], [], 0
    for rng in generators("none", runs):
        seen = traffic(rng, None)
        pairs, lost = pairs_of(seen), ratio_stop(seen)
        stopped += [stop[0] for stop in (stop_of(seen, pairs, lost),) if stop]
        bare += [stop[0] for stop in (stop_of(seen, pairs, lost, margins=False),) if stop]
        naive += naive_stop(seen)
    return {"stopped": len(stopped), "no_margins": len(bare), "naive": naive, "runs": runs, "reasons": dict(Counter(stopped + bare))}


def generators(what: str, runs: int) -> Sequence[np.random.Generator]:
    return [np.random.default_rng([zlib.crc32(what.encode()), run]) for run in range(runs)]


# --- the win test -------------------------------------------------------------------------------------------------------


def ballots(rng: np.random.Generator, tastes: Floats) -> tuple[Ints, Floats]:
    """The rater and the worth of each vote, in order: most vote a few times, some fifty; one vote in six is for neither."""
    each = np.minimum(1 + rng.lognormal(1.2, 0.9, len(tastes)).astype(int), 50)
    rater = np.repeat(np.arange(len(tastes)), each)
    rater = rater[np.argsort(rng.random(len(tastes))[rater] + rng.exponential(0.05, len(rater)), kind="stable")]
    worth = (rng.random(len(rater)) < tastes[rater]).astype(float)
    return rater, np.where(rng.random(len(rater)) < 1 / 6, 0.5, worth)


def means_of(rater: Ints, worth: Floats, votes: int) -> list[float]:
    """As the product takes them, in the order in which raters have given enough."""
    given: dict[str, list[float]] = {}
    complete: dict[str, list[float]] = {}
    for who, vote in zip(map(str, rater), worth, strict=True):
        if len(so_far := given.setdefault(who, [])) < votes:
            so_far.append(float(vote))
            if len(so_far) == votes:
                complete[who] = so_far
    return rater_means(complete, votes)


def undecided(runs: int) -> dict[str, Any]:
    """People of strong tastes that cancel out: how often it wins all the same, and how often if every vote were a person."""
    wins, votes, naive = 0, 0, 0
    for rng in generators("undecided", runs):
        rater, worth = ballots(rng, rng.beta(0.5, 0.5, RATERS))
        wins += bool((e_path(means_of(rater, worth, SETTINGS.votes_per_rater)) >= np.log(threshold(1, SETTINGS.alpha))).any())
        few = rater < 20
        votes += bool((e_path(list(worth[few])) >= np.log(threshold(1, SETTINGS.alpha))).any())
        counts = np.arange(1, len(worth) + 1)
        mean = worth.cumsum() / counts
        sd = np.sqrt(np.maximum((worth**2).cumsum() / counts - mean**2, 1e-9))
        naive += bool(((mean - 0.5) / (sd / np.sqrt(counts)) > 1.645)[9:].any())
    return {"wins": wins, "votes_of_20": votes, "naive": naive, "runs": runs}


def preferred(runs: int, votes: int) -> dict[str, Any]:
    """Raters with enough votes until the first promotion's evidence, where people prefer it with 60 % in the mean (Beta(3, 2))."""
    needed = []
    for rng in generators("preferred", runs):
        rater, worth = ballots(rng, rng.beta(3.0, 2.0, 4 * RATERS))
        over = e_path(means_of(rater, worth, votes)) >= np.log(threshold(1, SETTINGS.alpha))
        needed.append(int(over.argmax()) + 1 if over.any() else 4 * RATERS)
    return {"median": float(np.median(needed)), "p80": float(np.quantile(needed, 0.8))}


def main() -> int:
    rooms = ("deploy/guards.py", "deploy/evalues.py", "deploy/config.py")
    report = Report("canary", seed=0, rooms=rooms)
    times, calm, nulls, likes = (4, 12, 60, 40) if quick() else (100, 400, 1000, 300)
    table = []
    for fault in [*FAULTS, SAMPLE_RATIO]:
        row = report.cells.get({"fault": fault, "runs": times}, lambda f=fault: faulty(f, times))  # type: ignore[misc]
        said = SAID.get(fault, "one in five of the canary's people is lost")
        table.append(
            {"fault": fault, "planted": said, "right": row["right"], "answers, median": row["median"], "answers, 90 %": row["p90"]}
        )
        report.say(
            f"{fault}: right {row['right']:.0%}, median {row['median']} answers, 90 % {row['p90']}; {row['reasons']}; {row['seconds']} s"
        )
        report.check(f"{fault}, {said}: stopped for the right reason", row["right"], at_least=0.9)
    same = report.cells.get({"what": "harmless", "runs": calm}, lambda: harmless(calm))
    null = report.cells.get({"what": "undecided", "runs": nulls}, lambda: undecided(nulls))
    report.say(f"harmless: {same}")
    report.say(f"undecided: {null}")
    report.check(f"harmless canaries stopped, of {calm}", same["stopped"] / calm, at_most=0.05)
    report.check(f"harmless canaries stopped without any margin, of {calm}", same["no_margins"] / calm, at_most=0.05)
    report.check(f"false promotions, of {nulls} with divided tastes and a look after every vote", null["wins"] / nulls, at_most=0.05)
    needed = {votes: report.cells.get({"votes": votes, "runs": likes}, lambda v=votes: preferred(likes, v)) for votes in (3, 6)}  # type: ignore[misc]
    report.say(f"raters needed at 60 %: {needed}")
    report.check("raters needed at 60 % preference, median, first promotion, 3 votes each", needed[3]["median"], at_most=200)
    naive = {"guardrails": same["naive"] / calm, "votes": null["naive"] / nulls}
    stopped, promoted = f"{naive['guardrails']:.1%} of harmless canaries", f"{naive['votes']:.1%} without a preference"
    words = f"naive peeking stops {stopped} and promotes {promoted} (> 20 %)"
    report.control(words, caught=min(naive.values()) > 0.2)
    return report.finish({"table": table, "harmless": same, "undecided": null, "raters_needed": needed})


if __name__ == "__main__":
    raise SystemExit(main())
