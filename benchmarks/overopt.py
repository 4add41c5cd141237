"""Does the budget end PPO before a learned reward stops meaning anything, and does a second round of ratings repair it where it cannot?

    make bench-overopt              worlds 60-64 with the optimum inside what was rated, 60-62 with it outside; finished cells are kept
    QUICK=1 make bench-overopt      one world of each, few iterations: shows that it runs, too short to conclude from

Gold is the hidden utility of answers to prompts that nobody rated; its gain is over the base's. Inside: the released adapter's
gain as a share of the best along the same run within the KL budget. The control runs on without budget and stop, and what it ends
with is compared with the best of its own run. Outside: raters like more details than the base shows, so the reward model's trend
goes on where nobody has rated. Round 1 follows it; in round 2 its answers are rated, the reward model is fitted to all ratings and
PPO starts again from the base. Two variants of round 2 have as many ratings: of the base's answers once more, and going on from
round 1's adapter. All are compared with PPO on the hidden preference itself within the same budget, the best that can be reached.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from benchmarks.concierge import Judge
from benchmarks.harness import Report, quick
from examples import load
from examples.base import Rater
from examples.concierge.world import World
from examples.ring import PPO
from feedback.snapshot import Outcome, Row
from trainer.budget import Run, Step, Watched
from trainer.config import PPOSettings, RewardModelSettings
from trainer.critic import Warmup
from trainer.evaluation import Sampling, sample
from trainer.labels import features_of, from_snapshot
from trainer.policy import Policy
from trainer.ppo import Options, Score, train
from trainer.reply import Reply
from trainer.reward_model import RewardModel, fit, split_raters
from trainer.ridge import cross_validate
from trainer.score import Scorer

Kind = Literal["inside", "outside"]
Curve = dict[str, Any]
"""A run, as it is stored: a list for each of COLUMNS, and gold's gain over the base, which is None at steps that were not measured."""
Adapter = dict[str, Tensor]

INSIDE, OUTSIDE = range(60, 65), range(60, 63)
"""No setting was chosen on them."""
COMPARISONS, MORE_COMPARISONS, QUICK_COMPARISONS = 180, 720, 48
"""With thumbs on both answers 180 give about 500 ratings."""
FREE, LONG = 80, 32
"""Iterations of a run that nothing ends, and of all runs outside."""
UNLIMITED_NATS = 1e6
"""A budget that no run reaches: beta starts at 0.0007 and falls."""
WIDE_NATS = 10.0
"""The largest budget that the product chooses by itself; the usual one of some 2 nats does not lead beyond what was rated."""
EVERY = 4
"""Gold is measured at every fourth step of the long runs, and where something ends."""
GOLD_SAMPLES = 16
"""Answers to each held-out prompt that gold is measured on; all checkpoints of a world are measured with the same seed."""
COLUMNS = ("score", "stop_score", "kl_nats", "reply_tokens", "finished")


@dataclass(frozen=True)
class Hump:
    """Gain R(d) = d·(alpha - beta·f(d)) over the distance d = sqrt(KL), nats^(1/2) (Gao et al. 2022).

    f is ln for reinforcement learning, the identity for the best of n, which moves no farther than its reward asks for.
    """

    alpha: float
    beta: float
    r2: float
    """Share of the gains' variance that it explains."""
    peak: float
    """Where it turns; infinite where it does not."""

    @classmethod
    def fit(cls, distances: Sequence[float], gains: Sequence[float], *, best_of_n: bool = False) -> Hump:
        """Least squares over distances of at least 1: the logarithm's slope is infinite at 0, so that what lies near says little."""
        d, gain = (np.array(column) for column in zip(*[(d, g) for d, g in zip(distances, gains, strict=True) if d >= 1], strict=True))
        design = np.stack([d, -d * (d if best_of_n else np.log(d))], axis=1)
        (alpha, beta), *_ = np.linalg.lstsq(design, gain, rcond=None)
        residual, deviation = gain - design @ np.array([alpha, beta]), gain - gain.mean()
        peak = float("inf")
        if beta > 0:
            peak = float(alpha / (2 * beta) if best_of_n else np.exp(alpha / beta - 1))
        return cls(float(alpha), float(beta), float(1 - residual @ residual / (deviation @ deviation)), peak)


def ppo(**changed: object) -> PPOSettings:
    """As in the demonstration, but for what is changed; a quick run hardly moves."""
    quickly: dict[str, object] = {"iterations": 3, "rollouts": 32} if quick() else {}
    return PPOSettings.model_validate(PPO["concierge"] | changed | quickly)


def unlimited() -> PPOSettings:
    """Neither budget nor stop."""
    return ppo(iterations=FREE, kl_target_nats=UNLIMITED_NATS, patience=10 * FREE)


class Town:
    """One world: its policy, its raters, and the hidden preference."""

    def __init__(self, seed: int, kind: Kind) -> None:
        self.seed, self.world = seed, World(seed, kind)
        self.example = replace(load("concierge", seed), raters=self.world.raters)
        self.policy = Policy.load(self.example.policy_dir(Path()), seed=seed)
        self.judge = Judge(self.world.utility, self.example, self.policy)
        self.start = self.policy.state()
        self.zero = self.gold(self.start)
        replies = self.answers(self.example.prompts, 4, 100_000, reference=True)
        self.base = replies, features_of(self.policy, replies)

    def answers(self, prompts: Sequence[str], samples: int, stream: int, *, reference: bool) -> list[Reply]:
        how = Sampling(None, self.example.temperature, self.example.max_tokens, samples, self.seed * 1_000_003 + stream)
        return sample(self.policy, prompts, how, reference=reference)

    def rated(self, comparisons: int, stream: int, *, reference: bool) -> list[Row]:
        """Raters compare two answers of the base, or of the policy as it is, and give each a thumb."""
        rng = np.random.default_rng([self.seed, stream, comparisons])
        prompts, raters = self.example.prompts, self.world.raters
        asked = [prompts[i % len(prompts)] for i in range(comparisons)]
        replies = self.answers(asked, 2, stream, reference=reference)
        rows: list[Row] = []
        for index, who in enumerate(rng.permutation(comparisons)):
            prompt, rater, pair = asked[index], raters[int(who) % len(raters)], replies[2 * index : 2 * index + 2]
            (a, done_a), (b, done_b) = shown = [(self.policy.decode(reply.tokens), reply.finished) for reply in pair]
            opinions = [
                (shown, rater.choose(prompt, a, b, done_a, done_b, rng)),
                *(([one], rater.thumb(prompt, *one, rng)) for one in shown),
            ]
            rows += [_row(f"{stream}-{index}-{i}", rater, prompt, about, said) for i, (about, said) in enumerate(opinions) if said]
        return rows

    def rewards(self, rows: Sequence[Row], *, watched: bool = False) -> tuple[Scorer, Scorer | None]:
        """The reward model, as shipped, or that of most raters and that of the others; on the scale of the base's answers."""
        quickly: dict[str, object] = {"maps": ("linear",), "ridges": (0.3, 1.0, 3.0), "folds": 2} if quick() else {}
        # So few raters make no second reward model that may stop anything; here it is only looked at.
        few: dict[str, object] = {"watch_min_raters": 2, "watch_min_labels": 1} if watched else {}
        how = RewardModelSettings.model_validate(quickly | few)
        labels = from_snapshot(rows, self.policy, None)
        main, others = split_raters(labels, how.watch_share, how.watch_min_raters, how.watch_min_labels, how.seed)
        # As a cycle does: map and ridge are chosen once, on all ratings.
        chosen = cross_validate(labels, how)
        return self._scorer(fit(main, how, chosen), how.clip), self._scorer(fit(others, how, chosen), how.clip) if others else None

    def _scorer(self, model: RewardModel, clip: float) -> Scorer:
        return Scorer.fit(model, *self.base, clip)

    def climb(
        self, score: Score, stop: Scorer | None, settings: PPOSettings, *, every: int = EVERY, start: Adapter | None = None
    ) -> tuple[Curve, Adapter]:
        """PPO from the base or from another adapter: what was measured, and the adapter that is released."""
        states: list[Adapter] = []
        seen: list[Watched] = []

        def watch(replies: list[Reply], features_BD: Tensor) -> Watched:
            assert stop is not None
            seen.append(stop.watched(replies, features_BD))
            return seen[-1]

        def remembered(replies: list[Reply], features_BD: Tensor) -> Tensor:
            states.append(self.policy.state())
            return score(replies, features_BD)

        self.policy.restore(start or self.start)
        replies, features_ND = self.base
        from_base_N = score.base_scores if isinstance(score, Scorer) else score(replies, features_ND)
        result = train(
            self.policy,
            list(dict.fromkeys(reply.prompt for reply in replies)),
            remembered,
            settings,
            max_tokens=self.example.max_tokens,
            temperature=self.example.temperature,
            seed=self.seed,
            options=Options(watch=watch if stop else None, warmup=Warmup(replies, from_base_N)),
        )
        stopped = self.stopped(result.steps, seen) if stop else len(result.steps) - 1
        measured = {*range(0, len(states), every), result.released, stopped, len(states) - 1}
        return {
            "gain": [self.gold(state) - self.zero if step in measured else None for step, state in enumerate(states)],
            **{name: [getattr(step, name) for step in result.steps] for name in COLUMNS},
            "released": result.released,
            "stopped_because": result.stopped_because,
            "kl_target_nats": result.kl_target_nats,
            "other_raters_would_release": stopped,
        }, states[result.released]

    def stopped(self, steps: Sequence[Step], seen: Sequence[Watched]) -> int:
        """The step that the other raters' reward model alone would release."""
        run = Run(unlimited().model_copy(update={"patience": PPOSettings().patience}))
        for step, watched in zip(steps, seen, strict=True):
            run.beta_for(step.reply_tokens)
            if run.judge(step, self.policy, watched):
                break
            run.finish(step)
        return run.result(self.policy).released

    def gold(self, state: Adapter) -> float:
        self.policy.restore(state)
        asked, samples = (self.example.held_out[:8], 4) if quick() else (self.example.held_out, GOLD_SAMPLES)
        replies = self.answers(asked, samples, 200_000, reference=False)
        return float(self.judge.utilities([prompt for prompt in asked for _ in range(samples)], replies).mean())


def _row(event_id: str, rater: Rater, prompt: str, about: Sequence[tuple[str, bool]], outcome: Outcome) -> Row:
    ends = ["stop" if finished else "length" for _, finished in about]
    two = len(about) == 2
    return Row(
        event_id=event_id,
        kind="choice" if two else "thumb",
        rater=rater.id,
        subject=rater.id,
        cohorts=("simulated", rater.cohort),
        source="simulated",
        prompt=[{"role": "user", "content": prompt}],
        answer_a=about[0][0],
        answer_b=about[1][0] if two else None,
        finish_a=ends[0],
        finish_b=ends[1] if two else None,
        outcome=outcome,
        side="a" if two else None,
        adapter_a="",
        adapter_b="" if two else None,
        stamp=0,
    )


def inside(seed: int, comparisons: int) -> dict[str, Any]:
    """The run as shipped, and the one that nothing ends, from the same ratings."""
    town = Town(seed, "inside")
    rows = town.rated(comparisons, 1, reference=True)
    rewards = town.rewards(rows)
    chosen, _ = town.climb(*rewards, ppo(), every=1)
    free, _ = town.climb(*town.rewards(rows, watched=True), unlimited())
    return {"ratings": len(rows), "chosen": chosen, "free": free}


def labelled(seed: int, comparisons: int) -> dict[str, Any]:
    """Only the run that nothing ends: does its peak move with the number of ratings?"""
    town = Town(seed, "inside")
    rows = town.rated(comparisons, 1, reference=True)
    free, _ = town.climb(*town.rewards(rows, watched=True), unlimited())
    return {"ratings": len(rows), "free": free}


def outside(seed: int, comparisons: int) -> dict[str, Any]:
    """Two rounds, the variants of the second, and the best that can be reached."""
    town = Town(seed, "outside")
    wide, wider = (ppo(iterations=LONG, kl_target_nats=nats) for nats in (WIDE_NATS, 2 * WIDE_NATS))
    known, _ = town.climb(town.judge.reward(seed)[0], None, wide)
    of_base = town.rated(comparisons, 1, reference=True)
    first, adapter = town.climb(*town.rewards(of_base), wide)
    town.policy.restore(adapter)
    of_both = [*of_base, *town.rated(comparisons, 2, reference=False)]
    rewards = town.rewards(of_both)
    second, _ = town.climb(*rewards, wide)
    # Half of the way lies behind it already.
    on, _ = town.climb(*rewards, wider, start=adapter)
    static, _ = town.climb(*town.rewards([*of_base, *town.rated(comparisons, 3, reference=True)]), wide)
    return {"ratings": len(of_both), "known": known, "first": first, "second": second, "on": on, "static": static}


def best(curve: Curve, within_nats: float = UNLIMITED_NATS) -> float:
    """The greatest gain along a run, of measured steps within a budget."""
    steps = zip(curve["gain"], curve["kl_nats"], strict=True)
    return max(float(gain) for gain, kl in steps if gain is not None and kl <= within_nats)


def released(curve: Curve) -> float:
    return float(curve["gain"][curve["released"]])


def share(part: float, whole: float) -> float:
    """0 where nothing could be gained."""
    return part / whole if whole > 0 else 0.0


def shape(curve: Curve) -> dict[str, Any]:
    """Experiments 3 and 5 on one long run: is the proxy a line over sqrt(KL), gold a hump, and where would other raters have stopped?"""
    d = [max(kl, 0.0) ** 0.5 for kl in curve["kl_nats"]]
    measured = [step for step, found in enumerate(curve["gain"]) if found is not None]
    gains = [curve["gain"][step] for step in measured]
    peak = max(measured, key=lambda step: curve["gain"][step])
    last = len(d) - 1
    found: dict[str, Any] = {
        "proxy_line_r2": float(np.corrcoef(d, curve["score"])[0, 1] ** 2),
        "peak_step": peak,
        "peak_distance": d[peak],
        "stop_share": share(curve["gain"][curve["other_raters_would_release"]], best(curve)),
        "end_share": share(gains[-1], best(curve)),
    }
    if sum(d[step] >= 1 for step in measured) > 2:
        found["hump"] = vars(Hump.fit([d[step] for step in measured], gains))
    if curve["stop_score"][0] is not None:
        gap = [score - other for score, other in zip(curve["score"], curve["stop_score"], strict=True)]
        found |= {
            "gap_at_peak": gap[peak],
            "gap_at_end": gap[last],
            "other_raters_rose_after_peak": curve["stop_score"][last] - curve["stop_score"][peak],
        }
    return found


def main() -> int:
    torch.set_num_threads(1)  # so small a model gains little from a second one, and two runs fit on two cores
    report = Report("overopt", seed=0, rooms=("feedback", "trainer", "examples", "benchmarks/concierge.py"))
    few, many = (QUICK_COMPARISONS, 2 * QUICK_COMPARISONS) if quick() else (COMPARISONS, MORE_COMPARISONS)
    rows: list[dict[str, Any]] = []
    for seed in INSIDE[:1] if quick() else INSIDE:
        key = {"world": seed, "kind": "inside", "quick": quick()}
        found = report.cells.get({**key, "comparisons": few}, lambda s=seed: inside(s, few))  # type: ignore[misc]
        more = report.cells.get({**key, "comparisons": many}, lambda s=seed: labelled(s, many))  # type: ignore[misc]
        chosen, free = found["chosen"], found["free"]
        kept, control = share(released(chosen), best(chosen, chosen["kl_target_nats"])), share(free["gain"][-1], best(free))
        rows.append(
            {
                "world": seed,
                "kept": kept,
                "control": control,
                **found,
                "shape": shape(free),
                "more": more,
                "more_shape": shape(more["free"]),
            }
        )
        report.say(f"inside {seed}: keeps {kept:.2f} of the best within the budget, {control:.2f} of its own best without one")
    far: list[dict[str, Any]] = []
    for seed in OUTSIDE[:1] if quick() else OUTSIDE:
        found = report.cells.get({"world": seed, "kind": "outside", "quick": quick()}, lambda s=seed: outside(s, few))  # type: ignore[misc]
        shares = {name: share(released(found[name]), best(found["known"])) for name in ("first", "second", "on", "static")}
        far.append({"world": seed, "shares": shares, **found, "shape": shape(found["first"])})
        report.say(
            f"outside {seed}, of the best that can be reached: " + ", ".join(f"{name} {value:.2f}" for name, value in shares.items())
        )
    # A few iterations move little, so a quick run only shows that the figures come out.
    least, most = (-1e9, 1e9) if quick() else (0.0, 1.0)
    report.check(
        "inside, median share of the best within the budget that is kept", median(row["kept"] for row in rows), at_least=0.9 + least
    )
    report.check("outside, round 1, median share of the best", median(row["shares"]["first"] for row in far), at_most=0.8 * most)
    report.check("outside, round 2, median share of the best", median(row["shares"]["second"] for row in far), at_least=0.8 + least)
    control = median(row["control"] for row in rows)
    report.control(
        "inside, without budget and stop: what is left at the end is below 0.9 of the run's best", caught=quick() or control < 0.9
    )
    return report.finish({"inside": rows, "outside": far, "control": control})


if __name__ == "__main__":
    raise SystemExit(main())
