"""One contract for both places where rollouts come from: this process and a real vLLM server."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from trainer_world import ask

from feedback.errors import EngineRefused, EngineUnavailable
from trainer.losses import importance_weights
from trainer.policy import Policy
from trainer.rollouts import LocalRollouts, Rollouts, VLLMRollouts

POLICY = Path(__file__).resolve().parents[2] / "examples" / "concierge" / "policy"
TEMPERATURE = 0.7

Make = Callable[[Policy], Rollouts]


@pytest.fixture(params=["local", pytest.param("vllm", marks=pytest.mark.slow)])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Make:
    if request.param == "local":
        return LocalRollouts
    server = request.getfixturevalue("vllm_concierge")
    return lambda policy: VLLMRollouts(policy, server.url, tmp_path)


def disturbed() -> Policy:
    """The shipped tiny policy with an adapter that changes what it says."""
    torch.set_num_threads(1)
    policy = Policy.load(POLICY)
    torch.manual_seed(1)
    policy.restore({name: value + 0.15 * torch.randn_like(value) for name, value in policy.state().items()})
    return policy


def prompts(policy: Policy) -> list[tuple[int, ...]]:
    return [policy.encode(ask(text)) for text in ("What does Alcove cost?", "Which animal lives at Willow?", "Is Galena open?")] * 4


def test_replies_are_sampled_from_the_adapter_as_it_is_now(make: Make) -> None:
    policy = disturbed()
    rollouts = make(policy)
    asked = prompts(policy)
    sampled = rollouts.sample(asked, max_tokens=24, temperature=TEMPERATURE, seed=3)
    assert [reply.prompt for reply in sampled.replies] == asked
    assert len({reply.tokens for reply in sampled.replies}) > 6
    for reply in sampled.replies:
        assert 1 <= len(reply.tokens) <= 24
        assert reply.finished == (reply.tokens[-1] in policy.eos_ids)
    # The mean log-probability under pi of what was sampled: less under the reference, so it is the adapter that spoke.
    new_BT, mask_BT = policy.logprobs(sampled.replies, TEMPERATURE)
    old_BT, _ = policy.logprobs(sampled.replies, TEMPERATURE, reference=True)
    assert float(((new_BT - old_BT) * mask_BT).sum() / mask_BT.sum()) > 0.05
    assert rollouts.sample(asked, max_tokens=24, temperature=TEMPERATURE, seed=4).replies != sampled.replies


def test_who_sampled_and_the_trainer_agree_on_every_token(make: Make) -> None:
    policy = disturbed()
    sampled = make(policy).sample(prompts(policy), max_tokens=24, temperature=TEMPERATURE, seed=5)
    logprobs_BT, mask_BT = policy.logprobs(sampled.replies, TEMPERATURE)
    behaviour_BT = sampled.behaviour_BT
    if behaviour_BT is None:  # the policy itself sampled: there is nobody to agree with
        return
    assert float(((behaviour_BT - logprobs_BT) * mask_BT).abs().max()) < 1e-3
    weights_BT = importance_weights(logprobs_BT, behaviour_BT, 2.0)
    assert torch.allclose(weights_BT * mask_BT, mask_BT, atol=1e-3)
    # The same at another temperature disagrees: the check would notice logprobs that were taken before temperature.
    other_BT, _ = policy.logprobs(sampled.replies, 1.0)
    assert float(((behaviour_BT - other_BT) * mask_BT).abs().max()) > 0.05


def test_an_engine_that_is_away_is_said_so(tmp_path: Path) -> None:
    policy = Policy.load(POLICY)
    with pytest.raises(EngineUnavailable, match="does not answer"):
        VLLMRollouts(policy, "http://127.0.0.1:9", tmp_path).sample(prompts(policy), max_tokens=2, temperature=1.0, seed=0)


@pytest.mark.slow
def test_an_engine_that_refuses_is_quoted(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    server = request.getfixturevalue("vllm_concierge")
    policy = Policy.load(POLICY, rank=64)  # the server takes rank 8 at most
    with pytest.raises(EngineRefused, match="rank 64 is greater than max_lora_rank 8"):
        VLLMRollouts(policy, server.url, tmp_path).sample(prompts(policy), max_tokens=2, temperature=1.0, seed=0)
