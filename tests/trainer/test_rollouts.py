"""One contract for both places where rollouts come from: this process and a real vLLM server."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from math import log
from pathlib import Path

import pytest
import torch
from aiohttp import web
from learning_policy import ask
from replica_double import ReplicaDouble

from deploy.config import EngineSettings
from feedback.errors import ConfigError, EngineRefused, EngineUnavailable
from trainer.config import PPOSettings, RolloutsSettings, refuse_rank, refuse_serving
from trainer.losses import importance_weights
from trainer.policy import Policy
from trainer.rollouts import LocalRollouts, Rollouts, VLLMRollouts, alarms, rollouts_for

POLICY = Path(__file__).resolve().parents[2] / "examples" / "concierge" / "policy"
TEMPERATURE = 0.7

Make = Callable[[Policy], Rollouts]


@pytest.fixture(params=["local", "replicas", pytest.param("vllm", marks=pytest.mark.slow)])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Make:
    if request.param == "local":
        return LocalRollouts
    if request.param == "vllm":
        urls = [request.getfixturevalue("vllm_concierge").url]
    else:
        urls = [replica.url for replica in request.getfixturevalue("pair")]
    return lambda policy: VLLMRollouts(policy, urls, tmp_path)


@pytest.fixture
def pair() -> Iterator[list[ReplicaDouble]]:
    with ExitStack() as stack:
        yield [stack.enter_context(ReplicaDouble(POLICY)) for _ in range(2)]


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
    assert rollouts.sample(asked, max_tokens=24, temperature=TEMPERATURE, seed=3).replies == sampled.replies
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
    with pytest.raises(EngineUnavailable, match=r"none of 1 servers is left .*does not answer"):
        VLLMRollouts(policy, ["http://127.0.0.1:9"], tmp_path).sample(prompts(policy), max_tokens=2, temperature=1.0, seed=0)


def test_one_request_a_prompt_and_a_new_name_each_time_on_every_replica(pair: list[ReplicaDouble], tmp_path: Path) -> None:
    policy = disturbed()
    rollouts = VLLMRollouts(policy, [replica.url for replica in pair], tmp_path)
    for seed in (0, 1):
        rollouts.sample(prompts(policy), max_tokens=4, temperature=TEMPERATURE, seed=seed)
    # Three distinct prompts of four samples each, twice, dealt to two.
    assert [replica.requests for replica in pair] == [4, 2]
    assert pair[0].names == pair[1].names
    assert len(set(pair[0].names)) == 2
    assert [replica.loaded for replica in pair] == [{}, {}]
    assert list(tmp_path.iterdir()) == []


def test_a_date_is_a_seed(pair: list[ReplicaDouble], tmp_path: Path) -> None:
    policy = disturbed()
    rollouts = VLLMRollouts(policy, [replica.url for replica in pair], tmp_path)
    assert rollouts.sample(prompts(policy)[:2], max_tokens=2, temperature=TEMPERATURE, seed=20_261_124 * 1_000_003 + 1).replies


def test_a_replica_that_dies_leaves_its_prompts_to_the_others(pair: list[ReplicaDouble], tmp_path: Path) -> None:
    policy = disturbed()
    rollouts = VLLMRollouts(policy, [replica.url for replica in pair], tmp_path)
    whole = rollouts.sample(prompts(policy), max_tokens=8, temperature=TEMPERATURE, seed=0)
    pair[0].dies_at = pair[0].requests + 2  # the second of its two prompts
    halved = rollouts.sample(prompts(policy), max_tokens=8, temperature=TEMPERATURE, seed=0)
    assert halved.replies == whole.replies
    assert halved.behaviour_BT is not None and whole.behaviour_BT is not None
    assert torch.equal(halved.behaviour_BT, whole.behaviour_BT)
    pair[0].dies_at = None  # somebody restarted it
    asked = pair[0].requests
    assert rollouts.sample(prompts(policy), max_tokens=8, temperature=TEMPERATURE, seed=0).replies == whole.replies
    assert pair[0].requests == asked + 2
    for replica in pair:
        replica.dies_at = replica.requests + 1
    with pytest.raises(EngineUnavailable, match=r"rollouts\.urls: none of 2 servers is left"):
        rollouts.sample(prompts(policy), max_tokens=8, temperature=TEMPERATURE, seed=0)
    assert list(tmp_path.iterdir()) == []


def test_logprobs_from_before_temperature_are_refused_by_name(tmp_path: Path) -> None:
    policy = disturbed()
    with ReplicaDouble(POLICY, raw=True) as replica:
        rollouts = VLLMRollouts(policy, [replica.url], tmp_path)
        with pytest.raises(EngineRefused, match="processed_logprobs"):
            rollouts.sample(prompts(policy), max_tokens=8, temperature=TEMPERATURE, seed=0)
        # At temperature 1 both are the same.
        assert rollouts.sample(prompts(policy), max_tokens=8, temperature=1.0, seed=0).replies


def test_replicas_that_serve_people_are_refused_by_name(tmp_path: Path) -> None:
    policy = Policy.load(POLICY)
    asked = RolloutsSettings(urls=("http://gpu7:8000", "http://localhost:8123/"))
    for engine, name in ((EngineSettings(url="http://127.0.0.1:8123"), "url"), (EngineSettings(port=8123), "port")):
        with pytest.raises(ConfigError, match=rf"http://localhost:8123/, which is engine\.{name}"):
            refuse_serving(asked, engine)
    refuse_serving(asked, EngineSettings(url="http://gpu8:8000"))
    assert isinstance(rollouts_for(policy, asked, tmp_path), VLLMRollouts)
    assert isinstance(rollouts_for(policy, RolloutsSettings(), tmp_path), LocalRollouts)


def test_alarms_by_hand() -> None:
    zeros, mask = torch.zeros(1, 5), torch.tensor([[1.0, 1.0, 1.0, 1.0, 0.0]])
    assert alarms(zeros, zeros, mask) == ()
    # w = 1/2, 1/2, 1/2, 17/2: mean 2.5; sum^2 / (4·sum of squares) = 100 / (4·73) = 0.34; variance 73/4 - 6.25 = 12;
    # KL = (3·log 2 - log 8.5) / 4 = -0.015. What stands on padding does not count.
    old = torch.tensor([[log(0.5), log(0.5), log(0.5), log(8.5), 50.0]])
    assert alarms(old, zeros, mask) == (
        "mean importance weight 2.50, outside [0.5, 2]",
        "sd of the importance weights 3.46, above 1",
    )
    # The inverse weights 2, 2, 2, 2/17 are harmless: mean 1.53, effective 0.78, sd 0.81, KL 0.015.
    assert alarms(zeros, old, mask) == ()
    # w = 0.1, 0.1, 0.1, 4: mean 1.075; 4.3^2 / (4·16.03) = 0.29; variance 4.0075 - 1.1556 = 2.85; KL = (3·2.303 - 1.386) / 4 = 1.38.
    old = torch.tensor([[log(0.1), log(0.1), log(0.1), log(4.0), 0.0]])
    assert alarms(old, zeros, mask) == (
        "effective sample size 0.29 of 1, below 0.3",
        "sd of the importance weights 1.69, above 1",
        "KL(rollouts || trainer) 1.380 nats a token, beyond 0.1",
    )


def test_alarms_about_whole_replies_by_hand() -> None:
    # Six tokens of a reply have w = sqrt 2, of the three others 1/sqrt 2, and six more of each agree. Tokens are harmless: mean w
    # (6·1.414 + 18·0.707 + 24)/48 = 0.94, KL (18 - 6)·0.3466/48 = 0.087. Replies have w = 8, 1/8, 1/8, 1/8: mean 8.375/4 = 2.09;
    # 8.375^2 / (4·(64 + 3/64)) = 0.274; variance 16.012 - 4.384 = 11.63.
    up, agree = [log(2) / 2] * 6, [0.0] * 6
    down = [-log(2) / 2] * 6
    old = torch.tensor([[*up, *agree, 50.0], *[[*down, *agree, 50.0]] * 3])
    zeros, mask = torch.zeros(4, 13), torch.tensor([[1.0] * 12 + [0.0]]).repeat(4, 1)
    assert alarms(old, zeros, mask) == ()
    assert alarms(old, zeros, mask, whole_replies=True) == (
        "mean importance weight 2.09, outside [0.5, 2]",
        "effective sample size 0.27 of 1, below 0.3",
        "sd of the importance weights 3.41, above 1",
    )
    # The inverse weights are as bad for replies, 1/8, 8, 8, 8, and as harmless for tokens.
    assert alarms(zeros, old, mask) == ()
    assert alarms(zeros, old, mask, whole_replies=True)[0] == "mean importance weight 6.03, outside [0.5, 2]"


@pytest.mark.slow
def test_an_engine_that_refuses_is_quoted(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    server = request.getfixturevalue("vllm_concierge")
    policy = Policy.load(POLICY, rank=64)  # the server takes rank 8 at most
    with pytest.raises(EngineRefused, match="rank 64 is greater than max_lora_rank 8"):
        VLLMRollouts(policy, [server.url], tmp_path).sample(prompts(policy), max_tokens=2, temperature=1.0, seed=0)


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ([1], r"choices that are none of vLLM's"),
        ({"choices": [{}]}, r"choices that are none of vLLM's \(KeyError\('index'\)\)"),
        ({"choices": [{"index": 0, "token_ids": [5], "logprobs": {"token_logprobs": [None]}}]}, "choices that are none of vLLM's"),
        ({"choices": [{"index": 0, "token_ids": [5], "logprobs": {"token_logprobs": [float("nan")]}}]}, "no finite number"),
        ({"choices": [{"index": 0, "token_ids": [10**6], "logprobs": {"token_logprobs": [-1.0]}}]}, "token 1000000 of a vocabulary of"),
        (
            {"choices": [{"index": 0, "token_ids": [5] * 3, "logprobs": {"token_logprobs": [-1.0] * 3}}]},
            "3 token ids .* where 2",
        ),
        ({"choices": []}, "0 samples where 1 were asked for"),
    ],
)
def test_what_no_vllm_would_say_is_refused_by_name(said: object, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def complete(_: ReplicaDouble, __: web.Request) -> web.Response:
        return web.json_response(said)

    monkeypatch.setattr(ReplicaDouble, "_complete", complete)
    policy = Policy.load(POLICY)
    with ReplicaDouble(POLICY) as replica, pytest.raises(EngineRefused, match=told) as refused:
        VLLMRollouts(policy, [replica.url], tmp_path).sample(prompts(policy)[:1], max_tokens=2, temperature=1.0, seed=0)
    assert replica.url in refused.value.message


def test_an_adapter_that_no_replica_would_load_is_refused_before_it_is_made() -> None:
    refuse_rank(PPOSettings(rank=8), EngineSettings(max_lora_rank=8))
    with pytest.raises(ConfigError, match=r"ppo\.rank is 16, engine\.max_lora_rank is 8: no replica would load"):
        refuse_rank(PPOSettings(rank=16), EngineSettings(max_lora_rank=8))
