"""How many labels does a win rate take: our reward model and PPO against TRL's DPO and KTO, on the same log.

    make bench-labels              tunes on worlds 0 and 1, then worlds 200-209; finished cells are kept, so an interrupted run goes on
    QUICK=1 make bench-labels      one world, 100 labels, one configuration each: shows that it runs, too short to conclude from

A log is 800 ratings of one world's raters; n labels are its first n, so that they are nested. What each method can use of them:

    ours   choices, thumbs, ties and "both bad", in one likelihood; the cycle as `plaudit train` runs it, without facts
    DPO    choices of one side; in some configurations also every answer with a thumb up over every one with a thumb down, prompt by prompt
    KTO    thumbs; what was chosen is desirable, what was rejected or called "both bad" is not; no ties

W is how often a method's answer beats the base's by the hidden preference, on prompts that nobody rated. Every method has six
configurations, run at 400 labels on two dev worlds; the one with the highest mean W goes to ten worlds that no setting was chosen on.
DPO and KTO have no KL budget but beta, so everybody's KL is in the figures. TRL teaches the end of text behind every answer, which is right
for 99 % of them.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.concierge import Judge, job_of, record, shown
from benchmarks.harness import Report, quick
from benchmarks.peers.worker import Worker
from examples import load
from examples.base import Example
from examples.concierge.world import World
from examples.ring import PPO
from feedback import snapshot
from feedback.config import FeedbackSettings, Settings
from feedback.export import export
from feedback.snapshot import Snapshot
from feedback.stores import open_stores
from trainer.config import CycleSettings, PPOSettings, RewardModelSettings
from trainer.cycle import run_cycle
from trainer.evaluation import Sampling, kl_by_position, sample
from trainer.policy import Policy
from trainer.reply import Reply
from trainer.schedule import LearningSettings
from trainer.stages import read_json

TRL = "1.16.0"
COUNTS, TUNED_AT = (100, 200, 400, 800), 400
DEV_WORLDS, WORLDS, SHUFFLED_WORLDS = range(2), range(200, 210), range(200, 205)
COMPARISONS = 300
"""Some 840 ratings."""
SAMPLES = 16
"""Answers of each policy to a held-out prompt; every one is compared with every one."""
BELOW = 0.03
QUICK_PPO: dict[str, object] = {"iterations": 2, "rollouts": 32}
QUICK_REWARDS: dict[str, object] = {"maps": ("linear",), "ridges": (0.3, 1.0, 3.0), "folds": 2, "grid_extensions": 0}

Configuration = Mapping[str, Any]
GRIDS: dict[str, list[Configuration]] = {
    "ours": [
        {},
        {"watch_share": 0.0},
        {"watch_share": 0.0, "kl_target_nats": 4.0},
        {"watch_share": 0.0, "kl_target_nats": 6.0},
        {"watch_share": 0.0, "kl_target_nats": 6.0, "iterations": 24},
        {"watch_share": 0.0, "kl_target_nats": 4.0, "rollouts": 64, "iterations": 24},
    ],
    "dpo": [
        {"learning_rate": 1e-3, "beta": 0.1, "epochs": 3, "thumbs": True},
        {"learning_rate": 1e-3, "beta": 0.1, "epochs": 6, "thumbs": True},
        {"learning_rate": 3e-3, "beta": 0.1, "epochs": 3, "thumbs": True},
        {"learning_rate": 3e-3, "beta": 0.3, "epochs": 3, "thumbs": True},
        {"learning_rate": 3e-3, "beta": 1.0, "epochs": 3, "thumbs": True},
        {"learning_rate": 3e-3, "beta": 0.3, "epochs": 6, "thumbs": False},
    ],
    "kto": [
        {"learning_rate": 3e-4, "beta": 0.1, "epochs": 3},
        {"learning_rate": 3e-4, "beta": 0.1, "epochs": 6},
        {"learning_rate": 1e-3, "beta": 0.1, "epochs": 3},
        {"learning_rate": 1e-3, "beta": 0.3, "epochs": 3},
        {"learning_rate": 1e-3, "beta": 1.0, "epochs": 6},
        {"learning_rate": 3e-3, "beta": 0.3, "epochs": 3},
    ],
}
"""Ours differs from the demo's settings, TRL's from TRL's defaults (learning rate 1e-6, which is for full models) in what is named."""


@dataclass(frozen=True)
class Log:
    """The first ratings of one world, as they lie in a data folder."""

    world: int
    labels: int
    example: Example
    folder: Path
    snapshot: Snapshot


def log(world: int, labels: int, folder: Path) -> Log:
    """The world's raters rate answers of the base; the first `labels` ratings become a snapshot."""
    example = load("concierge", world)
    stores = open_stores(Settings(feedback=FeedbackSettings(data_dir=folder)), "benchmark")
    try:
        found = record(stores, example, shown(example, Policy.load(example.policy_dir(folder)), COMPARISONS, world), world, at_most=labels)
        assert found == labels, f"{COMPARISONS} comparisons gave only {found} of {labels} ratings"
        stores.ingest()
        made = snapshot.build(stores.archive, stores.subjects, folder / "snapshots")
    finally:
        stores.close()
    return Log(world, labels, example, folder, made)


def shuffled(rows: Snapshot, seed: int) -> Snapshot:
    """The control: outcomes permuted among the ratings of their kind."""
    rng, mixed = np.random.default_rng(seed), list(rows.rows)
    for kind in ("choice", "thumb"):
        places = [i for i, row in enumerate(mixed) if row.kind == kind]
        outcomes = [mixed[int(i)].outcome for i in rng.permutation(places)]
        for place, outcome in zip(places, outcomes, strict=True):
            mixed[place] = mixed[place].model_copy(update={"outcome": outcome})
    return replace(rows, rows=mixed)


def ours(about: Log, configuration: Configuration, shuffle: bool) -> tuple[Path, dict[str, Any]]:
    """The product's cycle; the adapter it publishes, and why PPO ended."""
    rewards = {name: value for name, value in configuration.items() if name in RewardModelSettings.model_fields}
    ppo = {name: value for name, value in configuration.items() if name in PPOSettings.model_fields}
    settings = LearningSettings(
        reward_model=RewardModelSettings.model_validate(rewards | (QUICK_REWARDS if quick() else {})),
        ppo=PPOSettings.model_validate(PPO["concierge"] | ppo | (QUICK_PPO if quick() else {})),
        cycle=CycleSettings(shuffle_labels=shuffle, seeds=1),  # a second seed is no candidate, it only measures luck
    )
    job = replace(job_of(about.example, about.snapshot.path, about.folder), facts=())
    started = time.process_time()
    result = run_cycle(job, settings, about.folder)
    seconds = round(time.process_time() - started, 2)
    reward, ppo_ended = read_json(result.folder / "reward.json"), read_json(result.folder / "ppo.json")
    told = {"likelihood_gain": reward["likelihood_gain"], "stopped_because": ppo_ended["stopped_because"]}
    return result.adapter, told | {"map": reward["map"], "cpu_seconds": seconds}


def theirs(method: str, peer: Worker, about: Log, configuration: Configuration, shuffle: bool) -> tuple[Path, dict[str, Any]]:
    """TRL on the export that people get from `plaudit feedback export`; the adapter it saves."""
    rows = shuffled(about.snapshot, about.world) if shuffle else about.snapshot
    thumbs = replace(rows, rows=[row for row in rows.rows if row.kind == "thumb"])
    unpaired, preference = about.folder / "unpaired.jsonl", about.folder / "preference.jsonl"
    export(rows if method == "kto" else thumbs, unpaired, "unpaired", choices=True)
    files = [unpaired]
    if method == "dpo":
        export(rows, preference, "preference")
        files.append(preference)
    together, out = about.folder / "rows.jsonl", about.folder / method
    together.write_bytes(b"".join(path.read_bytes() for path in files))
    job = {"method": method, "policy": about.example.policy_dir(about.folder), "rows": together, "out": out, "seed": 0}
    return out, peer.train(job | {"settings": {"batch": 16, **configuration}})


def asked(world: int, policy: Policy, *, reference: bool) -> tuple[list[Reply], Tensor]:
    """Answers to the held-out prompts and their hidden utilities, one row a prompt. The same for every method of a world."""
    example = load("concierge", world)
    prompts, samples = (example.held_out[:8], 4) if quick() else (example.held_out, SAMPLES)
    how = Sampling(example.system_prompt, example.temperature, example.max_tokens, samples, 9_000_000 + 10 * world + int(reference))
    replies = sample(policy, prompts, how, reference=reference)
    each = [prompt for prompt in prompts for _ in range(samples)]
    return replies, Judge(World(world).utility, example, policy).utilities(each, replies).reshape(-1, samples)


@cache
def base_utilities(world: int) -> Tensor:
    """What the base's answers are worth."""
    return asked(world, Policy.load(load("concierge", world).policy_dir(Path())), reference=True)[1]


def judged(about: Log, adapter: Path) -> dict[str, Any]:
    """W and, on the same held-out prompts, KL and how answers look."""
    example = about.example
    policy = Policy.load(example.policy_dir(about.folder), adapter=adapter)
    replies, utilities_QS = asked(about.world, policy, reference=False)
    gaps_QSS = utilities_QS[:, :, None] - base_utilities(about.world)[:, None]
    gaps_NT, mask_NT = kl_by_position(policy, replies[::4], example.temperature)
    return {
        "wins": float((gaps_QSS > 0).float().mean() + 0.5 * (gaps_QSS == 0).float().mean()),
        "kl_nats": float((gaps_NT * mask_NT).sum(1).mean()),
        "tokens": float(mask_NT.sum(1).mean()),
        "finished": mean(reply.finished for reply in replies),
    }


class Bench:
    """The cells of one run, found again where they were finished before."""

    def __init__(self, report: Report, peer: Worker) -> None:
        self.report, self.peer = report, peer
        self._log: Log | None = None

    def cell(self, method: str, world: int, labels: int, configuration: Configuration, *, shuffle: bool = False) -> dict[str, Any]:
        """One method on one log."""
        about = {"method": method, "world": world, "labels": labels, "configuration": dict(configuration), "shuffled": shuffle}
        compute = partial(self._compute, method, world, labels, configuration, shuffle)
        found = self.report.cells.get({**about, "quick": quick()}, compute)
        what = "shuffled" if shuffle else json.dumps(dict(configuration))
        figures = f"W {found['wins']:.3f}, KL {found['kl_nats']:.2f}, {found['cpu_seconds']} CPU s"
        self.report.say(f"world {world}, {labels} labels, {method} {what}: {figures}")
        return about | found

    def _compute(self, method: str, world: int, labels: int, configuration: Configuration, shuffle: bool) -> dict[str, Any]:
        if self._log is None or (self._log.world, self._log.labels) != (world, labels):
            self.close()
            self._log = log(world, labels, Path(tempfile.mkdtemp(prefix="labels-")))
        learn = ours if method == "ours" else partial(theirs, method, self.peer)
        adapter, told = learn(self._log, configuration, shuffle)
        return judged(self._log, adapter) | told

    def close(self) -> None:
        """The methods of a world share its log, the latest one."""
        if self._log is not None:
            shutil.rmtree(self._log.folder)

    def tuning(self) -> list[dict[str, Any]]:
        """Every configuration on every dev world."""
        tried = [(world, method, each) for world in DEV_WORLDS for method, grid in GRIDS.items() for each in grid]
        return [self.cell(method, world, TUNED_AT, each) for world, method, each in tried]


def best(method: str, tuning: Sequence[Mapping[str, Any]]) -> Configuration:
    """The configuration with the highest mean W; the first where nothing was tuned."""
    rows = [row for row in tuning if row["method"] == method]
    return max(GRIDS[method], key=lambda each: mean([row["wins"] for row in rows if row["configuration"] == each] or [0.0]))


def interval(gaps: Sequence[float]) -> tuple[float, float]:
    """95 % of the medians of resampled worlds."""
    drawn = np.random.default_rng(0).choice(np.array(gaps), size=(10_000, len(gaps)))
    low, high = np.quantile(np.median(drawn, axis=1), (0.025, 0.975))
    return float(low), float(high)


def compare(report: Report, rows: Sequence[Mapping[str, Any]], counts: Sequence[int]) -> list[dict[str, Any]]:
    """One check for each label count, and a row of what it is made of."""
    table = []
    for labels in counts:
        wins = {method: {r["world"]: r["wins"] for r in rows if r["labels"] == labels and r["method"] == method} for method in GRIDS}
        medians = {method: median(by_world.values()) for method, by_world in wins.items()}
        better = max(("dpo", "kto"), key=lambda method: medians[method])
        low, high = interval([won - wins[better][world] for world, won in wins["ours"].items()])
        kl = {method: median(r["kl_nats"] for r in rows if r["labels"] == labels and r["method"] == method) for method in GRIDS}
        report.check(
            f"{labels} labels: median W of ours minus that of {better} (paired by world {low:+.3f} to {high:+.3f})",
            medians["ours"] - medians[better],
            at_least=-1.0 if quick() else -BELOW,
        )
        figures = {f"W {method}": wins for method, wins in medians.items()} | {f"KL {method}, nats": kl[method] for method in GRIDS}
        table.append({"labels": labels, **figures, "worlds": len(wins["ours"])})
    return table


def main() -> int:
    torch.set_num_threads(1)
    report = Report("labels", seed=0, rooms=("feedback", "trainer", "examples", "benchmarks/peers", "benchmarks/concierge.py"))
    counts, worlds, controls = (COUNTS[:1], DEV_WORLDS[:1], DEV_WORLDS[:1]) if quick() else (COUNTS, WORLDS, SHUFFLED_WORLDS)
    with Worker(TRL) as peer, closing(Bench(report, peer)) as bench:
        tuning = [] if quick() else bench.tuning()
        chosen = {method: best(method, tuning) for method in GRIDS}
        rows = [bench.cell(method, world, n, chosen[method]) for world in worlds for n in counts for method in GRIDS]
        at = counts[-1] if quick() else TUNED_AT
        noise = [bench.cell(method, world, at, chosen[method], shuffle=True) for world in controls for method in GRIDS]
    table = compare(report, rows, counts)
    # Nobody who learns nothing may pass.
    report.check(f"{table[-1]['labels']} labels: median W of ours", table[-1]["W ours"], at_least=0.0 if quick() else 0.6)
    learned = {method: median(row["wins"] for row in noise if row["method"] == method) for method in GRIDS}
    report.control(
        f"the same labels shuffled win nothing (median W <= 0.55): {', '.join(f'{method} {wins:.3f}' for method, wins in learned.items())}",
        caught=all(wins <= 0.55 for wins in learned.values()),
    )
    return report.finish({"table": table, "chosen": chosen, "cells": rows, "tuning": tuning, "shuffled": noise})


if __name__ == "__main__":
    raise SystemExit(main())
