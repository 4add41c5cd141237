"""What benchmarks on the concierge share: raters who say what they think, a cycle about it, and a judge who knows the hidden preference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness import quick
from examples.base import Example
from feedback import snapshot
from feedback.config import FeedbackSettings, Settings
from feedback.events import Event, FeedbackGiven, FinishedText, InteractionFinished, InteractionStarted, Side, Slot, StartedText
from feedback.stores import Stores, open_stores
from trainer.critic import Warmup
from trainer.cycle import CycleResult, run_cycle
from trainer.evaluation import Sampling, sample
from trainer.policy import Policy
from trainer.ppo import Score
from trainer.reply import Reply
from trainer.schedule import Job, LearningSettings

CLIP = 4.0
"""Of scores, in sd."""
KNOWN_SAMPLES = 4
"""Answers of the base to each prompt, which give a known preference its zero and its unit."""
SAMPLES = 8
"""Answers of each policy to a held-out prompt; every one is compared with every one."""


Shown = Sequence[tuple[str, Sequence[tuple[str, bool]]]]
"""For each comparison its prompt and two answers, each with whether it was finished."""


def shown(example: Example, policy: Policy, comparisons: int, seed: int) -> Shown:
    """Two answers of the base for each comparison."""
    asked = [example.prompts[i % len(example.prompts)] for i in range(comparisons)]
    how = Sampling(example.system_prompt, example.temperature, example.max_tokens, 2, seed)
    texts = [(policy.decode(reply.tokens), reply.finished) for reply in sample(policy, asked, how, reference=True)]
    return [(prompt, texts[2 * index : 2 * index + 2]) for index, prompt in enumerate(asked)]


def record(stores: Stores, example: Example, answers: Shown, seed: int, *, at_most: int | None = None) -> int:
    """The raters ask, see two answers, choose, and give thumbs. How many ratings: `at_most` the first so many."""
    rng = np.random.default_rng([seed, len(answers)])
    raters = [example.raters[int(i) % len(example.raters)] for i in rng.permutation(len(answers))]
    events: list[Event] = []
    ratings = 0
    for index, ((prompt, pair), rater) in enumerate(zip(answers, raters, strict=True)):
        comparison, subject = f"comparison-{index}", stores.subjects.pseudonym("default", rater.id)
        (a, done_a), (b, done_b) = pair
        opinions: list[tuple[str, Slot, str | None]] = [(comparison, "choice", rater.choose(prompt, a, b, done_a, done_b, rng))]
        sides: tuple[Side, Side] = ("a", "b")
        for side, (answer, finished) in zip(sides, pair, strict=True):
            interaction = f"{comparison}-{side}"
            who = (subject, rater.cohort, example.name)
            events += _answered(stores, (interaction, comparison, side), who, prompt, (answer, finished))
            opinions.append((interaction, "rating", rater.thumb(prompt, answer, finished, rng)))
        for target, slot, value in opinions:
            if value is not None and ratings != at_most:
                ratings += 1
                about = f"{slot}-{target}"
                events.append(FeedbackGiven(event_id=about, target=target, rater=subject, slot=slot, value=value, source="simulated"))
    stores.log.append_sync(events)
    return ratings


def _answered(stores: Stores, about: tuple[str, str, Side], who: tuple[str, str, str], prompt: str, said: tuple[str, bool]) -> list[Event]:
    (interaction, comparison, side), (subject, cohort, model), (answer, finished) = about, who, said
    return [
        InteractionStarted(
            event_id=f"started-{interaction}",
            interaction_id=interaction,
            subject=subject,
            subject_kind="named",
            cohorts=("simulated", cohort),
            source="simulated",
            comparison_id=comparison,
            side=side,
            model=model,
            adapter="0" * 64,
            sealed=stores.subjects.seal((subject,), StartedText(messages=[{"role": "user", "content": prompt}])),
        ),
        InteractionFinished(
            event_id=f"finished-{interaction}",
            interaction_id=interaction,
            subject=subject,
            finish_reason="stop" if finished else "length",
            sealed=stores.subjects.seal((subject,), FinishedText(answer=answer)),
        ),
    ]


def turn(example: Example, comparisons: int, seed: int, settings: LearningSettings, folder: Path) -> tuple[CycleResult, int]:
    """Ratings of the base's answers by the example's raters, a snapshot, a cycle below `folder`; and how many ratings."""
    answers = shown(example, Policy.load(example.policy_dir(folder)), comparisons, seed)
    return turn_on(example, answers, seed, settings, folder)


def turn_on(example: Example, answers: Shown, seed: int, settings: LearningSettings, folder: Path) -> tuple[CycleResult, int]:
    """The same on answers that were sampled already."""
    stores = open_stores(Settings(feedback=FeedbackSettings(data_dir=folder)), "benchmark")
    try:
        ratings = record(stores, example, answers, seed)
        stores.ingest()
        made = snapshot.build(stores.archive, stores.subjects, folder / "snapshots")
    finally:
        stores.close()
    return run_cycle(job_of(example, made.path, folder), settings, folder), ratings


def job_of(example: Example, snapshot_path: Path, folder: Path) -> Job:
    """What a cycle on this example is about."""
    return Job(
        policy=example.policy_dir(folder),
        policy_name=example.name,
        snapshot=snapshot_path,
        system_prompt=example.system_prompt,
        temperature=example.temperature,
        max_tokens=example.max_tokens,
        max_model_len=example.max_model_len,
        held_out=example.held_out,
        probes=(),
        facts=example.facts,
    )


@dataclass(frozen=True)
class Judge:
    """A hidden preference, for replies."""

    utility: Callable[[str, str, bool], float]
    """Of (prompt, answer, finished): a world's or one rater's."""
    example: Example
    policy: Policy

    def utilities(self, prompts: Sequence[str], replies: Sequence[Reply]) -> Tensor:
        """One for each reply; `prompts[i]` is what reply i answers."""
        texts = [self.policy.decode(reply.tokens) for reply in replies]
        found = [self.utility(p, text, r.finished) for p, text, r in zip(prompts, texts, replies, strict=True)]
        return torch.tensor(found, dtype=torch.float32)

    def wins(self, candidate: Policy, seed: int) -> float:
        """W: how often an answer of the candidate beats one of the base to the same held-out prompt; a tie counts half."""
        example = self.example
        asked = example.held_out[:8] if quick() else example.held_out
        each = [prompt for prompt in asked for _ in range(SAMPLES)]
        sides = []
        for reference, offset in ((False, 1), (True, 2)):
            how = Sampling(example.system_prompt, example.temperature, example.max_tokens, SAMPLES, 7_000_000 + 10_000 * seed + offset)
            replies = sample(candidate, asked, how, reference=reference)
            sides.append(self.utilities(each, replies).reshape(len(asked), SAMPLES))
        gaps_QSS = sides[0][:, :, None] - sides[1][:, None]
        return float((gaps_QSS > 0).float().mean() + 0.5 * (gaps_QSS == 0).float().mean())

    def reward(self, seed: int) -> tuple[Score, Warmup]:
        """The preference itself as a score, and scored answers of the base: the prompt's own zero and one unit for all."""
        example = self.example
        how = Sampling(example.system_prompt, example.temperature, example.max_tokens, KNOWN_SAMPLES, seed)
        each = [prompt for prompt in example.prompts for _ in range(KNOWN_SAMPLES)]
        base = sample(self.policy, example.prompts, how, reference=True)
        by_prompt_QS = self.utilities(each, base).reshape(-1, KNOWN_SAMPLES)
        unit = float(by_prompt_QS.var(1).mean().sqrt())
        text_of = {reply.prompt: prompt for reply, prompt in zip(base, each, strict=True)}
        zero_of = {reply.prompt: float(by_prompt_QS[i // KNOWN_SAMPLES].mean()) for i, reply in enumerate(base)}

        def score(replies: list[Reply], _: Tensor) -> Tensor:
            raw_B = self.utilities([text_of[reply.prompt] for reply in replies], replies)
            return ((raw_B - torch.tensor([zero_of[reply.prompt] for reply in replies])) / unit).clamp(-CLIP, CLIP)

        return score, Warmup(base, score(base, torch.empty(0)))
