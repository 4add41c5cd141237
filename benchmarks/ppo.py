"""Our PPO beside TRL 1.12's, the last that had one, and our RLOO beside TRL 1.16's.

    make bench-ppo              about 2 hours on two idle cores; finished processes are kept, so an interrupted run goes on
    ONLY=speed make bench-ppo   the first half alone, 20 minutes; ONLY=target the second
    QUICK=1 make bench-ppo      one iteration of TRL's PPO and of ours on the concierge: shows that it runs, concludes nothing

Same model, adapter (rank, alpha, all linear layers, the very same first weights), prompts, seeds, reward, episodes, epochs, minibatch,
clip, gamma, lambda, temperature, tokens and threads. Each contestant is a process of its own, in alternation, and measures its memory
from after its imports. What stays as each has it: TRL's KL coefficient (0.05) and value coefficient (0.1), our controller and critic.

Speed is measured on SmolLM2, three iterations of each, and all must have taken as many optimiser steps. The pass lines are about TRL's PPO
as it comes. Beside it stands a thrifty one, for the memory that somebody can reach who changes TRL's value model and its accumulation.

Then the concierge's hidden preference is the reward, and the figure is the time until the mean of two iterations' replies is TARGET sd
better than the base's; the learning rate is tuned for each contestant on other worlds. Where TRL does not get there, its time is at least
what it took. The controls: our PPO with the rewards of an iteration's replies exchanged must not get there, and our run must look
slower if it rests while the clock runs.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from statistics import fmean, median
from typing import Any

from benchmarks.harness import FOLDER, Cells, Report, code_digest, quick
from benchmarks.peers import PeerFailed, run, trl
from examples import load
from examples.base import Example
from trainer.evaluation import Sampling, sample
from trainer.policy import Policy

PPO_VERSION, RLOO_VERSION = "1.12.0", "1.16.0"
THREADS = 2
ROUNDS = (2, 1)
"""Iterations of a contestant's processes, the second time in the opposite order."""
MAX_ITERATIONS = 24
TARGET = 1.0
"""In sd of the base's answers to one prompt."""
RATES = (3e-4, 1e-3, 3e-3)
TUNING_WORLDS, WORLDS = range(40, 42), range(50, 55)
"""Worlds that nothing else in this repository looks at; each is its run's seed, too."""
BASE_ANSWERS = 8
"""To each prompt; their mean is its zero."""
GROUP = 4
"""Replies to one prompt that are each other's baseline in RLOO."""
SHAPES: dict[str, dict[str, object]] = {
    "smollm2": {"rollouts": 32, "minibatch": 16, "pad_token": "<|endoftext|>", "learning_rate": 3e-4, "cuts": 4},
    "concierge": {"rollouts": 128, "minibatch": 32, "pad_token": "<pad>", "learning_rate": 1e-3, "cuts": 1},
}
"""`cuts`: micro-batches of a minibatch where TRL can have them: SmolLM2's cost memory, the concierge's only time."""
QUICK_SHAPE: dict[str, object] = {"rollouts": 16, "minibatch": 8}
SAME: dict[str, object] = {"rank": 8, "alpha": 16, "epochs": 2, "clip": 0.2, "gae_lambda": 0.95, "kl_coef": 0.05, "group": GROUP}


@dataclass(frozen=True)
class Contestant:
    """One program and how it is told."""

    module: str
    settings: dict[str, object] = field(default_factory=dict)
    version: str | None = None
    """Of TRL; None is ours."""

    @property
    def python(self) -> Path:
        return Path(sys.executable) if self.version is None else trl(self.version)


CONTESTANTS = {
    "TRL PPO": Contestant("trl_ppo", {"thrifty": False}, PPO_VERSION),
    "TRL PPO, thrifty": Contestant("trl_ppo", {"thrifty": True}, PPO_VERSION),
    "ours, adapter critic": Contestant("ours_ppo", {"critic": "adapter"}),
    "ours, head critic": Contestant("ours_ppo", {"critic": "head"}),
    "TRL RLOO": Contestant("trl_rloo", {}, RLOO_VERSION),
    "our RLOO": Contestant("ours_ppo", {"algorithm": "rloo", "rloo_samples": GROUP}),
}
CONTROL = "ours, head critic"
THRIFTY = "TRL PPO, thrifty"
"""Runs once, and not to the target: what it saves is no question of time, and none on a small policy."""
QUICK_RACERS = ("TRL PPO", CONTROL)
RACERS = [name for name in CONTESTANTS if name != THRIFTY]


@cache
def base_answers() -> dict[str, list[tuple[str, bool]]]:
    """What the concierge answers before it has learned anything, to each prompt; (text, finished)."""
    example = load("concierge")
    policy = Policy.load(example.policy_dir(Path("data")))
    how = Sampling(example.system_prompt, example.temperature, example.max_tokens, BASE_ANSWERS, seed=0)
    found = [(policy.decode(reply.tokens), reply.finished) for reply in sample(policy, example.prompts, how, reference=True)]
    return {prompt: found[index * BASE_ANSWERS : (index + 1) * BASE_ANSWERS] for index, prompt in enumerate(example.prompts)}


def task(example: Example, seed: int, folder: Path) -> dict[str, object]:
    """What all contestants are told about an example: the model, the first adapter, the prompts as text and as tokens."""
    path = example.policy_dir(Path("data")).resolve()
    policy = Policy.load(path, seed=seed)
    policy.save(folder / f"adapter-{example.name}-{seed}")
    turns = [[{"role": "user", "content": text}] for text in example.prompts]
    if example.system_prompt:
        turns = [[{"role": "system", "content": example.system_prompt}, *turn] for turn in turns]
    return {
        "model": str(path),
        "adapter": str(folder / f"adapter-{example.name}-{seed}"),
        "asked": example.prompts,
        "texts": [policy.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True) for turn in turns],
        "prompts": [list(policy.encode(turn)) for turn in turns],
        "temperature": example.temperature,
        "max_tokens": example.max_tokens,
        "seed": seed,
        "base_answers": base_answers() if example.name == "concierge" else {},
    }


class Runs:
    """Starts contestants, each in a process of its own, and keeps what they measured; TRL's until something of TRL's side changes."""

    def __init__(self, report: Report, folder: Path) -> None:
        self.report, self.folder = report, folder
        rooms = ("benchmarks/peers", "examples/concierge", "examples/smollm2")
        self.ours = Cells(FOLDER / "ppo.ours.cells.jsonl", code_digest("", *rooms, "trainer"))
        self.theirs = Cells(FOLDER / "ppo.trl.cells.jsonl", code_digest("", *rooms))

    def __call__(self, name: str, policy: str, seed: int, world: int | None = None, **told: object) -> dict[str, Any]:
        contestant = CONTESTANTS[name]
        common = {"policy": policy, "seed": seed, "world": world, **SHAPES[policy], **SAME, **told}
        about = {"contestant": name, "settings": contestant.settings, "threads": THREADS, **common}

        def compute() -> dict[str, Any]:
            spec = {"target": None, **task(load(policy, seed), seed, self.folder), **about}
            return run(contestant.python, contestant.module, spec, THREADS)

        found = (self.ours if contestant.version is None else self.theirs).get(about, compute)
        what = ", ".join(f"{key} {value}" for key, value in {"policy": policy, "seed": seed, **told}.items())
        self.report.say(f"{name} ({what}): {found['work_s']:.0f} s, {len(found['iterations'])} iterations, {found['memory_mb']:.0f} MB")
        return found


def summary(runs: list[dict[str, Any]], rollouts: int) -> dict[str, float]:
    """Of a contestant's processes: samples a second, seconds of an iteration's stages, peak memory above the imports."""
    iterations = [row for each in runs for row in each["iterations"]]
    stages = {
        name: fmean(row.get(name, 0.0) for row in iterations) for name in ("generate_s", "score_s", "train_s", "reply_tokens", "score")
    }
    return {
        "samples_per_s": rollouts * len(iterations) / sum(each["work_s"] for each in runs),
        "memory_mb": max(each["memory_mb"] for each in runs),
        "updates": sum(each["updates"] for each in runs) / len(iterations),
        "trainable": runs[0]["trainable"],
        "parameters": runs[0]["parameters"],
        **stages,
    }


def speed(runs: Runs) -> dict[str, dict[str, float]]:
    """Every contestant's summary, on SmolLM2; a quick run's is the concierge's and concludes nothing."""
    policy, rounds = ("concierge", (1,)) if quick() else ("smollm2", ROUNDS)
    world = TUNING_WORLDS[0] if quick() else None
    less = QUICK_SHAPE if quick() else {}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in (QUICK_RACERS if quick() else CONTESTANTS)}
    for turn, iterations in enumerate(rounds):
        for name in list(found) if turn == 0 else RACERS[::-1]:
            found[name].append(runs(name, policy, turn, world, iterations=iterations, round=turn, **less))
    rollouts = {**SHAPES[policy], **less}["rollouts"]
    assert isinstance(rollouts, int)
    return {name: summary(each, rollouts) for name, each in found.items()}


def until_target(runs: Runs, name: str, rate: float, worlds: range, **told: object) -> Iterator[tuple[float, dict[str, Any]]]:
    """(seconds until the target, the run) in each world; infinite where the target was not reached."""
    for world in worlds:
        try:
            one = runs(name, "concierge", world, world, learning_rate=rate, iterations=MAX_ITERATIONS, target=TARGET, **told)
        except PeerFailed as exc:  # too large a learning rate may end in numbers that are none
            runs.report.say(f"{name} (seed {world}, learning_rate {rate:g}) failed: {exc}")
            one = {"reached": False, "work_s": 0.0, "iterations": []}
        yield (one["work_s"] if one["reached"] else float("inf")), one


def to_target(runs: Runs) -> dict[str, dict[str, object]]:
    """For every contestant the learning rate that was fastest on the tuning worlds, and its seconds to the target on the others."""
    found: dict[str, dict[str, object]] = {}
    rates: dict[str, float] = {}
    for name in RACERS:
        tuned: dict[float, tuple[float, float]] = {}
        for rate in RATES:
            tried = list(until_target(runs, name, rate, TUNING_WORLDS))
            # Where none gets there, the one that gets furthest.
            tuned[rate] = fmean(seconds for seconds, _ in tried), -fmean(last(one, "score", -float("inf")) for _, one in tried)
        rates[name] = min(tuned, key=lambda rate: tuned[rate])
        found[name] = {"learning_rate": rates[name], "tuning_s": {str(rate): shown(seconds) for rate, (seconds, _) in tuned.items()}}
    # One world after the other, so that contestants alternate.
    by_world = {world: {name: next(until_target(runs, name, rates[name], range(world, world + 1))) for name in RACERS} for world in WORLDS}
    for name in RACERS:
        seconds = [each[name][0] for each in by_world.values()]
        found[name] |= {
            "seconds": [shown(s) for s in seconds],
            "median_s": shown(median(seconds)),
            "at_least_s": median(each[name][1]["work_s"] for each in by_world.values()),
            "reached": sum(s < float("inf") for s in seconds),
            "iterations": [len(each[name][1]["iterations"]) for each in by_world.values()],
            "kl_nats": [last(each[name][1], "kl_nats", None) for each in by_world.values()],
        }
    return found


def last(one: Mapping[str, Any], name: str, otherwise: Any) -> Any:
    """The latest figure of this name in a run; its last iteration may have ended before there was one."""
    return next((row[name] for row in reversed(one["iterations"]) if name in row), otherwise)


def rows(figures: Mapping[str, Any]) -> list[dict[str, object]]:
    """The page's table: a contestant a row."""
    names = {
        "samples/s": "samples_per_s",
        "generate s": "generate_s",
        "score s": "score_s",
        "train s": "train_s",
        "tokens": "reply_tokens",
        "MB": "memory_mb",
        "trainable": "trainable",
    }
    found = []
    for name in figures.get("speed", RACERS):
        row: dict[str, object] = {"contestant": name}
        if "speed" in figures:
            row |= {title: figures["speed"][name][key] for title, key in names.items()}
        if "to_target" in figures:
            target = figures["to_target"].get(name, {})
            row |= {"s to target": target.get("median_s"), "worlds": target.get("reached"), "learning rate": target.get("learning_rate")}
        found.append(row)
    return found


def shown(seconds: float) -> float | None:
    """For JSON, which has no infinity."""
    return None if seconds == float("inf") else round(seconds, 1)


def over(one: object, other: object) -> float | None:
    """one / other, where both are known."""
    return one / other if isinstance(one, float) and isinstance(other, float) else None


def check_speed(report: Report, found: Mapping[str, Mapping[str, float]]) -> None:
    steps = {round(each["updates"], 6) for each in found.values()}
    report.check("different numbers of optimiser steps in an iteration", len(steps), at_most=1)
    critics = (("adapter critic", "the same algorithm", 1.2), ("head critic", "another algorithm", 1.8))
    compared = [(f"ours, {critic}", "TRL PPO", f"{critic}, {what}, over TRL's PPO", least) for critic, what, least in critics]
    for ours, theirs, what, least in (*compared, ("our RLOO", "TRL RLOO", "our RLOO over TRL's", 1.2)):
        if ours in found:
            ratio = found[ours]["samples_per_s"] / found[theirs]["samples_per_s"]
            report.check(f"samples/s, {what}", ratio, at_least=0.0 if quick() else least)
    compared = [(f"ours, {critic}", "TRL PPO", f"{critic}, over TRL's PPO", 0.5) for critic, _, _ in critics]
    for ours, theirs, what, most in (*compared, ("our RLOO", "TRL RLOO", "our RLOO over TRL's", 1.0)):
        if ours in found:
            ratio = found[ours]["memory_mb"] / found[theirs]["memory_mb"]
            report.check(f"peak memory above the imports, {what}", ratio, at_most=10.0 if quick() else most)


def check_target(report: Report, found: Mapping[str, Mapping[str, object]]) -> None:
    for name in ("ours, adapter critic", "ours, head critic"):
        report.check(f"worlds of {len(WORLDS)} whose target was reached, {name}", float(str(found[name]["reached"])), at_least=len(WORLDS))
        report.check(
            f"seconds to the target, or tried, of TRL's PPO over {name}",
            over(found["TRL PPO"]["at_least_s"], found[name]["median_s"]),
            at_least=1.0,
        )


def rested(runs: Runs) -> bool:
    """Whether our run, resting three times as long as its stages take, is charged for more than twice their time."""
    one = runs(CONTROL, "concierge", 0, TUNING_WORLDS[0], iterations=1, round=0, slow=3, **QUICK_SHAPE)
    worked = sum(row[stage] for row in one["iterations"] for stage in ("generate_s", "score_s", "train_s"))
    return bool(one["work_s"] > 2 * worked)


def exchanged(runs: Runs, rate: float) -> bool:
    """Whether our PPO with the rewards of replies exchanged trains in every world and reaches the target in none."""
    tried = list(until_target(runs, CONTROL, rate, WORLDS, shuffle_reward=True))
    return all(seconds == float("inf") and one["iterations"] for seconds, one in tried)


def main() -> int:
    only = os.environ.get("ONLY", "")
    report = Report("ppo" if not only else f"ppo-{only}", seed=0, rooms=())
    figures: dict[str, object] = {"trl_ppo": PPO_VERSION, "trl_rloo": RLOO_VERSION, "threads": THREADS, "target_sd": TARGET}
    with tempfile.TemporaryDirectory() as name:
        runs = Runs(report, Path(name))
        caught = {}
        if only != "target":
            by_name = speed(runs)
            figures["speed"] = by_name
            check_speed(report, by_name)
            caught["our run, resting three times as long as it works, is charged for it"] = rested(runs)
        if only != "speed" and not quick():
            targets = to_target(runs)
            figures["to_target"] = targets
            check_target(report, targets)
            rate = float(str(targets[CONTROL]["learning_rate"]))
            caught["our PPO with the rewards of replies exchanged does not reach the target"] = exchanged(runs, rate)
        report.control("; ".join(caught), caught=all(caught.values()))
    return report.finish(figures | {"table": rows(figures)})


if __name__ == "__main__":
    raise SystemExit(main())
