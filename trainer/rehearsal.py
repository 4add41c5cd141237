"""`plaudit train --dry-run`: what a cycle would do with what is here, how long, and what it would refuse. Changes nothing."""

from __future__ import annotations

import itertools
import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from deploy.config import PolicySettings
from deploy.manifest import base_digests
from deploy.registry import Registry
from feedback.errors import PlauditError, TrainingRefused
from feedback.snapshot import Row, load, opinions
from feedback.stores import Stores
from trainer.budget import kl_budget
from trainer.labels import check, usable
from trainer.policy import Policy
from trainer.processor import use_threads
from trainer.reply import by_tokens
from trainer.reward_model import two_models
from trainer.schedule import Job, LearningSettings, begun, cycle_id, ratings_now, ratings_then
from trainer.screening import Prompts, of_another_base, prompts_of, within_context
from trainer.start import job_of

PROBED = 16
"""Replies that are made and thrown away to measure what one costs; fewer at once would cost more each."""


@dataclass
class Rehearsal:
    """What was found, for a terminal."""

    lines: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    """Why no candidate would come out, if so."""


@dataclass(frozen=True)
class Costs:
    """Seconds a reply, measured; and what the replies were like."""

    generate_s: float
    forward_s: float
    train_s: float
    """Forward and backward, once."""
    reply_tokens: float


def rehearse(stores: Stores, registry: Registry, folder: Path, asked: PolicySettings, settings: LearningSettings) -> Rehearsal:
    """Look at everything that `learn` would look at. Raises InvalidInput where there is no policy to learn for."""
    found = Rehearsal()
    data_dir = stores.settings.feedback.data_dir
    unfinished = begun(data_dir)
    try:
        job = job_of(registry, folder, asked, unfinished.snapshot if unfinished else data_dir / "snapshots" / "none", settings.cycle)
        rows = load(job.snapshot).rows if unfinished else opinions(stores.archive, stores.subjects)
    except PlauditError as exc:
        found.refused.append(exc.message)
        return found
    if unfinished:
        cycle = data_dir / "cycles" / cycle_id(job, settings, load(job.snapshot).digest)
        done = [path.name for path in sorted(cycle.glob("*.json")) + sorted(cycle.glob("*.safetensors"))]
        found.lines.append(f"goes on with cycle {cycle.name}, which was begun and has {', '.join(done) or 'nothing yet'}")
    use_threads(folder, settings.cycle.threads)
    ppo, on = settings.ppo, settings.hardware
    policy = Policy.load(folder, rank=ppo.rank, alpha=ppo.alpha, seed=settings.cycle.seed, device=on.device, dtype=on.dtype)
    _say_ratings(found, rows, stores, settings)
    fitting, dropped = within_context(rows, policy, job.system_prompt, job.max_model_len)
    found.lines += dropped + of_another_base(fitting, job.answered_by or {}, base_digests(folder))
    kept = _say_labels(found, fitting, settings)
    prompts = _prompts(found, fitting, policy, job)
    if not job.held_out:
        found.refused.append("evaluation: 0 held-out prompts, at least 1 is needed; name a file in cycle.held_out")
    if not job.facts:
        found.lines.append("no facts are given (cycle.facts), so the gates will refuse the candidate")
    if prompts and kept:
        costs = _probe(policy, [policy.encode(json.loads(text), job.system_prompt) for text in prompts.fitting], job, settings)
        _say_plan(found, prompts, costs, job, settings)
        _say_time(found, _seconds(kept, min(len(prompts.fitting), settings.cycle.max_prompts), costs, job, settings), registry)
    return found


def _say_ratings(found: Rehearsal, rows: Sequence[Row], stores: Stores, settings: LearningSettings) -> None:
    kinds, sources = Counter(row.kind for row in rows), Counter(row.source for row in rows)
    new = ratings_now(stores.archive) - ratings_then(stores.settings.feedback.data_dir)
    found.lines.append(
        f"{len(rows)} ratings of finished answers ({kinds['choice']} choices, {kinds['thumb']} thumbs; "
        f"{', '.join(f'{count} {source}' for source, count in sorted(sources.items()))}) by {len({row.rater for row in rows})} raters; "
        f"{new} new since the last cycle, and `plaudit trainer` begins one at {settings.cycle.min_new_ratings}"
    )


def _say_labels(found: Rehearsal, rows: Sequence[Row], settings: LearningSettings) -> list[Row]:
    """What the reward model would be fitted to."""
    reward = settings.reward_model
    kept, dropped = usable(rows)
    try:
        found.lines += check(rows, allow_single_rater=reward.allow_single_rater)
    except TrainingRefused as exc:
        found.lines += dropped
        found.refused.append(exc.message)
        return kept
    raters = len({row.rater for row in kept})
    second = two_models(raters, len(kept), reward.watch_share, reward.watch_min_raters, reward.watch_min_labels)
    other = f"a second one by {round(raters * reward.watch_share)} of them may stop PPO earlier"
    few = f"no second one ({reward.watch_share:.0%} of the raters must be {reward.watch_min_raters} with {reward.watch_min_labels} ratings)"
    shuffled = "; the ratings are shuffled, as a control" if settings.cycle.shuffle_labels else ""
    choices = sum(row.kind == "choice" for row in kept)
    kind = "ridge on frozen features"
    if choices >= reward.ensemble_from_choices:
        kind += ", beside it an adapter of its own with an ensemble of heads, and what foresees more of the two"
    found.lines.append(
        f"reward model: {kind}, {len(kept)} ratings ({choices} choices) by {raters} raters; {other if second else few}{shuffled}"
    )
    return kept


def _prompts(found: Rehearsal, rows: Sequence[Row], policy: Policy, job: Job) -> Prompts | None:
    try:
        prompts = prompts_of(rows, policy, job.system_prompt, job.max_model_len, job.max_tokens)
    except TrainingRefused as exc:
        found.refused.append(exc.message)
        return None
    found.lines += prompts.warnings
    return prompts


def _probe(policy: Policy, prompts: Sequence[tuple[int, ...]], job: Job, settings: LearningSettings) -> Costs:
    """Some replies of the base, a pass over them, and a pass with gradients that go nowhere."""
    asked = list(itertools.islice(itertools.cycle(prompts), PROBED))
    started = time.perf_counter()
    with policy.reference():
        replies = policy.sample(asked, max_tokens=job.max_tokens, temperature=job.temperature, seed=0)
    generated = time.perf_counter()
    policy.features(replies)
    read = time.perf_counter()
    some = [replies[i] for i in by_tokens(replies, settings.ppo.microbatch_tokens)[0]]
    states_BTD, mask_BT, _ = policy.hidden(some)
    torch.autograd.grad(policy.token_logprobs(states_BTD, mask_BT, some, job.temperature).sum(), policy.parameters)
    return Costs(
        generate_s=(generated - started) / len(replies),
        forward_s=(read - generated) / len(replies),
        train_s=(time.perf_counter() - read) / len(some),
        reply_tokens=sum(len(reply.tokens) for reply in replies) / len(replies),
    )


def _say_plan(found: Rehearsal, prompts: Prompts, costs: Costs, job: Job, settings: LearningSettings) -> None:
    ppo, cycle = settings.ppo, settings.cycle
    target = kl_budget(ppo, costs.reply_tokens)
    answering = "base, candidate and stable" if job.stable else "base and candidate"
    found.lines += [
        f"PPO: {cycle.seeds} x at most {ppo.iterations} iterations of {ppo.rollouts} rollouts, on "
        f"{min(len(prompts.fitting), cycle.max_prompts)} of {prompts.asked} prompts; base's answers have {costs.reply_tokens:.0f} tokens, "
        f"so the KL target is {target:.1f} nats a reply and training stops at {ppo.hard_stop * target:.1f}; left out where the "
        "reward model foresees nothing",
        f"evaluation: {len(job.held_out)} held-out prompts x {cycle.evaluation_samples} answers of {answering}, "
        f"{len(job.probes)} probes, {len(job.facts)} facts",
    ]


def _seconds(kept: Sequence[Row], prompts: int, costs: Costs, job: Job, settings: LearningSettings) -> dict[str, float]:
    """Of each stage that makes or reads replies, counted as its code does."""
    ppo, cycle, base_samples = settings.ppo, settings.cycle, settings.reward_model.base_samples
    answers = {(json.dumps(row.prompt), answer) for row in kept for answer in (row.answer_a, row.answer_b) if answer}
    new, read, both = costs.generate_s, costs.forward_s, costs.generate_s + costs.forward_s
    # An iteration makes its rollouts and reads them with the adapter off and on; the last one only measures.
    steps = (ppo.iterations + 1) * ppo.rollouts * (new + 2 * read) + ppo.iterations * ppo.rollouts * ppo.epochs * costs.train_s
    policies, drawn = 3 if job.stable else 2, len(job.held_out) * cycle.evaluation_samples
    # Two more passes over the candidate's and each further seed's answers for their KL, and as much at temperature 1.
    judged = drawn * (policies * both + 2 * read + (0 if job.temperature == 1 else new + 2 * read) + (cycle.seeds - 1) * (both + 2 * read))
    facts = sum(1 + len(fact.distractors) for fact in job.facts) * policies * read
    return {
        "labels": (len(answers) + len({text for text, _ in answers})) * read,
        "base": prompts * base_samples * both,
        "ppo": cycle.seeds * steps,
        "evaluation": judged + facts + len(job.probes) * policies * new,
    }


def _say_time(found: Rehearsal, seconds: dict[str, float], registry: Registry) -> None:
    whole = sum(seconds.values())
    found.lines.append(
        f"time, by {PROBED} replies just made and read: {', '.join(f'{name} {_time(s)}' for name, s in seconds.items())}; with the reward "
        f"model's fit a little more than {_time(whole)}"
    )
    records = sorted(registry.adapters(), key=lambda record: record.registered_ms)
    last = [each for record in records for each in registry.attestations(record.id, "training")]
    took = last[-1].body.get("seconds") if last else None
    if isinstance(took, dict) and took:
        found.lines.append("the last cycle took " + ", ".join(f"{name} {_time(float(str(s)))}" for name, s in took.items()))


def _time(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.0f} s"
