"""Does the ring on SmolLM2 please those who rated, and do its answers still say something?

    make bench-smollm2               turns the ring of `make demo`, some 25 minutes on two idle cores, and judges what came out
    RING=FOLDER make bench-smollm2   judges a ring that `make demo` has turned, for example data/demo/smollm2-20260101-120000
    QUICK=1 make bench-smollm2       no ring: the judge alone, on answers of the base, which it must prefer to answers to other questions

What the ratings taught is judged on 24 questions that nobody rated, by the raters' own rules without noise, with the rater as
the unit. The control is the same cycle on the same ratings, shuffled: nobody may be pleased more than half of the time, and
the gates must refuse it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from asyncio import run
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.harness import Report, quick, refusals
from deploy.registry import Registry
from examples.base import Example
from examples.ring import Ring
from examples.smollm2.example import example
from examples.smollm2.raters import on_topic, traits
from feedback.database import open_database
from feedback.errors import PlauditError
from trainer.evaluation import Sampling, sample
from trainer.held_out import clustered_mean
from trainer.policy import Policy
from trainer.stages import read_json

FOLDER = Path("build/bench/smollm2")
SEED = 0
SAMPLES = 4
"""Answers of each policy to a question; every one is compared with every one."""
Asked = dict[str, list[tuple[str, bool]]]
"""For each question its answers, and whether each was finished."""


def progress(what: str, share: float) -> None:
    print(f"{what}: {share:.0%}", flush=True)


def turned() -> dict[str, Any]:
    """The data folder of a ring and the seconds of its stages."""
    if given := os.environ.get("RING"):
        folder = Path(given).resolve()
    else:
        ring = Ring("smollm2", FOLDER, progress, print, SEED)
        try:
            run(ring.turn())
        finally:
            ring.stop()
        folder = ring.data_dir.resolve()
    return {"folder": str(folder), "stages": read_json(folder / "ring.json")["seconds"]}


def registry_of(folder: Path) -> Registry:
    return Registry(open_database(f"sqlite:///{folder / 'registry.sqlite'}"))


def closed(folder: Path) -> bool:
    """Whether an adapter that ratings trained answers everybody."""
    registry = registry_of(folder)
    stable = registry.alias("stable")
    return stable is not None and registry.adapter(stable).kind == "trained"


def adapters_of(folder: Path) -> list[tuple[Path, dict[str, Any], dict[str, Any]]]:
    """(folder, evaluation, training) of each trained adapter, oldest first."""
    registry = registry_of(folder)
    trained = [each for each in registry.adapters() if each.kind == "trained"]
    bodies = [[registry.attestations(each.id, kind)[-1].body for kind in ("evaluation", "training")] for each in trained]
    return [(each.path, *body) for each, body in zip(trained, bodies, strict=True)]  # type: ignore[misc]


def answers(policy: Policy, shipped: Example, prompts: list[str], *, reference: bool, seed: int) -> Asked:
    """As the gateway would serve them."""
    how = Sampling(shipped.system_prompt, shipped.temperature, shipped.max_tokens, SAMPLES, seed)
    replies = sample(policy, prompts, how, reference=reference, progress=progress, what="answers of the base" if reference else "answers")
    texts = [(policy.decode(reply.tokens), reply.finished) for reply in replies]
    return {prompt: texts[index * SAMPLES : (index + 1) * SAMPLES] for index, prompt in enumerate(prompts)}


def win_rate(shipped: Example, new: Asked, base: Asked, cohort: str | None = None) -> dict[str, float]:
    """W of new against base by the raters' rules without noise, with intervals whose units are the raters and the questions."""
    wins, raters, prompts = [], [], []
    for number, rater in enumerate(shipped.raters):
        if cohort not in (None, rater.cohort):
            continue
        for index, prompt in enumerate(new):
            ours = np.array([rater.utility(prompt, *one) for one in new[prompt]])
            theirs = np.array([rater.utility(prompt, *one) for one in base[prompt]])
            wins.append(float((np.sign(ours[:, None] - theirs[None]) + 1).mean() / 2))
            raters.append(number)
            prompts.append(index)
    mean, low, high = clustered_mean(torch.tensor(wins), torch.tensor(raters))
    _, low_by_prompt, high_by_prompt = clustered_mean(torch.tensor(wins), torch.tensor(prompts))
    return {"W": mean, "low": low, "high": high, "low_by_prompt": low_by_prompt, "high_by_prompt": high_by_prompt}


def described(asked: Asked) -> dict[str, float]:
    """What the answers look like, for people: means over all of them."""
    seen = [(prompt, text, traits(prompt, text, finished)) for prompt, some in asked.items() for text, finished in some]
    return {
        "finished": float(np.mean([s.finished for _, _, s in seen])),
        "words": float(np.mean([s.words for _, _, s in seen])),
        "on_topic_and_says_something": float(np.mean([on_topic(prompt, text) for prompt, text, _ in seen])),
        "named": float(np.mean([s.named for _, _, s in seen])),
        "steps": float(np.mean([s.steps for _, _, s in seen])),
        "substance": float(np.mean([s.substance for _, _, s in seen])),
    }


def judged(shipped: Example, path: Path, adapter: Path, base: Asked) -> dict[str, Any]:
    """The adapter's answers to the questions that nobody rated, against the base's."""
    new = answers(Policy.load(path, adapter=adapter), shipped, list(base), reference=False, seed=SEED + 1)
    cohorts = sorted({rater.cohort for rater in shipped.raters})
    return {
        "win": win_rate(shipped, new, base),
        "win_of_cohort": {name: win_rate(shipped, new, base, name) for name in cohorts},
        "answers": described(new),
        "examples": {prompt: [base[prompt][0][0], some[0][0]] for prompt, some in new.items()},
    }


def shuffled(folder: Path) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """The control: the same command on the same ratings, shuffled."""
    done = subprocess.run(
        [sys.executable, "-m", "plaudit", "train", "--shuffle-labels", "--config", str(folder / "plaudit.toml")], check=False
    )
    if done.returncode != 0:
        raise PlauditError(f"plaudit train --shuffle-labels ended with {done.returncode}")
    return adapters_of(folder)[-1]


def judge_alone(report: Report, shipped: Example) -> int:
    """What the judge says of answers whose order is known: the base's, the same ones again, and the same ones under other questions."""
    asked = answers(Policy.load(shipped.policy_dir(Path("data"))), shipped, shipped.held_out[:4], reference=True, seed=SEED)
    foreign: Asked = dict(zip(asked, [*list(asked.values())[1:], next(iter(asked.values()))], strict=True))
    report.check("W of answers to the question against answers to another one", win_rate(shipped, asked, foreign)["W"], at_least=0.6)
    same = win_rate(shipped, asked, asked)["W"]
    report.control("the answers against themselves: W = 0.5", caught=abs(same - 0.5) < 1e-6)
    return report.finish({"base": described(asked)})


def main() -> int:
    report = Report("smollm2", seed=SEED, rooms=("trainer", "examples/smollm2"))
    shipped = example(SEED)
    if quick():
        return judge_alone(report, shipped)

    ring = report.cells.get({"what": "ring", "given": os.environ.get("RING", "")}, turned)
    folder = Path(ring["folder"])
    path = shipped.policy_dir(folder.parent.parent)
    adapter, evaluation, training = adapters_of(folder)[0]
    bank = report.cells.get({"what": "base"}, lambda: answers(Policy.load(path), shipped, shipped.held_out, reference=True, seed=SEED + 2))
    base: Asked = {prompt: [(text, finished) for text, finished in bank[prompt]] for prompt in shipped.held_out}
    real = report.cells.get({"what": "real", "adapter": adapter.name}, lambda: judged(shipped, path, adapter, base))

    def control() -> dict[str, Any]:
        broken, its_evaluation, its_training = shuffled(folder)
        told = {"refused": refusals(its_evaluation), "stopped_because": its_training["stopped_because"]}
        return judged(shipped, path, broken, base) | told

    noise = report.cells.get({"what": "shuffled", "adapter": adapter.name}, control)
    before, name = described(base), "on_topic_and_says_something"
    report.check("W by the raters' rules, lower end with the rater as the unit", real["win"]["low"], at_least=0.5)
    report.check("the same, with the question as the unit", real["win"]["low_by_prompt"], at_least=0.5)
    report.check("answers that name what was asked and say something, against before", real["answers"][name] - before[name], at_least=-0.1)
    report.check("the ring closed", float(closed(folder)), at_least=1)
    report.check("minutes of the whole ring", sum(ring["stages"].values()) / 60, at_most=25)
    report.check(
        "minutes to the first answer", sum(ring["stages"][s] for s in ("model ready", "service ready", "first answer")) / 60, at_most=2
    )
    caught = noise["win"]["W"] <= 0.55 and bool(noise["refused"])
    report.control("the same ratings, shuffled: W <= 0.55, and the gates refuse it", caught=caught)
    figures = {"stages_s": ring["stages"], "before": before, "after": real, "control": noise}
    return report.finish(figures | {"evaluation": {k: v for k, v in evaluation.items() if k != "probes"}, "training": training})


if __name__ == "__main__":
    raise SystemExit(main())
