"""Behaviour carries the preferences of whoever did the rating: opposite raters, opposite adapters, from the same answers.

    make bench-crossover             ten concierge seeds, then SmolLM2 once; finished cells are kept, so an interrupted run goes on
    QUICK=1 make bench-crossover     one concierge seed, few iterations: shows that it runs, too short to conclude from
    ONLY=concierge make bench-...    computes the cells of one policy and concludes nothing; so two processes can share the work

P and Q want opposite styles (`sides.py`). Both rate the very same answers of the base, some 500 ratings each, and each
side's ratings go through the product's event log, archive, snapshot and cycle. Both adapters are judged, on prompts that
nobody rated, by twelve people of each side who rated nothing: W is how often they like its answer better than the base's.
The control is P's ratings, shuffled.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.concierge import Shown, shown, turn_on
from benchmarks.harness import FOLDER, Report, quick, refusals
from benchmarks.sides import SIDES, Sides, concierge, smollm2
from benchmarks.smollm2 import Asked, answers, win_rate
from deploy.gates import Evaluation
from examples.ring import GATES, PPO
from trainer.config import CycleSettings, PPOSettings, RewardModelSettings
from trainer.policy import Policy
from trainer.schedule import LearningSettings
from trainer.stages import read_json

SEEDS = {"concierge": 10, "smollm2": 1}
MAKE: dict[str, Callable[[int], Sides]] = {"concierge": concierge, "smollm2": smollm2}
COMPARISONS, QUICK_COMPARISONS = 180, 48
"""With thumbs on both answers, about 500 ratings; and what a quick run makes do with."""
OWN, OTHER = 0.60, 0.50
FACTS_POINTS = 2.0
HELD_OUT_STREAM = 900_000


def settings_for(policy: str, seed: int, *, shuffled: bool) -> LearningSettings:
    """As in the demo; a quick run fits and moves little."""
    ppo, reward = dict(PPO[policy]), RewardModelSettings()
    if quick():
        ppo |= {"iterations": 3, "rollouts": 32}
        reward = RewardModelSettings(maps=("linear",), ridges=(0.3, 1.0, 3.0), folds=2, grid_extensions=0)
    cycle = CycleSettings(seed=seed, seeds=1, shuffle_labels=shuffled)
    return LearningSettings(reward_model=reward, ppo=PPOSettings.model_validate(ppo), cycle=cycle)


class Match:
    """One seed of one policy: what both sides see, and what each makes of it."""

    def __init__(self, report: Report, policy: str, seed: int) -> None:
        self.report, self.policy, self.seed = report, policy, seed
        made = MAKE[policy](seed)
        path = made.example.policy_dir(FOLDER / "crossover")  # one conversion for all cycles
        self.sides = replace(made, example=replace(made.example, policy_dir=lambda _: path))
        self.path = path

    def cell(self, what: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        return self.report.cells.get({"policy": self.policy, "seed": self.seed, "what": what, "quick": quick()}, compute)

    def shown(self) -> Shown:
        """The base's answers that both sides rate."""
        count = QUICK_COMPARISONS if quick() else COMPARISONS
        return self.cell("shown", lambda: {"pairs": shown(self.sides.example, Policy.load(self.path), count, self.seed)})["pairs"]  # type: ignore[no-any-return]

    def base(self) -> Asked:
        """The base's answers to prompts that nobody rated."""
        example = self.sides.example
        asked = example.held_out[:8] if quick() else example.held_out
        draw = partial(answers, Policy.load(self.path), example, asked, reference=True, seed=HELD_OUT_STREAM + 2 * self.seed)
        found = self.cell("base", draw)
        return {prompt: [(text, finished) for text, finished in found[prompt]] for prompt in asked}

    def learned(self, side: str, *, shuffled: bool = False) -> dict[str, Any]:
        """One turn of the product from this side's ratings, and what both sides say of it."""
        return self.cell(f"{side}{' shuffled' * shuffled}", partial(self._learned, side, shuffled))

    def _learned(self, side: str, shuffled: bool) -> dict[str, Any]:
        rated, base = self.sides.rated_by(side), self.base()
        with tempfile.TemporaryDirectory() as name:
            settings = settings_for(self.policy, self.seed, shuffled=shuffled)
            result, ratings = turn_on(rated, self.shown(), self.seed, settings, Path(name))
            ppo, reward = read_json(result.folder / "ppo.json"), read_json(result.folder / "reward.json")
            candidate = Policy.load(self.path, adapter=result.folder / "policy")
        new = answers(candidate, self.sides.example, list(base), reference=False, seed=HELD_OUT_STREAM + 2 * self.seed + 1)
        facts = Evaluation.model_validate(result.evaluation).facts
        assert facts is not None
        return {
            "wins": {judge: win_rate(self.sides.judged_by(judge), new, base) for judge in SIDES},
            "ratings": ratings,
            "facts": facts.model_dump(),
            "refused": refusals(result.evaluation),
            "kl_nats": ppo["steps"][ppo["released"]]["kl_nats"],
            "kl_target_nats": ppo["kl_target_nats"],
            "stopped_because": ppo["stopped_because"],
            "accuracy": reward["accuracy"]["prompts"],
            "likelihood_gain": reward["likelihood_gain"],
            "stage_seconds": result.seconds,
            "examples": {prompt: [base[prompt][0][0], some[0][0]] for prompt, some in list(new.items())[:4]},
        }


def judge(report: Report, policy: str, matches: list[dict[str, Any]]) -> bool:
    """The checks of one policy. Whether its controls were caught."""
    adapters = [(side, match[side]) for match in matches for side in SIDES]
    own = [found["wins"][side]["W"] for side, found in adapters]
    other = [found["wins"][_other(side)]["W"] for side, found in adapters]
    # A quick run hardly moves, so it only shows that the figures come out.
    report.check(f"{policy}: least W by unseen raters of the own side", min(own), at_least=0.0 if quick() else OWN)
    report.check(f"{policy}: greatest W by unseen raters of the other side", max(other), at_most=1.0 if quick() else OTHER - 0.001)
    changes = [100 * found["facts"]["diff"] for _, found in adapters]
    worst = min(100 * found["facts"]["low"] for _, found in adapters)
    if len(changes) > 2:
        # Whether learning from ratings costs facts, with the trained adapter as the unit.
        low = float(np.mean(changes) - 1.645 * np.std(changes, ddof=1) / len(changes) ** 0.5)
        report.check(f"{policy}: change of facts, points, lower end over adapters", low, at_least=-FACTS_POINTS)
    margin = float(str(GATES["demo_facts_margin_points"]))  # so few items certify no less in one adapter
    report.check(f"{policy}: change of facts, points, lower end of the worst adapter", worst, at_least=-margin)
    broken = [match["shuffled"] for match in matches]
    report.check(f"{policy}: adapters from shuffled ratings that the gates let through", sum(not b["refused"] for b in broken), at_most=0)
    return all(bool(b["refused"]) and b["wins"]["P"]["W"] < OWN for b in broken)


def _other(side: str) -> str:
    return SIDES[1 - SIDES.index(side)]


def told(match: Mapping[str, Any]) -> str:
    """One line for whoever watches."""
    each = {name: match[name]["wins"] for name in (*SIDES, "shuffled")}
    return "; ".join(f"{name}: W {wins['P']['W']:.2f} by P, {wins['Q']['W']:.2f} by Q" for name, wins in each.items())


def main() -> int:
    only = os.environ.get("ONLY", "")
    shared = (f"benchmarks/{name}.py" for name in ("concierge", "sides", "smollm2"))
    report = Report("crossover", seed=0, rooms=("feedback", "trainer", "examples", *shared))
    found: dict[str, list[dict[str, Any]]] = {}
    caught = []
    for policy in ("concierge",) if quick() else tuple(MAKE):
        if only and only != policy:
            continue
        # So small a model gains little from a second thread, and two runs fit on two cores.
        torch.set_num_threads(1 if policy == "concierge" else os.cpu_count() or 1)
        found[policy] = []
        for seed in range(1 if quick() else SEEDS[policy]):
            match = Match(report, policy, seed)
            one = {"seed": seed, **{side: match.learned(side) for side in SIDES}, "shuffled": match.learned("P", shuffled=True)}
            found[policy].append(one)
            report.say(f"{policy} seed {seed}: {told(one)}")
        caught.append(judge(report, policy, found[policy]))
    if only:
        return 0
    report.control("P's ratings, shuffled: the gates refuse it, and P's unseen raters do not like it", caught=all(caught))
    passed = {policy: f"{sum(not m[s]['refused'] for m in some for s in SIDES)} of {2 * len(some)}" for policy, some in found.items()}
    return report.finish({**found, "passed_the_gates": passed})


if __name__ == "__main__":
    raise SystemExit(main())
