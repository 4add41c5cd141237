"""PPO learns a score, keeps its promises on the way, and goes on bit-equal after a kill."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from trainer_world import tiny_policy

from feedback.errors import TrainingRefused
from trainer.budget import Result, Run, Step, kl_budget
from trainer.config import PPOSettings
from trainer.policy import Policy
from trainer.ppo import Options, Score, Warmup, train
from trainer.reply import Reply

PROMPTS = [(2, i, i + 1, 3) for i in range(6, 26)]
FAST = PPOSettings(iterations=3, rollouts=16, minibatch=8, microbatch_tokens=48, learning_rate=3e-3, kl_target_nats=4.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_policy(tmp_path_factory.mktemp("policy"))


def low_words(replies: list[Reply], features_BD: Tensor) -> Tensor:
    """Likes the first half of the vocabulary; from -4 to 4, so that its sd is about 1."""
    return torch.tensor([8 * sum(t < 32 for t in reply.tokens) / len(reply.tokens) - 4 for reply in replies])


def run(policy: Policy, settings: PPOSettings, score: Score = low_words, **options: object) -> Result:
    return train(policy, PROMPTS, score, settings, max_tokens=8, temperature=0.7, seed=0, options=Options(**options))  # type: ignore[arg-type]


def test_it_learns_within_the_budget(folder: Path) -> None:
    policy = Policy.load(folder)
    seen: list[Step] = []
    result = run(policy, FAST.model_copy(update={"iterations": 10, "rollouts": 32}), on_step=seen.append)
    assert seen == result.steps
    first, released = result.steps[0], result.steps[result.released]
    assert first.kl_nats == pytest.approx(0.0, abs=1e-6)
    assert first.first_ratio_deviation <= 1e-6
    assert max(step.first_ratio_deviation for step in result.steps) <= 1e-6
    assert released.score > first.score + 1.0
    assert 0 < released.kl_nats <= result.kl_target_nats
    assert [step.step for step in result.steps] == list(range(len(result.steps)))


def test_the_released_adapter_is_the_measured_one(folder: Path) -> None:
    policy = Policy.load(folder)
    settings = FAST.model_copy(update={"iterations": 12, "kl_target_nats": 0.2})
    result = run(policy, settings)
    assert result.stopped_because.startswith("KL ")
    assert result.steps[-1].kl_nats > 0.3
    assert result.released == max(step.step for step in result.steps if step.kl_nats <= 0.2)
    again = Policy.load(folder)
    run(again, settings.model_copy(update={"iterations": result.released}))
    assert all(torch.equal(value, again.state()[name]) for name, value in policy.state().items())


@pytest.mark.slow
def test_a_flipped_score_teaches_the_opposite(folder: Path) -> None:
    settings = FAST.model_copy(update={"iterations": 8, "rollouts": 32})
    result = run(Policy.load(folder), settings, lambda replies, features: -low_words(replies, features))
    assert result.steps[result.released].score > result.steps[0].score + 0.8


def test_the_backbone_is_untouched(folder: Path) -> None:
    policy = Policy.load(folder)
    before = {n: p.detach().clone() for n, p in policy.model.named_parameters() if "lora_" not in n}
    run(policy, FAST)
    after = dict(policy.model.named_parameters())
    assert all(torch.equal(value, after[name]) and after[name].grad is None for name, value in before.items())


def test_a_killed_run_goes_on_bit_equal(folder: Path, tmp_path: Path) -> None:
    whole = Policy.load(folder)
    expected = run(whole, FAST, stop_score=low_words)

    class Killed(Exception):
        pass

    def kill(step: Step) -> None:
        if step.step == 1:
            raise Killed

    path = tmp_path / "ppo.pt"
    with pytest.raises(Killed):
        run(Policy.load(folder), FAST, stop_score=low_words, checkpoint=path, on_step=kill)
    resumed = Policy.load(folder)
    result = run(resumed, FAST, stop_score=low_words, checkpoint=path)
    assert [(s.score, s.kl_nats, s.beta, s.approx_kl) for s in result.steps] == [
        (s.score, s.kl_nats, s.beta, s.approx_kl) for s in expected.steps
    ]
    assert all(torch.equal(value, resumed.state()[name]) for name, value in whole.state().items())


def test_a_checkpoint_of_another_run_is_refused(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "ppo.pt"
    run(Policy.load(folder), FAST.model_copy(update={"iterations": 1}), checkpoint=path)
    with pytest.raises(TrainingRefused, match="another run"):
        run(Policy.load(folder), FAST.model_copy(update={"learning_rate": 1e-4}), checkpoint=path)


@pytest.mark.slow
def test_other_raters_may_stop_it_earlier(folder: Path) -> None:
    policy = Policy.load(folder)
    settings = FAST.model_copy(update={"iterations": 20, "rollouts": 32, "patience": 3})
    result = run(policy, settings, stop_score=lambda replies, features: -low_words(replies, features))
    assert "other raters" in result.stopped_because
    assert len(result.steps) < 20
    assert result.released < result.steps[-1].step


def test_an_earlier_stop_never_releases_what_was_beyond_the_target(folder: Path) -> None:
    policy = Policy.load(folder)
    control = Run(PPOSettings(kl_target_nats=2.0, patience=1, rollouts=8))
    control.beta_for(10.0)
    # Noise of one mean of 8 replies: 2·sqrt(2 / 8) = 1. Best at step 2, whose KL is above the target; then a fall by 4.
    for step, (kl, score) in enumerate([(0.0, 0.0), (1.5, 2.0), (2.5, 3.0), (1.8, -1.0)]):
        measured = Step(step=step, score=0, stop_score=score, kl_nats=kl, beta=0.5, reply_tokens=10, finished=1)
        ended = control.judge(measured, policy)
        assert ended == (step == 3)
        if not ended:
            control.finish(measured)
    assert control.result(policy).released == 1


def test_the_critic_starts_from_scored_replies(folder: Path) -> None:
    policy = Policy.load(folder)
    replies = policy.sample(PROMPTS * 2, max_tokens=8, temperature=0.7, seed=5)
    scores = low_words(replies, torch.empty(0))
    cold = run(Policy.load(folder), FAST.model_copy(update={"iterations": 1}))
    warm = run(policy, FAST.model_copy(update={"iterations": 1}), warmup=Warmup(replies, scores))
    assert cold.steps[0].explained_variance == pytest.approx(0.0, abs=1e-6)
    assert warm.steps[0].explained_variance != pytest.approx(0.0, abs=1e-6)  # of which sign is luck: 16 replies of a random policy
    assert warm.steps[0].value_loss < cold.steps[0].value_loss


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_score_that_is_not_finite_stops_naming_the_step(folder: Path, bad: float) -> None:
    with pytest.raises(TrainingRefused, match="step 0"):
        run(Policy.load(folder), FAST, lambda replies, features: torch.full((len(replies),), bad))


def test_no_prompts_are_refused(folder: Path) -> None:
    with pytest.raises(TrainingRefused, match="0 prompts"):
        train(Policy.load(folder), [], low_words, FAST, max_tokens=8, temperature=1.0)


def test_budget_and_controller_by_hand() -> None:
    assert kl_budget(PPOSettings(), 60.0) == 6.0
    assert kl_budget(PPOSettings(), 400.0) == 10.0
    assert kl_budget(PPOSettings(kl_target_nats=2.5), 400.0) == 2.5
    control = Run(PPOSettings(kl_target_nats=8.0))
    # 1 / sqrt(2·8) = 0.25
    assert control.beta_for(60.0) == pytest.approx(0.25)
    step = Step(step=0, score=0, stop_score=None, kl_nats=0.0, beta=0.25, reply_tokens=60, finished=1)
    control.finish(step)  # far below the target: x 0.8
    assert control.beta == pytest.approx(0.2)
    control.finish(Step(**vars(step) | {"kl_nats": 12.0}))  # half above: x 1.1
    assert control.beta == pytest.approx(0.22)
    control.finish(Step(**vars(step) | {"kl_nats": 80.0}))  # clipped: x 1.2
    assert control.beta == pytest.approx(0.264)
