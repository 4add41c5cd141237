"""What PPO's parts are worth on the concierge: RLOO and a cold critic in its place, and an engine that misreports what it sampled.

    make bench-ablations             worlds 0-4, an engine's in 0-2; finished cells are kept, so an interrupted run goes on
    QUICK=1 make bench-ablations     one world, two iterations: shows that it runs, too short to conclude from

The hidden preference itself is the reward, so nothing but the optimiser differs. W is how often an answer of the released
adapter beats the base's by that preference, on prompts that were not trained on.

An engine's log-probabilities are wrong by normal noise, or are those before the temperature. The trainer computes them
again and weighs tokens by how much the two differ. The broken variant, which must be caught, trusts the engine.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor

from benchmarks.concierge import Judge
from benchmarks.harness import Report, quick
from examples import load
from examples.concierge.world import World
from examples.ring import PPO
from trainer.config import PPOSettings
from trainer.policy import Policy
from trainer.ppo import Options, train
from trainer.rollouts import LocalRollouts, Sampled, alarms

WORLDS, MISMATCH_WORLDS = range(5), range(3)
ITERATIONS, ROLLOUTS = 12, 96
MISMATCH_TEMPERATURE = 0.7
SMALL, LARGE = 0.1, 1.5
"""Noise of the reported log-probabilities, nats a token; weights exp(noise) keep exp(-noise²) of the sample: 0.99 and 0.11."""


class Trusting(Policy):
    """The broken variant: takes the engine's log-probabilities for its own instead of computing them again."""

    reported_BT: Tensor | None = None

    def passes(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        own_BT, *rest = super().passes(*args, **kwargs)
        believed_BT = own_BT if self._adapter_off or self.reported_BT is None else self.reported_BT
        return (believed_BT, *rest)  # type: ignore[return-value]


@dataclass
class Misreporting:
    """Samples from the policy and reports log-probabilities with normal noise, or those before the temperature; a `Rollouts`."""

    policy: Policy
    noise: float = 0.0
    raw: bool = False
    heard: list[tuple[str, ...]] = field(default_factory=list)
    """Of each call, the alarms that a trainer hears who knows better."""

    def sample(self, prompts: Sequence[tuple[int, ...]], *, max_tokens: int, temperature: float, seed: int) -> Sampled:
        replies = LocalRollouts(self.policy).sample(prompts, max_tokens=max_tokens, temperature=temperature, seed=seed).replies
        if isinstance(self.policy, Trusting):
            self.policy.reported_BT = None
        true_BT, mask_BT = self.policy.logprobs(replies, temperature)
        said_BT = self.policy.logprobs(replies, 1.0)[0] if self.raw else true_BT
        drawn_BT = torch.randn(said_BT.shape, generator=torch.Generator().manual_seed(seed))
        said_BT = said_BT + self.noise * drawn_BT * mask_BT
        self.heard.append(alarms(true_BT, said_BT, mask_BT))
        if isinstance(self.policy, Trusting):
            self.policy.reported_BT = said_BT
            return Sampled(replies)
        return Sampled(replies, said_BT)


@dataclass(frozen=True)
class Arm:
    """One way to train."""

    algorithm: str = "ppo"
    warm: bool = True
    noise: float = 0.0
    raw: bool = False
    trusting: bool = False
    reports: bool = False
    """Whether an engine says how likely its tokens were; without one PPO needs no weights."""


ALGORITHMS = {"PPO": Arm(), "RLOO": Arm("rloo"), "PPO, cold critic": Arm(warm=False)}
MISMATCHES = {
    "exact": Arm(reports=True),
    "small noise": Arm(reports=True, noise=SMALL),
    "large noise": Arm(reports=True, noise=LARGE),
    "before the temperature": Arm(reports=True, raw=True),
    "small noise, trusted": Arm(reports=True, noise=SMALL, trusting=True),
    "large noise, trusted": Arm(reports=True, noise=LARGE, trusting=True),
    "before the temperature, trusted": Arm(reports=True, raw=True, trusting=True),
}


def trained(arm: Arm, world: int, temperature: float) -> dict[str, Any]:
    """One run of this arm, and its W."""
    example = replace(load("concierge", world), temperature=temperature)
    policy = (Trusting if arm.trusting else Policy).load(example.policy_dir(Path()), seed=world)
    judge = Judge(World(world).utility, example, policy)
    score, warmup = judge.reward(world)
    size = {"iterations": 2, "rollouts": 32} if quick() else {"iterations": ITERATIONS, "rollouts": ROLLOUTS}
    settings = PPOSettings.model_validate(PPO["concierge"] | size | {"algorithm": arm.algorithm})
    rollouts = Misreporting(policy, arm.noise, arm.raw) if arm.reports else None
    result = train(
        policy,
        list(dict.fromkeys(reply.prompt for reply in warmup.replies)),
        score,
        settings,
        max_tokens=example.max_tokens,
        temperature=temperature,
        seed=world,
        options=Options(rollouts=rollouts, warmup=warmup if arm.warm else None),
    )
    released = result.steps[result.released]
    return {
        "wins": judge.wins(policy, world),
        "kl_nats": released.kl_nats,
        "scores": [round(step.score, 4) for step in result.steps],
        "explained_variance": [round(step.explained_variance, 3) for step in result.steps],
        "first_ratio_deviation": max(step.first_ratio_deviation for step in result.steps),
        "clipfrac": mean(step.clipfrac for step in result.steps),
        "alarms": sorted({_kind(words) for heard in rollouts.heard for words in heard}) if rollouts else [],
        "alarmed": mean(bool(heard) for heard in rollouts.heard) if rollouts else 0.0,
        "stopped_because": result.stopped_because,
    }


def _kind(words: str) -> str:
    """An alarm without its figures."""
    return re.split(r" -?\d", words)[0]


def gap(better: Sequence[float], other: Sequence[float]) -> tuple[float, float]:
    """Mean and sd over worlds of the paired difference; a single world has no sd."""
    gaps = [a - b for a, b in zip(better, other, strict=True)]
    return mean(gaps), stdev(gaps) if len(gaps) > 1 else math.inf


def pace(rows: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]]) -> list[float]:
    """Mean score over the iterations that both arms had in each world: who learns faster has more."""
    return [mean(row["scores"][: min(len(row["scores"]), len(other["scores"]))]) for row, other in zip(rows, others, strict=True)]


def concluded(report: Report, found: dict[str, list[dict[str, Any]]]) -> int:
    """The checks; a quick run hardly moves, so of its W it asks nothing."""

    def wins(name: str) -> list[float]:
        return [float(row["wins"]) for row in found[name]]

    def slower(name: str, than: str) -> float:
        return gap(pace(found[than], found[name]), pace(found[name], found[than]))[0]

    difference, spread = gap(wins("PPO"), wins("RLOO"))
    report.check("PPO and RLOO: difference of W by its sd over worlds", abs(difference) / spread, at_most=1.0)
    cold = slower("PPO, cold critic", "PPO")
    report.check("what a warm critic adds to the score, mean over iterations, sd", cold, at_least=-10.0 if quick() else 0.0)
    difference, spread = gap(wins("exact"), wins("small noise"))
    report.check("small noise, weighted: W lost, by its sd over worlds", difference / spread, at_most=1.0)
    again = [row["first_ratio_deviation"] for name in ("small noise", "large noise", "before the temperature") for row in found[name]]
    report.check("computed again: largest |first ratio - 1|", max(again), at_most=1e-6)
    alarmed = {name: [float(row["alarmed"]) for row in found[name]] for name in MISMATCHES}
    report.check("share of iterations with an alarm, small noise", max(alarmed["small noise"]), at_most=0.0)
    report.check("share of iterations with an alarm, large noise", min(alarmed["large noise"]), at_least=1.0)
    heard = {alarm for row in found["large noise"] for alarm in row["alarms"]}
    report.check("large noise is heard as a small effective sample", float("effective sample size" in heard), at_least=1)
    trusted = "large noise, trusted"
    off = min(row["first_ratio_deviation"] for row in found[trusted]) > 0.1
    caught = off and (quick() or slower(trusted, "exact") > 0)
    report.control("an engine trusted with large noise: the first ratio is not 1, and learning is slower", caught=caught)
    slow = {name: slower(name, "exact") for name in MISMATCHES}
    return report.finish({"arms": found, "slower_than_exact": slow})


def main() -> int:
    torch.set_num_threads(1)  # so small a model gains little from a second one, and two runs fit on two cores
    report = Report("ablations", seed=0, rooms=("trainer", "examples", "benchmarks/concierge.py"))
    found: dict[str, list[dict[str, Any]]] = {}
    for arms, temperature, worlds in ((ALGORITHMS, 1.0, WORLDS), (MISMATCHES, MISMATCH_TEMPERATURE, MISMATCH_WORLDS)):
        for name, arm in arms.items():
            found[name] = []
            for world in worlds[:1] if quick() else worlds:
                key = {"arm": name, "world": world, "quick": quick()}
                found[name].append(report.cells.get(key, lambda a=arm, w=world, t=temperature: trained(a, w, t)))  # type: ignore[misc]
            report.say(f"{name}: W " + " ".join(f"{row['wins']:.2f}" for row in found[name]))
    return concluded(report, found)


if __name__ == "__main__":
    raise SystemExit(main())
