"""Does PPO from a reward model learned from ratings please the raters of SmolLM2, and do its answers still say something?

    make bench-smollm2            some 25 minutes on two idle cores; an interrupted run goes on
    QUICK=1 make bench-smollm2    3 iterations and no control: shows that it runs, concludes nothing

Each of 48 questions gets six answers of the base, compared in three pairs by simulated raters, with a thumb on most answers: about
400 ratings. What they teach is judged on 24 questions that nobody rated, by the raters' own rules without noise, with the
rater as the unit. The control is the same run on shuffled ratings.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from benchmarks.harness import Report, quick
from examples.base import Example
from examples.smollm2.example import example
from examples.smollm2.raters import on_topic, traits
from feedback.snapshot import Row
from trainer.budget import Step
from trainer.config import PPOSettings, RewardModelSettings
from trainer.cycle import split_raters
from trainer.evaluation import Sampling, kl_by_position, sample
from trainer.held_out import clustered_mean, held_out
from trainer.labels import Labels, from_snapshot
from trainer.policy import Policy, Reply
from trainer.ppo import Options, Warmup, train
from trainer.reward_model import RewardModel, fit
from trainer.score import Normaliser, Scorer

FOLDER = Path("build/bench/smollm2")
DATA = Path("data")
SEED = 0
RATED_ANSWERS = 6
JUDGED_ANSWERS = 4
Asked = dict[str, list[tuple[str, bool]]]
"""For each question its answers, and whether each was finished."""
Kind = Literal["real", "shuffled"]


def answers(policy: Policy, shipped: Example, prompts: list[str], count: int, *, reference: bool, seed: int) -> Asked:
    """`count` answers to each prompt, as the gateway would serve them."""
    how = Sampling(shipped.system_prompt, shipped.temperature, shipped.max_tokens, count, seed)
    replies = sample(policy, prompts, how, reference=reference, progress=lambda what, share: print(f"{what}: {share:.0%}", flush=True))
    texts = [(policy.decode(reply.tokens), reply.finished) for reply in replies]
    return {prompt: texts[index * count : (index + 1) * count] for index, prompt in enumerate(prompts)}


def rated(shipped: Example, asked: Asked) -> list[Row]:
    """Pairs of different answers, each compared by one rater, who also gives thumbs; raters take turns."""
    rng = np.random.default_rng(SEED)
    rows: list[Row] = []
    pairs = [(prompt, some[i], some[i + 1]) for prompt, some in asked.items() for i in range(0, len(some) - 1, 2)]
    for turn, index in enumerate(rng.permutation(len(pairs))):
        prompt, a, b = pairs[index]
        rater = shipped.raters[turn % len(shipped.raters)]
        rows.append(_row(rater.id, rater.cohort, prompt, a, b, rater.choose(prompt, a[0], b[0], a[1], b[1], rng), len(rows)))
        for one in (a, b):
            thumb = rater.thumb(prompt, one[0], one[1], rng)
            if thumb is not None:
                rows.append(_row(rater.id, rater.cohort, prompt, one, None, thumb, len(rows)))
    return rows


def _row(rater: str, cohort: str, prompt: str, a: tuple[str, bool], b: tuple[str, bool] | None, outcome: Any, number: int) -> Row:
    return Row(
        event_id=f"{number:06d}",
        kind="choice" if b else "thumb",
        rater=rater,
        subject=rater,
        cohorts=("simulated", cohort),
        source="simulated",
        prompt=[{"role": "user", "content": prompt}],
        answer_a=a[0],
        answer_b=b[0] if b else None,
        finish_a="stop" if a[1] else "length",
        finish_b=("stop" if b[1] else "length") if b else None,
        outcome=outcome,
        side="a" if b else None,
        adapter_a="",
        adapter_b="" if b else None,
        stamp=number,
    )


def improve(policy: Policy, shipped: Example, labels: Labels, kind: Kind) -> dict[str, Any]:
    """Reward models and PPO; the policy then holds the released adapter."""
    settings = RewardModelSettings()
    started = time.perf_counter()
    main, watch = split_raters(labels, settings.watch_share, settings.watch_min_raters, settings.watch_min_labels, settings.seed)
    model, watcher = fit(main, settings), fit(watch, settings) if watch else None
    accuracy = held_out(labels, settings, str(model.about["map"]), float(str(model.about["ridge"])))
    fitted = time.perf_counter()
    replies = [
        policy.reply([{"role": "user", "content": labels.prompts[answer.prompt]}], shipped.system_prompt, answer.text, answer.finished)
        for answer in labels.answers
    ]

    def scorer(of: RewardModel) -> Scorer:
        # What was rated are answers of the base, so they are the prompts' zeros too.
        return Scorer(of, Normaliser.fit(of, [reply.prompt for reply in replies], labels.features_ND), settings.clip)

    def on_step(step: Step) -> None:
        print(
            f"{kind} {step.step}: score {step.score:+.2f} kl {step.kl_nats:.2f} tokens {step.reply_tokens:.0f} "
            f"finished {step.finished:.0%} {time.perf_counter() - fitted:.0f} s",
            flush=True,
        )

    score = scorer(model)
    result = train(
        policy,
        list(dict.fromkeys(reply.prompt for reply in replies)),
        score,
        PPOSettings(iterations=3 if quick() else 10),
        max_tokens=shipped.max_tokens,
        temperature=shipped.temperature,
        seed=SEED,
        options=Options(
            stop_score=scorer(watcher) if watcher else None,
            warmup=Warmup(replies, score(replies, labels.features_ND)),
            on_step=on_step,
            checkpoint=FOLDER / f"ppo-{kind}.pt",
        ),
    )
    policy.save(FOLDER / f"policy-{kind}")
    return {
        "accuracy": {name: asdict(value) if value else None for name, value in accuracy.items()},
        "map": model.about["map"],
        "ridge": model.about["ridge"],
        "steps": [asdict(step) for step in result.steps],
        "released": result.released,
        "stopped_because": result.stopped_because,
        "kl_target_nats": result.kl_target_nats,
        "reward_model_s": fitted - started,
        "ppo_s": time.perf_counter() - fitted,
    }


def win_rate(shipped: Example, new: Asked, base: Asked, cohort: str | None = None) -> dict[str, float]:
    """W of new against base by the raters' rules without noise; the interval's unit is the rater, then the question."""
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


def _judged(report: Report, shipped: Example, path: Path, labels: Labels, kind: Kind, base: Asked) -> dict[str, Any]:
    """Train on the labels, answer the questions that nobody rated, compare with the base."""

    def compute() -> dict[str, Any]:
        policy = Policy.load(path, seed=SEED)
        trained = improve(policy, shipped, labels, kind)
        new = answers(policy, shipped, shipped.held_out, JUDGED_ANSWERS, reference=False, seed=SEED + 1)
        replies: list[Reply] = [
            policy.reply([{"role": "user", "content": prompt}], shipped.system_prompt, text, finished)
            for prompt, some in new.items()
            for text, finished in some[:2]
        ]
        gaps, _ = kl_by_position(policy, replies, shipped.temperature)
        return {
            **trained,
            "win": win_rate(shipped, new, base),
            "win_of_cohort": {name: win_rate(shipped, new, base, name) for name in sorted({rater.cohort for rater in shipped.raters})},
            "answers": described(new),
            "kl_nats": float(gaps.sum(1).mean()),
            "examples": {prompt: [base[prompt][0][0], some[0][0]] for prompt, some in new.items()},
        }

    return report.cells.get({"kind": kind, "quick": quick(), "rated": labels.digest}, compute)


def main() -> int:
    report = Report("smollm2", seed=SEED, rooms=("trainer", "examples/smollm2"))
    shipped = example(SEED)
    path = shipped.policy_dir(DATA)
    FOLDER.mkdir(parents=True, exist_ok=True)
    said = {"prompts": shipped.prompts, "held_out": shipped.held_out, "system": shipped.system_prompt, "max_tokens": shipped.max_tokens}
    bank = report.cells.get({"kind": "base", **said}, lambda: _bank(Policy.load(path, seed=SEED), shipped))
    rows = rated(shipped, _pairs(bank["rated"]))
    started = time.perf_counter()
    labels = from_snapshot(rows, Policy.load(path, seed=SEED), shipped.system_prompt)
    features_s = time.perf_counter() - started
    base = _pairs(bank["held_out"])
    real = _judged(report, shipped, path, labels, "real", base)
    figures: dict[str, object] = {
        "ratings": labels.count,
        "base_s": bank["seconds"],
        "features_s": features_s,
        "before": described(base),
        "after": real,
    }
    win, before, after = real["win"], described(base), real["answers"]
    if quick():
        report.check("iterations of PPO", len(real["steps"]), at_least=3)
        report.control("left out of the quick run", caught=True)
        return report.finish(figures)
    report.check("W by the raters' rules, lower end with the rater as the unit", win["low"], at_least=0.5)
    report.check("the same, with the question as the unit", win["low_by_prompt"], at_least=0.5)
    name = "on_topic_and_says_something"
    report.check("share of answers that name what was asked and say something", after[name], at_least=before[name] - 0.1)
    control = _judged(report, shipped, path, labels.shuffled(SEED), "shuffled", base)
    figures["control"] = control
    report.control("the same on shuffled ratings: W <= 0.55", caught=control["win"]["W"] <= 0.55)
    return report.finish(figures)


def _bank(policy: Policy, shipped: Example) -> dict[str, Any]:
    """Answers of the base: those to be rated and those to be beaten."""
    return {
        "rated": answers(policy, shipped, shipped.prompts, RATED_ANSWERS, reference=True, seed=SEED),
        "held_out": answers(policy, shipped, shipped.held_out, JUDGED_ANSWERS, reference=True, seed=SEED + 1),
    }


def _pairs(stored: dict[str, list[list[Any]]]) -> Asked:
    """Answers as JSON keeps them, as pairs again."""
    return {prompt: [(str(text), bool(finished)) for text, finished in some] for prompt, some in json.loads(json.dumps(stored)).items()}


if __name__ == "__main__":
    raise SystemExit(main())
