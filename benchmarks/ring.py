"""Does PPO from a reward model learned from ratings win by the preference that nobody told it? And shuffled ratings must not.

    make bench-ring              worlds 0-4, two seeds each; finished cells are kept, so an interrupted run goes on
    QUICK=1 make bench-ring      one world, one seed, few iterations: shows that it runs, too short to conclude from
    SEALED=1 make bench-ring     worlds 100-109, which no setting was chosen on

The figure is g = (W - 1/2) / (W_oracle - 1/2). W is how often the candidate's answer beats the base's by the hidden
preference, on prompts that nobody rated; the oracle is the same PPO with the same KL budget, rewarded with that
preference itself. Ratings go through the product's event log, archive and snapshot, learning is `run_cycle`.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.concierge import Judge, turn
from benchmarks.harness import Report, quick, refusals
from examples import load
from examples.concierge.world import World
from examples.ring import PPO
from trainer.config import CycleSettings, PPOSettings, RewardModelSettings
from trainer.policy import Policy
from trainer.ppo import train
from trainer.schedule import LearningSettings
from trainer.stages import read_json

WORLDS, SEALED_WORLDS, SEEDS = range(5), range(100, 110), range(2)
COMPARISONS, QUICK_COMPARISONS = 180, 48
"""With thumbs on both answers, about 500 ratings; and what a quick run makes do with."""
QUICK_ITERATIONS = 3


def learned(world: int, seed: int, *, shuffled: bool) -> dict[str, Any]:
    """One turn of the product: ratings, snapshot, cycle. Its W."""
    example = load("concierge", world)
    with tempfile.TemporaryDirectory() as name:
        cycle = CycleSettings(shuffle_labels=shuffled, seed=seed, seeds=1)
        settings = LearningSettings(reward_model=_reward_model(), ppo=_ppo(), cycle=cycle)
        result, ratings = turn(example, QUICK_COMPARISONS if quick() else COMPARISONS, seed, settings, Path(name))
        candidate = Policy.load(example.policy_dir(Path(name)), adapter=result.folder / "policy")
        ppo, reward = read_json(result.folder / "ppo.json"), read_json(result.folder / "reward.json")
        return {
            "wins": Judge(World(world).utility, example, candidate).wins(candidate, seed),
            "ratings": ratings,
            "kl_nats": ppo["steps"][ppo["released"]]["kl_nats"],
            "kl_target_nats": ppo["kl_target_nats"],
            "held_out_accuracy": reward["accuracy"]["prompts"],
            "likelihood_gain": reward["likelihood_gain"],
            "stopped_because": ppo["stopped_because"],
            "refused": refusals(result.evaluation),
            "stage_seconds": result.seconds,
        }


def oracle(world: int, seed: int, kl_target_nats: float) -> dict[str, Any]:
    """The same PPO, rewarded with the hidden preference itself. Its W."""
    example = load("concierge", world)
    policy = Policy.load(example.policy_dir(Path()), seed=seed)
    judge = Judge(World(world).utility, example, policy)
    score, base = judge.reward(seed)
    prompts = list(dict.fromkeys(reply.prompt for reply in base.replies))
    settings = _ppo().model_copy(update={"kl_target_nats": kl_target_nats})
    result = train(policy, prompts, score, settings, max_tokens=example.max_tokens, temperature=example.temperature, seed=seed)
    return {"wins": judge.wins(policy, seed), "kl_nats": result.steps[result.released].kl_nats}


def _ppo() -> PPOSettings:
    """As in the demo, but for a quick run, which hardly moves."""
    quickly: dict[str, object] = {"iterations": QUICK_ITERATIONS, "rollouts": 32} if quick() else {}
    return PPOSettings.model_validate(PPO["concierge"] | quickly)


def _reward_model() -> RewardModelSettings:
    """As shipped, but for a quick run, which compares little."""
    return RewardModelSettings(maps=("linear",), ridges=(0.3, 1.0, 3.0), folds=2, grid_extensions=0) if quick() else RewardModelSettings()


def gain(wins: float, oracle_wins: float) -> float:
    """g; 0 where even the oracle did not win."""
    return (wins - 0.5) / (oracle_wins - 0.5) if oracle_wins > 0.5 else 0.0


def main() -> int:
    torch.set_num_threads(1)  # so small a model gains little from a second one, and two runs fit on two cores
    sealed = os.environ.get("SEALED", "") not in ("", "0")
    worlds: Sequence[int] = SEALED_WORLDS if sealed else WORLDS
    seeds: Sequence[int] = SEEDS
    if quick():
        worlds, seeds = worlds[:1], seeds[:1]
    report = Report("ring-sealed" if sealed else "ring", seed=0, rooms=("feedback", "trainer", "examples/concierge"))
    rows: list[Mapping[str, Any]] = []
    controls: list[Mapping[str, Any]] = []
    for world in worlds:
        for seed in seeds:
            key = {"world": world, "seed": seed, "quick": quick()}
            real = report.cells.get({**key, "what": "learned"}, lambda w=world, s=seed: learned(w, s, shuffled=False))  # type: ignore[misc]
            target = float(real["kl_target_nats"])
            best = report.cells.get({**key, "what": "oracle"}, lambda w=world, s=seed, t=target: oracle(w, s, t))  # type: ignore[misc]
            rows.append({"world": world, "seed": seed, "g": gain(real["wins"], best["wins"]), "learned": real, "oracle": best})
            report.say(f"world {world} seed {seed}: W {real['wins']:.3f}, oracle {best['wins']:.3f}, g {rows[-1]['g']:.2f}")
        broken = report.cells.get({**key, "what": "shuffled"}, lambda w=world, s=seed: learned(w, s, shuffled=True))  # type: ignore[misc]
        controls.append(broken)
        report.say(f"world {world}: W {broken['wins']:.3f} with shuffled labels; {broken['stopped_because']}")
    gains = [float(row["g"]) for row in rows]
    # A few iterations move little, so a quick run only shows that the figures come out.
    report.check("median gain of the oracle's", median(gains), at_least=-10.0 if quick() else 0.7)
    report.check("worst gain of the oracle's", min(gains), at_least=-10.0 if quick() else 0.5)
    caught = all(each["wins"] <= 0.55 and each["refused"] for each in controls)
    report.control("the same cycle on shuffled ratings: W <= 0.55, and the gates refuse it", caught=caught)
    passed = sum(not row["learned"]["refused"] for row in rows)
    return report.finish({"cells": rows, "shuffled": controls, "passed_the_gates": f"{passed} of {len(rows)}"})


if __name__ == "__main__":
    raise SystemExit(main())
