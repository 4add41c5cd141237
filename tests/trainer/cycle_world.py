"""A tiny policy, people who rated it, and a cycle about them. Run as a script, it is the trainer that the test kills."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from tiny_policy import make_tiny_policy

from feedback import snapshot
from feedback.config import FeedbackSettings, Settings
from feedback.events import (
    Event,
    FeedbackGiven,
    FinishedText,
    InteractionFinished,
    InteractionStarted,
    Side,
    Slot,
    StartedText,
)
from feedback.stores import Stores, open_stores
from trainer.config import CycleSettings, PPOSettings, RewardModelSettings
from trainer.facts import FactLine
from trainer.policy import Policy
from trainer.schedule import Job, LearningSettings

PROMPTS = [" where shop", " when open", " hello", " tea please", " one street", " red bread"]
HELD_OUT = [" where tea", " when closed", " two bread", " green shop"]
FACTS = [
    FactLine(" red", " one two", (" two one", " three"), "red"),
    FactLine(" green", " tea", (" bread",), "green"),
    FactLine(" blue", " yes", (" no",), "blue"),
]
RATERS = 10
SETTINGS = LearningSettings(
    reward_model=RewardModelSettings(
        maps=("linear",), ridges=(0.1, 1.0), folds=2, grid_extensions=0, watch_min_raters=2, watch_min_labels=30
    ),
    ppo=PPOSettings(iterations=6, rollouts=8, minibatch=4, microbatch_tokens=64, kl_target_nats=5.0),
    cycle=CycleSettings(evaluation_samples=2),
    code_version="test",
)


def utility(answer: str, finished: bool) -> float:
    """People like to hear of tea and bread, and answers that end."""
    return 4.0 * (answer.count("tea") + answer.count("bread") + finished - 1.0)


def _answered(
    stores: Stores, interaction: str, subject: str, prompt: str, answer: str, finished: bool, about: tuple[str, Side] | None = None
) -> list[Event]:
    asked = StartedText(messages=[{"role": "user", "content": prompt}])
    return [
        InteractionStarted(
            event_id=f"started-{interaction}",
            interaction_id=interaction,
            subject=subject,
            subject_kind="named",
            cohorts=("simulated",),
            source="simulated",
            comparison_id=about[0] if about else None,
            side=about[1] if about else None,
            model="plaudit",
            adapter="a" * 64,
            sealed=stores.subjects.seal((subject,), asked),
        ),
        InteractionFinished(
            event_id=f"finished-{interaction}",
            interaction_id=interaction,
            subject=subject,
            finish_reason="stop" if finished else "length",
            sealed=stores.subjects.seal((subject,), FinishedText(answer=answer)),
        ),
    ]


def rated(stores: Stores, policy: Policy, count: int) -> None:
    """`count` comparisons by simulated raters, and a thumb on the first answer of each."""
    rng = np.random.default_rng(0)
    encoded = [policy.encode([{"role": "user", "content": prompt}]) for prompt in PROMPTS]
    replies = policy.sample([encoded[i % len(PROMPTS)] for i in range(2 * count)], max_tokens=12, temperature=1.0, seed=4)
    events: list[Event] = []
    for index in range(count):
        prompt, rater, comparison = PROMPTS[index % len(PROMPTS)], f"rater-{index % RATERS}", f"comparison-{index}"
        # Replies i and i + count answer the same prompt, because count is a multiple of the number of prompts.
        pair = [(policy.decode(reply.tokens), reply.finished) for reply in (replies[index], replies[index + count])]
        for side, (answer, finished) in zip(("a", "b"), pair, strict=True):
            about: tuple[str, Side] = (comparison, "a" if side == "a" else "b")
            events += _answered(stores, f"{comparison}-{side}", rater, prompt, answer or " no", finished, about)
        likes = [utility(*answer) for answer in pair]

        def said(target: str, slot: Slot, value: str, by: str = rater) -> FeedbackGiven:
            return FeedbackGiven(event_id=f"{slot}-{target}", target=target, rater=by, slot=slot, value=value, source="simulated")

        events.append(said(comparison, "choice", "a" if rng.random() < 1 / (1 + np.exp(likes[1] - likes[0])) else "b"))
        events.append(said(f"{comparison}-a", "rating", "up" if rng.random() < 1 / (1 + np.exp(-likes[0])) else "down"))
    stores.log.append_sync(events)


def make_job(folder: Path, count: int = 90) -> Job:
    """Policy, ratings and snapshot below `folder`; made once, found again the next time."""
    policy = folder / "policy"
    if not policy.exists():
        make_tiny_policy(policy)
    stores = open_stores(Settings(feedback=FeedbackSettings(data_dir=folder)))
    if not (folder / "snapshots").exists():
        rated(stores, Policy.load(policy), count)
        stores.archive.ingest(stores.logs)
        snapshot.build(stores.archive, stores.subjects, folder / "snapshots")
    stores.close()
    (made,) = (folder / "snapshots").iterdir()
    return Job(
        policy=policy,
        policy_name="tiny",
        snapshot=made,
        system_prompt=None,
        temperature=1.0,
        max_tokens=12,
        max_model_len=64,
        held_out=HELD_OUT,
        probes=[" hello"],
        facts=FACTS,
    )


def main() -> None:
    import torch

    from trainer.cycle import run_cycle

    torch.set_num_threads(1)
    print(run_cycle(make_job(Path(sys.argv[1])), SETTINGS, Path(sys.argv[1])).adapter_id)


if __name__ == "__main__":
    main()
