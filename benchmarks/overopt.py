"""Does the budget end PPO before a learned reward stops meaning anything, and does a second round of ratings repair it where it cannot?

    make bench-overopt              worlds 0-4 with the optimum inside what was rated, 0-2 with it outside; finished cells are kept
    QUICK=1 make bench-overopt      one world of each, few iterations: shows that it runs, too short to conclude from

Gold is the hidden utility of answers to prompts that nobody rated; its gain is over the base's. Inside: the released adapter's
gain as a share of the best along the same run within the KL budget; the control runs on without budget and stop, and what it
ends with is compared with the best of its own run. Outside: raters like more details than the base ever shows, so the reward
model's trend goes on where nobody has rated. Round 1 follows it; round 2 has its answers rated, refits on all ratings and starts
again from the base. Two variants of round 2 have as many ratings: of the base's answers again, and going on from round 1's adapter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from benchmarks.concierge import Judge
from benchmarks.harness import quick
from examples import load
from examples.base import Rater
from examples.concierge.world import World
from examples.ring import PPO
from feedback.snapshot import Outcome, Row
from trainer.budget import Run, Step
from trainer.config import PPOSettings, RewardModelSettings
from trainer.evaluation import Sampling, sample
from trainer.labels import Labels, features_of, from_snapshot
from trainer.policy import Policy
from trainer.ppo import Options, Score, Warmup, train
from trainer.reply import Reply
from trainer.reward_model import fit
from trainer.score import Normaliser, Scorer
from trainer.stages import split_raters

Kind = Literal["inside", "outside"]

COMPARISONS, MORE_COMPARISONS = 180, 720
LONG = 48
"""Iterations of a run that nothing ends."""
UNLIMITED_NATS = 1e6
"""A budget that no run reaches: beta starts at 0.0007 and falls."""
GOLD_SAMPLES = 16
"""Answers to each held-out prompt that gold is measured on; every checkpoint of a world is measured with the same seeds."""
CLIP = 4.0


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
    return ppo(iterations=LONG, kl_target_nats=UNLIMITED_NATS, patience=10 * LONG)


@dataclass(frozen=True)
class Curve:
    """A run, measured at every step."""

    steps: list[Step]
    golds: list[float]
    released: int
    stopped_because: str
    kl_target_nats: float
    last: dict[str, Tensor]
    """The adapter of the last step."""

    def gain(self, step: int) -> float:
        return self.golds[step] - self.golds[0]

    def as_json(self) -> dict[str, Any]:
        columns = ("score", "stop_score", "kl_nats", "reply_tokens", "finished")
        return {
            "gold": [round(gold, 4) for gold in self.golds],
            **{name: [None if getattr(s, name) is None else round(getattr(s, name), 4) for s in self.steps] for name in columns},
            "released": self.released,
            "stopped_because": self.stopped_because,
            "kl_target_nats": round(self.kl_target_nats, 3),
        }


class Town:
    """One world: its policy, its raters, and the hidden preference."""

    def __init__(self, seed: int, kind: Kind) -> None:
        self.seed, self.world = seed, World(seed, kind)
        self.example = replace(load("concierge", seed), raters=self.world.raters)
        self.policy = Policy.load(self.example.policy_dir(Path()), seed=seed)
        self.judge = Judge(self.world.utility, self.example, self.policy)
        self.start = self.policy.state()
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

    def rewards(self, rows: Sequence[Row]) -> tuple[Scorer, Scorer | None]:
        """The reward model of most raters, and that of the others, both on the scale of the base's answers."""
        how = RewardModelSettings(maps=("linear",), ridges=(0.3, 1.0, 3.0), folds=2) if quick() else RewardModelSettings()
        labels = from_snapshot(rows, self.policy, None)
        main, others = split_raters(labels, how.watch_share, how.watch_min_raters, how.watch_min_labels, how.seed)
        replies, features_ND = self.base

        def scorer(labels: Labels) -> Scorer:
            model = fit(labels, how)
            return Scorer(model, Normaliser.fit(model, [reply.prompt for reply in replies], features_ND), how.clip)

        return scorer(main), scorer(others) if others else None

    def known(self) -> Score:
        """The hidden preference as a reward: the prompt's own zero and one unit for all, as the reward model's scores have."""
        replies, _ = self.base
        texts = {reply.prompt: prompt for reply, prompt in zip(replies[::4], self.example.prompts, strict=True)}
        by_prompt_QS = self.judge.utilities([texts[reply.prompt] for reply in replies], replies).reshape(-1, 4)
        unit = by_prompt_QS.var(1).mean().sqrt()
        zeros = {reply.prompt: mean for reply, mean in zip(replies[::4], by_prompt_QS.mean(1), strict=True)}

        def score(replies: list[Reply], _: Tensor) -> Tensor:
            raw_B = self.judge.utilities([texts[reply.prompt] for reply in replies], replies)
            return ((raw_B - torch.stack([zeros[reply.prompt] for reply in replies])) / unit).clamp(-CLIP, CLIP)

        return score

    def climb(self, score: Score, stop: Scorer | None, settings: PPOSettings, start: dict[str, Tensor] | None = None) -> Curve:
        """PPO from the base or another adapter. What it scores is remembered, so that each step's gold can be measured afterwards."""
        states: list[dict[str, Tensor]] = []

        def remembered(replies: list[Reply], features_BD: Tensor) -> Tensor:
            states.append(self.policy.state())
            return score(replies, features_BD)

        self.policy.restore(start or self.start)
        replies, features_ND = self.base
        result = train(
            self.policy,
            list(dict.fromkeys(reply.prompt for reply in replies)),
            remembered,
            settings,
            max_tokens=self.example.max_tokens,
            temperature=self.example.temperature,
            seed=self.seed,
            options=Options(stop_score=stop, warmup=Warmup(replies, score(replies, features_ND))),
        )
        golds = [self.gold(state) for state in states]
        return Curve(result.steps, golds, result.released, result.stopped_because, result.kl_target_nats, states[-1])

    def gold(self, state: dict[str, Tensor]) -> float:
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
