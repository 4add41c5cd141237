"""PPO learns a score, keeps its promises on the way, and goes on bit-equal after a kill."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from learning_policy import learning_policy, low_words
from pydantic import ValidationError
from torch import Tensor

from feedback.errors import TrainingRefused
from trainer.budget import Result, Run, Step, Watched, kl_budget
from trainer.config import PPOSettings
from trainer.critic import Warmup
from trainer.losses import PolicyLoss, policy_loss
from trainer.policy import Policy
from trainer.ppo import Options, Score, train
from trainer.reply import Reply

PROMPTS = [(2, i, i + 1, 3) for i in range(6, 26)]
FAST = PPOSettings(iterations=3, rollouts=16, minibatch=8, microbatch_tokens=48, learning_rate=3e-3, kl_target_nats=4.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return learning_policy(tmp_path_factory.mktemp("policy"))


def watched_low_words(replies: list[Reply], features_BD: Tensor) -> Watched:
    return Watched(float(low_words(replies, features_BD).mean()), torch.zeros(1))


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


KINDS = {"head": FAST, "adapter": FAST.model_copy(update={"critic": "adapter"}), "rloo": FAST.model_copy(update={"algorithm": "rloo"})}


def base_scores(policy: Policy) -> Warmup:
    replies = policy.sample(PROMPTS[:8], max_tokens=8, temperature=0.7, seed=5)
    return Warmup(replies, low_words(replies, torch.empty(0)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_run_goes_on_bit_equal(folder: Path, tmp_path: Path, kind: str) -> None:
    settings, whole = KINDS[kind], Policy.load(folder)
    warmup = base_scores(whole)
    expected = run(whole, settings, watch=watched_low_words, warmup=warmup)

    class Killed(Exception):
        pass

    def kill(step: Step) -> None:
        if step.step == 1:
            raise Killed

    path = tmp_path / "ppo.pt"
    with pytest.raises(Killed):
        run(Policy.load(folder), settings, watch=watched_low_words, warmup=warmup, checkpoint=path, on_step=kill)
    resumed = Policy.load(folder)
    result = run(resumed, settings, watch=watched_low_words, checkpoint=path)
    assert [(s.score, s.kl_nats, s.beta, s.approx_kl, s.value_loss) for s in result.steps] == [
        (s.score, s.kl_nats, s.beta, s.approx_kl, s.value_loss) for s in expected.steps
    ]
    for name in ("default", "critic"):
        assert all(torch.equal(value, resumed.state(name)[key]) for key, value in whole.state(name).items())


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_ratio_is_one_a_fresh_kl_is_zero_and_groups_change_nothing(folder: Path, kind: str) -> None:
    settings = KINDS[kind].model_copy(update={"iterations": 2})
    first, second = (run(Policy.load(folder), settings.model_copy(update={"microbatch_tokens": budget})).steps for budget in (20, 1000))
    for steps in (first, second):
        assert steps[0].kl_nats == 0.0
        assert [step.first_ratio_deviation for step in steps] == [0.0] * 3
        assert steps[1].kl_nats > 0
    # One reply at a time or all together: the same losses, but for rounding.
    for one, all_ in zip(first, second, strict=True):
        assert one.score == all_.score
        assert (one.approx_kl, one.clipfrac, one.value_loss) == pytest.approx((all_.approx_kl, all_.clipfrac, all_.value_loss), rel=1e-4)
        assert one.explained_variance == pytest.approx(all_.explained_variance, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["adapter", "rloo"])
def test_the_other_kinds_learn_too(folder: Path, kind: str) -> None:
    policy = Policy.load(folder)

    def mean_score() -> float:
        return float(low_words(policy.sample(PROMPTS * 16, max_tokens=8, temperature=0.7, seed=9), torch.empty(0)).mean())

    before = mean_score()
    result = run(policy, KINDS[kind].model_copy(update={"iterations": 10, "rollouts": 32}), warmup=base_scores(policy))
    assert mean_score() > before + 0.5
    assert 0 < result.steps[result.released].kl_nats <= result.kl_target_nats


def test_policy_and_critic_adapters_do_not_pull_at_each_other(folder: Path) -> None:
    states = {}
    for kind in ("head", "adapter"):
        policy = Policy.load(folder)
        run(policy, KINDS[kind].model_copy(update={"epochs": 1, "iterations": 1}))
        states[kind] = policy.state()
        other = policy.state("critic")
        assert bool(other) == (kind == "adapter")
        # The critic's head is 0 in the first step, so its adapter moves from the second on.
        assert all(float(value.abs().max()) > 0 for value in other.values())
    run(policy, FAST.model_copy(update={"iterations": 1}))
    assert not policy.state("critic"), "another run begins without the last one's critic"
    # Both critics say 0 in the first iteration: whatever the critic's adapter learnt, the policy's learnt the same.
    assert all(torch.equal(value, states["adapter"][name]) for name, value in states["head"].items())


def test_a_warm_start_fits_the_critics_adapter(folder: Path) -> None:
    def first_value_loss(warm: bool) -> float:
        policy = Policy.load(folder)
        replies = policy.sample(PROMPTS * 2, max_tokens=8, temperature=0.7, seed=5)
        warmup = Warmup(replies, low_words(replies, torch.empty(0))) if warm else None
        return run(policy, KINDS["adapter"].model_copy(update={"iterations": 1}), warmup=warmup).steps[0].value_loss

    assert first_value_loss(True) < first_value_loss(False)


def test_rloo_samples_every_prompt_several_times(folder: Path) -> None:
    asked: list[list[tuple[int, ...]]] = []

    def look(replies: list[Reply], features_BD: Tensor) -> Tensor:
        asked.append([reply.prompt for reply in replies])
        return low_words(replies, features_BD)

    run(Policy.load(folder), KINDS["rloo"].model_copy(update={"iterations": 1}), look)
    assert len(set(asked[0])) == 4
    assert all(len(set(asked[0][start : start + 4])) == 1 for start in range(0, 16, 4))
    with pytest.raises(ValidationError, match=r"ppo\.rollouts is 30.*multiple of ppo\.rloo_samples \(4\)"):
        PPOSettings(algorithm="rloo", rollouts=30)


class Breaks:
    """A loss that is no number in one minibatch."""

    def __init__(self, at: int) -> None:
        self.calls, self.at = 0, at

    def __call__(self, logprobs_BT: Tensor, *rest: Any) -> PolicyLoss:
        self.calls += 1
        return policy_loss(logprobs_BT * (math.nan if self.calls == self.at else 1.0), *rest)


def test_a_loss_that_is_no_number_names_step_and_minibatch_and_leaves_the_checkpoint(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "ppo.pt"
    settings = FAST.model_copy(update={"microbatch_tokens": 10_000})  # one group a minibatch: 2 epochs of 2 a step
    kept: list[bytes] = []
    with monkeypatch.context() as broken:
        broken.setattr("trainer.ppo.policy_loss", Breaks(at=4 + 3))
        with pytest.raises(TrainingRefused, match=r"the loss is nan in step 1, epoch 1, minibatch 0; the last checkpoint is kept"):
            run(Policy.load(folder), settings, checkpoint=path, on_step=lambda step: kept.append(path.read_bytes()))
    assert path.read_bytes() == kept[0]
    whole, resumed = Policy.load(folder), Policy.load(folder)
    expected = run(whole, settings)
    assert run(resumed, settings, checkpoint=path).steps[-1].kl_nats == expected.steps[-1].kl_nats
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
    result = run(policy, settings, watch=lambda replies, features: Watched(-float(low_words(replies, features).mean()), torch.zeros(1)))
    assert "other raters" in result.stopped_because
    assert len(result.steps) < 20
    assert result.released < result.steps[-1].step


def test_an_earlier_stop_never_releases_what_was_beyond_the_target(folder: Path) -> None:
    policy = Policy.load(folder)
    control = Run(PPOSettings(kl_target_nats=2.0, patience=1, rollouts=8))
    control.beta_for(10.0)
    # Noise of one mean of 8 replies: 3·sqrt(2 / 8) = 1.5. Best at step 2, whose KL is above the target; then a fall by 4.
    for step, (kl, score) in enumerate([(0.0, 0.0), (1.5, 2.0), (2.5, 3.0), (1.8, -1.0)]):
        measured = Step(step=step, score=0, stop_score=score, kl_nats=kl, beta=0.5, reply_tokens=10, finished=1)
        ended = control.judge(measured, policy, Watched(score, torch.zeros(1)))
        assert ended == (step == 3)
        if not ended:
            control.finish(measured)
    assert control.result(policy).released == 1


def test_a_fall_that_few_raters_cannot_tell_from_none_does_not_stop(folder: Path) -> None:
    policy = Policy.load(folder)
    # The fall from 2 to 0 is beyond the sampling noise, 3·sqrt(2 / 8) = 1.5, but not beyond 3·sqrt(2 / 8 + 1²) = 3.35, where the raters
    # leave open what they think of the change with an sd of 1.
    for sd, ends in ((0.0, True), (1.0, False)):
        control = Run(PPOSettings(kl_target_nats=2.0, patience=1, rollouts=8))
        control.beta_for(10.0)
        ended = []
        for step, score in enumerate([0.0, 2.0, 0.0]):
            measured = Step(step=step, score=0, stop_score=score, kl_nats=0.5, beta=0.5, reply_tokens=10, finished=1)
            ended.append(control.judge(measured, policy, Watched(score, torch.tensor([0.0, sd * (step == 2)]))))
            if not ended[-1]:
                control.finish(measured)
        assert ended == [False, False, ends]


def test_the_critic_starts_from_scored_replies(folder: Path) -> None:
    policy = Policy.load(folder)
    replies = policy.sample(PROMPTS * 2, max_tokens=8, temperature=0.7, seed=5)
    scores = low_words(replies, torch.empty(0))
    cold = run(Policy.load(folder), FAST.model_copy(update={"iterations": 1}))
    warm = run(policy, FAST.model_copy(update={"iterations": 1}), warmup=Warmup(replies, scores))
    assert cold.steps[0].explained_variance == pytest.approx(0.0, abs=1e-6)
    assert warm.steps[0].explained_variance != pytest.approx(0.0, abs=1e-6)  # of which sign is luck: 16 replies of a random policy
    assert warm.steps[0].value_loss < cold.steps[0].value_loss


def test_the_critic_starts_from_what_rewards_will_be(folder: Path, tmp_path: Path) -> None:
    """Scores without the penalty for cut replies would start it too high."""
    known = base_scores(Policy.load(folder))
    # The head's bias is the mean over tokens of the warm-up's returns; at this rate it stays where it began.
    settings = FAST.model_copy(update={"iterations": 1, "unfinished_penalty": 3.0, "critic_learning_rate": 1e-20})
    run(Policy.load(folder), settings, warmup=known, checkpoint=tmp_path / "ppo.pt")
    begun = float(torch.load(tmp_path / "ppo.pt", weights_only=True)["critic"]["linear.bias"])
    rewards = [float(score) - 3.0 * (not reply.finished) for score, reply in zip(known.scores_B, known.replies, strict=True)]
    assert any(not reply.finished for reply in known.replies)
    tokens = [len(reply.tokens) for reply in known.replies]
    assert begun == pytest.approx(sum(r * n for r, n in zip(rewards, tokens, strict=True)) / sum(tokens), abs=1e-5)


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
