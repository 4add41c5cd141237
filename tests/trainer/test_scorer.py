"""What a rollout's arms answer is scored once, each prompt from its own zero, and nobody who is gone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cycle_world import SETTINGS, make_job

from deploy.config import PolicySettings
from deploy.manifest import ManifestFields, base_digests, identity_adapter
from deploy.registry import Registry
from feedback.clock import COUNTER_BITS
from feedback.config import FeedbackSettings, Settings
from feedback.errors import InvalidInput
from feedback.events import (
    Arm,
    ConsentWithdrawn,
    Event,
    FinishedText,
    InteractionFinished,
    InteractionScored,
    InteractionStarted,
    StartedText,
)
from feedback.stores import open_stores
from trainer.config import HardwareSettings
from trainer.cycle import run_cycle
from trainer.policy import Policy
from trainer.scorer import CanaryScorer, InteractionScorer

ASKED = PolicySettings(name="tiny", temperature=1.0, max_tokens=12, max_model_len=64)
pytestmark = pytest.mark.slow  # one cycle on the tiny policy


class World:
    """A canary that a cycle has trained, and people whom its arms answer."""

    def __init__(self, folder: Path) -> None:
        torch.set_num_threads(1)
        job = make_job(folder)
        self.policy, self.stores = job.policy, open_stores(Settings(feedback=FeedbackSettings(data_dir=folder)), "scorer")
        self.registry = Registry(self.stores.engine)
        fields = ManifestFields(kind="identity", base_model="tiny", base=base_digests(job.policy), temperature=1.0)
        identity, path = identity_adapter(job.policy, folder / "adapters", fields)
        self.registry.register(identity, path, "test")
        self.registry.start_with(identity, "test")
        settings = replace(SETTINGS, cycle=SETTINGS.cycle.model_copy(update={"seeds": 1}))
        self.canary = run_cycle(job, settings, folder, registry=self.registry).adapter_id
        self.rollout = self.registry.begin_rollout(self.canary, "test")

    def start(self) -> None:
        epoch = self.registry.lease("controller", "test", 60.0)
        assert epoch is not None
        self.registry.start_canary(self.rollout.id, 0.25, [], "test", epoch)

    def answered(self, name: str, arm: Arm, answer: str, prompt: str = " green shop", reason: str = "stop", stamp: int = 0) -> list[Event]:
        subject = f"person-{name}"
        return [
            InteractionStarted(
                event_id=f"s-{name}",
                stamp=stamp,
                interaction_id=name,
                subject=subject,
                subject_kind="named",
                model="plaudit",
                adapter=self.canary,
                arm=arm,
                rollout=self.rollout.id,
                sealed=self.stores.subjects.seal((subject,), StartedText(messages=[{"role": "user", "content": prompt}])),
            ),
            InteractionFinished(
                event_id=f"f-{name}",
                stamp=stamp,
                interaction_id=name,
                subject=subject,
                finish_reason=reason,
                sealed=self.stores.subjects.seal((subject,), FinishedText(answer=answer)),
            ),
        ]

    def happened(self, *events: Event) -> None:
        self.stores.log.append_sync(events)

    def scorer(self) -> InteractionScorer:
        return InteractionScorer(self.stores, self.registry, self.policy, ASKED)

    def scores(self) -> dict[str, InteractionScored]:
        self.stores.ingest()
        events = self.stores.archive.events("interaction.scored")
        return {event.interaction_id: event for event in events if isinstance(event, InteractionScored)}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    world = World(tmp_path_factory.mktemp("scored"))
    world.happened(*world.answered("before", "stable", " tea"))
    assert world.scorer().once() == {}  # no canary yet
    world.start()
    yield world
    world.stores.close()


def test_arms_are_scored_from_one_zero_and_nobody_twice(world: World) -> None:
    world.happened(
        *world.answered("canary", "canary", " tea bread"),
        *world.answered("baseline", "baseline", " tea bread"),
        *world.answered("stable", "stable", " no no no"),
        *world.answered("broken", "canary", " tea", reason="error"),
        *world.answered("empty", "canary", " "),
        *world.answered("gone", "canary", " tea"),
        *world.answered("withdrawn", "canary", " tea"),
        ConsentWithdrawn(event_id="w", subject="person-withdrawn"),
    )
    world.stores.subjects.erase("person-gone")
    first = world.scorer()
    assert first.once() == {"scored": 3, "no answer to a person": 1, "empty or longer than the context": 1, "erased or withdrawn": 2}
    scores = world.scores()
    assert set(scores) == {"canary", "baseline", "stable"}
    # The same answer to the same question is worth the same in every arm, and only the same.
    assert scores["canary"].score == scores["baseline"].score != scores["stable"].score
    assert len({event.reward_model for event in scores.values()}) == 1
    assert first.once() == {}
    # Another process, also one that lost its place, finds what is there and draws the same zero.
    (world.stores.settings.feedback.data_dir / "scorer.json").unlink()
    again = world.scorer()
    assert again.once()["scored before"] == 3 and world.scores() == scores
    world.happened(*world.answered("later", "baseline", " tea bread"))
    assert again.once() == {"scored": 1}
    assert world.scores()["later"].score == scores["canary"].score


def test_the_zero_of_a_prompt_is_what_the_base_answers_to_it(world: World) -> None:
    policy = Policy.load(world.policy)
    canary = CanaryScorer.of(world.rollout, world.registry, world.stores.settings.feedback.data_dir, policy, ASKED)
    assert canary is not None
    for prompt in (" green shop", " two bread"):
        encoded = policy.encode([{"role": "user", "content": prompt}])
        with policy.reference():
            fresh = policy.sample([encoded] * 64, max_tokens=12, temperature=1.0, seed=5)
        scores = torch.tensor([canary.score(reply) for reply in fresh])
        # 64 answers of unit sd around a centre of 4: 0 within three standard errors of sqrt(1/64 + 1/4).
        assert scores.mean().abs() < 3 * (1 / 64 + 1 / 4) ** 0.5 and 0.4 < scores.std() < 2.5


def test_an_event_that_arrives_late_from_another_process_is_scored(world: World) -> None:
    scorer = world.scorer()
    world.happened(*world.answered("young", "canary", " tea", prompt=" hello"))
    scorer.once()
    stamp = world.stores.archive.as_of() - (5 << COUNTER_BITS)
    world.stores.archive.keep(world.answered("old", "canary", " tea", prompt=" hello", stamp=stamp))
    assert scorer.once() == {"scored": 1}
    scores = world.scores()
    assert scores["old"].score == scores["young"].score


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a GPU that is not there")
def test_it_computes_where_the_trainer_does(world: World) -> None:
    scorer = InteractionScorer(world.stores, world.registry, world.policy, ASKED, HardwareSettings(device="cuda"))
    with pytest.raises(InvalidInput, match=r"hardware\.device is 'cuda'"):
        scorer.once()


def test_a_canary_from_elsewhere_has_no_reward_model_here(world: World) -> None:
    registry, folder = world.registry, world.stores.settings.feedback.data_dir
    registry.end_rollout(world.rollout.id, "over", "test")
    reward = folder / "cycles" / str(registry.attestations(world.canary, "training")[-1].body["cycle"]) / "reward_model.safetensors"
    reward.rename(hidden := reward.with_suffix(".hidden"))
    world.rollout = registry.begin_rollout(world.canary, "test")
    world.start()
    world.happened(*world.answered("unscored", "canary", " tea"))
    assert world.scorer().once() == {}
    hidden.rename(reward)
