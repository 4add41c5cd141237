"""What is counted in answers, and gains of candidates that are known."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cycle_world import HELD_OUT
from rating_world import rated_world
from tiny_policy import make_tiny_policy

from deploy.gates.topic import on_topic
from deploy.texts import repetition
from feedback.errors import TrainingRefused
from trainer.config import RewardModelSettings
from trainer.evaluation import (
    LONGEST,
    READ,
    Answers,
    Judge,
    Sampling,
    distinct,
    evaluate,
    kl_by_position,
    length_matched_win,
    sample,
    shortened,
    to_read,
)
from trainer.labels import features_of
from trainer.policy import Policy
from trainer.reply import Reply
from trainer.reward_model import RewardModel, fit

HOW = Sampling(system_prompt=None, temperature=1.0, max_tokens=10, samples=4, seed=5)


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    torch.set_num_threads(1)
    return Policy.load(make_tiny_policy(tmp_path_factory.mktemp("policy")))


def moved(policy: Policy, size: float) -> Policy:
    """The same policy with an adapter that does something."""
    generator = torch.Generator().manual_seed(1)
    policy.restore({name: size * torch.randn(p.shape, generator=generator) for name, p in policy.state().items() if "lora_B" in name})
    return policy


@pytest.fixture(scope="module")
def model(policy: Policy) -> RewardModel:
    """Fitted to noise about real features: its scores are arbitrary, but the arithmetic around them is not."""
    replies = sample(policy, HELD_OUT * 6, replace(HOW, samples=8), reference=True)
    world = rated_world(0).labels
    features = features_of(policy, replies)
    return fit(replace(world, features_ND=features), RewardModelSettings(maps=("linear",), ridges=(1.0, 1.0), folds=2, grid_extensions=0))


def test_repetition_and_distinct_by_hand() -> None:
    # Triples of "a b c a b c": abc bca cab abc: 1 of 4 was there before.
    assert repetition("a b c a b c") == 0.25
    assert repetition("a b") == 0.0
    # Bigrams: ab ba ab | ab: 2 distinct of 4.
    assert distinct(["a b a b", "a b"], 2) == 0.5
    assert distinct([""], 2) == 0.0


def test_on_topic_finds_what_was_asked_in_any_form() -> None:
    assert on_topic("How do I grow tomatoes?", "Plant a tomato in the sun.")
    assert not on_topic("How do I grow tomatoes?", "You can do it!")
    assert on_topic("How do I?", "Anything.")  # nothing was asked about


def test_the_same_seed_gives_the_same_answers_side_by_side(policy: Policy) -> None:
    first, again = (sample(policy, HELD_OUT, HOW, reference=True) for _ in range(2))
    assert first == again
    assert [reply.prompt for reply in first[:4]] == [first[0].prompt] * 4  # those to one prompt lie together
    assert sample(policy, HELD_OUT, replace(HOW, seed=6), reference=True) != first


def test_kl_is_zero_without_a_change_and_positive_with_one(tmp_path: Path) -> None:
    fresh = Policy.load(make_tiny_policy(tmp_path))
    replies = sample(fresh, HELD_OUT, HOW, reference=False)
    gaps, mask = kl_by_position(fresh, replies, 1.0)
    assert gaps.abs().max() < 1e-6 and mask.sum() == sum(len(reply.tokens) for reply in replies)
    other = moved(fresh, 0.3)
    replies = sample(other, HELD_OUT * 5, HOW, reference=False)
    gaps, _ = kl_by_position(other, replies, 1.0)
    assert gaps.sum(1).mean() > 0.05


def test_an_unchanged_candidate_gains_nothing(policy: Policy, model: RewardModel) -> None:
    body, details, _ = evaluate(Judge.of(policy, model, HELD_OUT, HOW, 4.0), policy, None, [" hello"])
    # The same seed and the same weights: the same answers.
    assert body["reward_gain_base"] == {"mean": 0.0, "low": 0.0, "high": 0.0, "n": 4} == body["reward_gain_stable"]
    assert body["kl_nats"] == pytest.approx(0.0, abs=1e-6)
    assert body["length"]["base"] == body["length"]["candidate"]
    assert details["figures"]["base"]["score"] == pytest.approx(0.0, abs=0.3)
    # Against itself an answer is a tie and the others win as often as they lose.
    assert body["length_matched_win"]["value"] == pytest.approx(0.5)
    assert body["finished_replies"] == round(16 * body["finished"]["candidate"])


def test_a_gain_is_what_the_scores_say(tmp_path: Path, model: RewardModel) -> None:
    candidate = moved(Policy.load(make_tiny_policy(tmp_path)), 0.5)
    judge = Judge.of(candidate, model, HELD_OUT, HOW, 4.0)
    body, details, _ = evaluate(judge, candidate, None, [])
    gain, figures = body["reward_gain_base"], details["figures"]
    assert gain["mean"] == pytest.approx(figures["candidate"]["score"] - figures["base"]["score"], abs=1e-5)
    assert gain["low"] < gain["mean"] < gain["high"]
    assert body["probes"] == []
    against_itself, _, _ = evaluate(judge, candidate, candidate, [])
    assert against_itself["reward_gain_stable"] == {"mean": 0.0, "low": 0.0, "high": 0.0, "n": 4}


def test_one_prompt_gives_no_interval_and_none_is_refused(policy: Policy, model: RewardModel) -> None:
    body, _, _ = evaluate(Judge.of(policy, model, HELD_OUT[:1], HOW, 4.0), policy, None, [])
    assert body["reward_gain_base"] == {"mean": 0.0, "low": None, "high": None, "n": 1}
    with pytest.raises(TrainingRefused, match="0 held-out prompts"):
        Judge.of(policy, model, [], HOW, 4.0)


def said(lengths: list[int], scores: list[float]) -> Answers:
    """Answers of which only length and score count."""
    return Answers([Reply((1,), (2,) * length, True) for length in lengths], [], torch.tensor(scores), {})


def test_a_win_counts_only_against_answers_that_are_as_long() -> None:
    # Two answers to each of two prompts. Prompt 1: 20 and 40 tokens against 19 and 60: only 20 with 19 (1 < 2 tokens apart), 1 > 0: a win.
    # Prompt 2: 10 and 11 against 10 and 30: 10 with 10, 2 = 2: half; 11 with 10 (1 < 1.1), 0 < 2: lost. So (1 + 1/2 + 0) / 3 = 1/2.
    new, base = said([20, 40, 10, 11], [1.0, -9.0, 2.0, 0.0]), said([19, 60, 10, 30], [0.0, 9.0, 2.0, -9.0])
    found = length_matched_win(new, base, 2)
    assert found is not None and found["value"] == pytest.approx(0.5) and found["n"] == 3
    # Residuals 1/2 and (0 - 1/2) sum to 1/2 and -1/2: variance 2/1·(1/4 + 1/4)/9 = 1/9, so the interval is 1/2 ± 12.7/3, cut to [0, 1].
    assert found["low"] == 0.0 and found["high"] == 1.0
    # 20 and 18 differ by a tenth of the longer, which is not less.
    assert length_matched_win(said([20, 20], [1.0, 1.0]), said([18, 18], [0.0, 0.0]), 2) is None


def test_answers_to_read_by_hand() -> None:
    def said(scores: list[float], name: str) -> Answers:
        return Answers([Reply((1,), (2,), True)] * 4, [f"{name} {i}" for i in range(4)], torch.tensor(scores), {})

    how = replace(HOW, samples=2)
    # Two prompts, two answers each. Stable's means are 1 and 0; less those the candidate's scores are -1, 1, -3, 2.
    old, new = said([0.0, 2.0, 0.5, -0.5], "old"), said([0.0, 2.0, -3.0, 2.0], "new")
    found = to_read(["first?", "second?"], old, new, how)
    assert found["of"] == 4
    assert [(row["prompt"], row["stable"], row["candidate"], row["change"]) for row in found["worst"]] == [
        ("second?", "old 2", "new 2", -3.0),
        ("first?", "old 0", "new 0", -1.0),
        ("first?", "old 1", "new 1", 1.0),
        ("second?", "old 3", "new 3", 2.0),
    ]
    # More answers than are shown: the draw is the seed's, whatever the candidate said, and the worst are the lowest of all.
    many = said([0.0] * 4, "old")
    many = Answers(many.replies * 20, [f"old {i}" for i in range(80)], torch.arange(80.0), {})
    other = replace(many, texts=[f"new {i}" for i in range(80)], scores_N=-torch.arange(80.0))
    prompts = [f"{i}?" for i in range(40)]
    drawn = [[row["prompt"] for row in to_read(prompts, many, each, how)["random"]] for each in (many, other)]
    assert drawn[0] == drawn[1] and len(drawn[0]) == READ
    assert [row["candidate"] for row in to_read(prompts, many, other, how)["worst"]][:2] == ["new 79", "new 78"]
    assert shortened("x" * (LONGEST + 1)) == "x" * (LONGEST - 1) + "…" and shortened("x" * LONGEST) == "x" * LONGEST
