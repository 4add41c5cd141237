"""One backbone, an adapter, and what must never change: the reference, and results under padding."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from learning_policy import ask, learning_policy
from safetensors.torch import load_file, save_file

from feedback.errors import InvalidInput, TrainingRefused
from trainer.generation import draw
from trainer.policy import Policy, place
from trainer.reply import Reply

PROMPT = (2, 10, 11, 12, 13, 14, 15, 16, 17, 18, 3)
"""Long enough for the shared beginning to be worth a pass of its own."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return learning_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture
def policy(folder: Path) -> Policy:
    return Policy.load(folder)


def disturb(policy: Policy) -> None:
    """An adapter that changes something."""
    torch.manual_seed(1)
    policy.restore({name: value + 0.05 * torch.randn_like(value) for name, value in policy.state().items()})


def replies() -> list[Reply]:
    return [
        Reply(PROMPT, (20, 21, 4), True),
        Reply((*PROMPT[:-1], 30, 31, 3), (40, 41, 42, 43, 44), False),
        Reply((2, 50, 3), (22, 4), True),
    ]


def test_a_fresh_adapter_is_the_reference(policy: Policy) -> None:
    new_BT, mask_BT = policy.logprobs(replies(), 0.7)
    old_BT, _ = policy.logprobs(replies(), 0.7, reference=True)
    assert new_BT.tolist() == old_BT.tolist()
    assert mask_BT.sum(1).tolist() == [3, 5, 2]


def test_logprobs_are_those_of_the_whole_model(policy: Policy) -> None:
    disturb(policy)
    ours_BT, _ = policy.logprobs(replies(), 0.7)
    for reply, row in zip(replies(), ours_BT, strict=True):
        ids = torch.tensor([[*reply.prompt, *reply.tokens]])
        with torch.no_grad():
            logits = policy.model(input_ids=ids).logits[0, len(reply.prompt) - 1 : -1] / 0.7
        plain = torch.log_softmax(logits, 1).gather(1, torch.tensor(reply.tokens)[:, None])[:, 0]
        assert torch.allclose(row[: len(reply.tokens)], plain, atol=1e-5)
        assert row[len(reply.tokens) :].abs().sum() == 0


def test_the_reference_is_the_backbone_at_the_same_temperature(policy: Policy) -> None:
    disturb(policy)
    reference_BT, _ = policy.logprobs(replies(), 0.7, reference=True)
    for reply, row in zip(replies(), reference_BT, strict=True):
        with torch.no_grad(), policy.model.disable_adapter():
            logits = policy.model(input_ids=torch.tensor([[*reply.prompt, *reply.tokens]])).logits[0, len(reply.prompt) - 1 : -1]
        targets = torch.tensor(reply.tokens)[:, None]
        scaled, raw = (torch.log_softmax(logits / T, 1).gather(1, targets)[:, 0] for T in (0.7, 1.0))
        assert torch.allclose(row[: len(reply.tokens)], scaled, atol=1e-5)
        assert not torch.allclose(scaled, raw, atol=1e-2)


def test_neither_padding_nor_company_nor_a_shared_beginning_changes_a_reply(policy: Policy) -> None:
    disturb(policy)
    together_BT, _ = policy.logprobs(replies(), 1.0)
    features_BD = policy.features(replies())
    pair_BT, _ = policy.logprobs(replies()[:2], 1.0)  # these two share ten tokens of their prompts
    for i, reply in enumerate(replies()):
        alone, _ = policy.logprobs([reply], 1.0)
        n = len(reply.tokens)
        assert torch.allclose(together_BT[i, :n], alone[0], atol=1e-5)
        assert torch.allclose(features_BD[i], policy.features([reply])[0], atol=1e-5)
        if i < 2:
            assert torch.allclose(pair_BT[i, :n], alone[0], atol=1e-5)


def test_gradients_flow_through_the_shared_beginning_and_never_into_the_backbone(policy: Policy) -> None:
    disturb(policy)
    grads = []
    for group in ([replies()[0]] * 2, [replies()[0]]):
        states, mask, _ = policy.hidden(group)
        policy.token_logprobs(states, mask, group, 0.7).sum().backward()  # type: ignore[no-untyped-call]
        assert all(p.grad is None for name, p in policy.model.named_parameters() if "lora_" not in name)
        grads.append(torch.cat([p.grad.flatten() for p in policy.parameters if p.grad is not None]))
        for parameter in policy.parameters:
            parameter.grad = None
    # Two equal replies through a shared beginning pull twice as hard as one alone without.
    assert grads[0].abs().max() > 0
    assert torch.allclose(grads[0], 2 * grads[1], atol=1e-4)


def test_sampling_leaves_the_backbone_bit_identical_and_follows_the_adapter(policy: Policy) -> None:
    disturb(policy)
    before = {name: value.clone() for name, value in policy.model.state_dict().items()}
    drawn = policy.sample([PROMPT] * 40, max_tokens=6, temperature=1.0, seed=3)
    assert all(torch.equal(value, before[name]) for name, value in policy.model.state_dict().items())
    assert drawn == policy.sample([PROMPT] * 40, max_tokens=6, temperature=1.0, seed=3)
    assert drawn != policy.sample([PROMPT] * 40, max_tokens=6, temperature=1.0, seed=4)
    with policy.reference():
        assert drawn != policy.sample([PROMPT] * 40, max_tokens=6, temperature=1.0, seed=3)
    for reply in drawn:
        assert reply.finished == (reply.tokens[-1] in policy.eos_ids)
        assert reply.finished or len(reply.tokens) == 6
        assert not any(token in policy.eos_ids for token in reply.tokens[:-1])


def test_samples_have_the_distribution_that_logprobs_say(policy: Policy) -> None:
    disturb(policy)
    n = 4000
    drawn = policy.sample([PROMPT, (2, 50, 3)] * (n // 2), max_tokens=1, temperature=0.7, seed=0, batch_size=n)
    for prompt in (PROMPT, (2, 50, 3)):
        first = [reply.tokens[0] for reply in drawn if reply.prompt == prompt]
        token = max(set(first), key=first.count)
        logprob_BT, _ = policy.logprobs([Reply(prompt, (token,), False)], 0.7)
        p = float(logprob_BT[0, 0].exp())
        # Four standard errors of a share.
        assert first.count(token) / len(first) == pytest.approx(p, abs=4 * (p * (1 - p) / len(first)) ** 0.5)


def test_a_draw_by_hand() -> None:
    logits = torch.log(torch.tensor([[0.2, 0.5, 0.3]] * 5))
    # Cumulative 0.2, 0.7, 1: the first token above the number; at temperature 1/2 the shares are 4, 25, 9 of 38: 0.105, 0.763, 1.
    numbers = torch.tensor([0.0, 0.19, 0.21, 0.71, 0.9999999], dtype=torch.float64)
    assert draw(logits, numbers, 1.0).tolist() == [0, 0, 1, 2, 2]
    assert draw(logits, numbers, 0.5).tolist() == [0, 1, 1, 1, 2]
    assert draw(logits, numbers, 0).tolist() == [1] * 5
    # What has no probability is never drawn, not even by 0.
    assert draw(torch.tensor([[-torch.inf, 0.0]]), torch.zeros(1), 1.0).tolist() == [1]


def test_a_prompt_goes_through_the_model_once_whatever_its_samples(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    disturb(policy)
    asked = [PROMPT] * 5 + [(*PROMPT[:-1], 30, 31, 3)] * 3 + [PROMPT]
    read: list[int] = []
    plain = policy.trunk.forward

    def counted(*args: object, **values: object) -> object:
        ids = values["input_ids"]
        assert isinstance(ids, torch.Tensor)
        read.append(ids.numel())
        return plain(*args, **values)

    monkeypatch.setattr(policy.trunk, "forward", counted)
    together = policy.sample(asked, max_tokens=6, temperature=1.0, seed=3)
    # Ten tokens that both prompts begin with, then two rows of the three that are left of the longer one, then a token a reply.
    assert read[:2] == [10, 6]
    assert read[2] <= len(asked)
    # The same draws as one by one, where nothing is shared: each reply hangs on its place only.
    assert policy.sample(asked, max_tokens=6, temperature=1.0, seed=3, batch_size=1) == together


def test_bfloat16_stays_close_and_the_adapter_stays_float32(folder: Path) -> None:
    exact, rough = Policy.load(folder), Policy.load(folder, dtype="bfloat16")
    for policy in (exact, rough):
        disturb(policy)
    assert {p.dtype for p in rough.parameters} == {torch.float32}
    assert rough.head.weight.dtype == torch.bfloat16
    exact_BT, mask_BT = exact.logprobs(replies(), 0.7)
    rough_BT, _ = rough.logprobs(replies(), 0.7)
    assert rough_BT.dtype == torch.float32
    # 8 bits of mantissa: log-probabilities of about -9 that agree to a hundredth of themselves.
    assert 0 < float(((exact_BT - rough_BT).abs() * mask_BT).sum() / mask_BT.sum()) < 0.2
    assert float(torch.nn.functional.cosine_similarity(exact.features(replies()), rough.features(replies())).min()) > 0.999
    states, mask, _ = rough.hidden(replies())
    rough.token_logprobs(states, mask, replies(), 0.7).sum().backward()  # type: ignore[no-untyped-call]
    states, mask, _ = exact.hidden(replies())
    exact.token_logprobs(states, mask, replies(), 0.7).sum().backward()  # type: ignore[no-untyped-call]
    ours, theirs = (torch.cat([p.grad.flatten() for p in policy.parameters if p.grad is not None]) for policy in (rough, exact))
    assert bool(torch.isfinite(ours).all())
    assert float(torch.nn.functional.cosine_similarity(ours, theirs, dim=0)) > 0.99
    drawn = rough.sample([PROMPT] * 8, max_tokens=6, temperature=1.0, seed=3)
    assert all(1 <= len(reply.tokens) <= 6 for reply in drawn)


def test_the_device_is_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert place("auto", "auto") == (torch.device("cpu"), torch.float32)
    assert place("cpu", "bfloat16") == (torch.device("cpu"), torch.bfloat16)
    with pytest.raises(InvalidInput, match=r"hardware\.device is 'cuda'"):
        place("cuda", "auto")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert place("auto", "auto") == (torch.device("cuda"), torch.bfloat16)
    assert place("cpu", "auto") == (torch.device("cpu"), torch.float32)


def test_greedy_takes_the_likeliest_whatever_the_company(policy: Policy) -> None:
    together = policy.sample([PROMPT, (2, 50, 3)], max_tokens=8, temperature=0, seed=0)
    assert together == [policy.sample([prompt], max_tokens=8, temperature=0, seed=9)[0] for prompt in (PROMPT, (2, 50, 3))]


def test_a_saved_adapter_comes_back_and_its_files_name_no_machine(policy: Policy, folder: Path, tmp_path: Path) -> None:
    disturb(policy)
    policy.save(tmp_path / "one")
    policy.save(tmp_path / "two")
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
    assert json.loads((tmp_path / "one" / "adapter_config.json").read_text())["base_model_name_or_path"] is None
    again = Policy.load(folder, adapter=tmp_path / "one")
    assert again.logprobs(replies(), 1.0)[0].tolist() == policy.logprobs(replies(), 1.0)[0].tolist()


def test_text_round_trip(policy: Policy) -> None:
    assert policy.encode(ask("w1 w2")) == (2, 6, 7, 3)
    assert policy.reply(ask("w1"), None, "w3 w4", True) == Reply((2, 6, 3), (8, 9, 4), True)
    assert policy.decode((8, 9, 4)) == "w3 w4"


def test_what_is_no_model_is_refused_by_name(tmp_path: Path, policy: Policy, folder: Path) -> None:
    with pytest.raises(InvalidInput, match=r"policy\.base.*cannot be loaded"):
        Policy.load(tmp_path)
    with pytest.raises(InvalidInput, match="does not fit"):
        Policy.load(folder, adapter=tmp_path)
    with pytest.raises(TrainingRefused, match="0 tokens"):
        policy.hidden([Reply(PROMPT, (), False)])


def test_another_adapter_leaves_the_policy_and_the_reference_alone(policy: Policy, tmp_path: Path) -> None:
    disturb(policy)
    policy.save(tmp_path / "alone")
    before_BT, _ = policy.logprobs(replies(), 0.7)
    reference_BT, _ = policy.logprobs(replies(), 0.7, reference=True)
    policy.add_adapter("critic", rank=4, alpha=8, seed=0)
    with policy.using("critic"):
        fresh_BT, _ = policy.logprobs(replies(), 0.7)
        states_BTD, _, _ = policy.hidden(replies())
    assert fresh_BT.tolist() == reference_BT.tolist()
    states_BTD.sum().backward()  # type: ignore[no-untyped-call]
    assert any(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in policy.parameters_of("critic"))
    assert all(p.grad is None for p in policy.parameters)
    with torch.no_grad():
        for parameter in policy.parameters_of("critic"):
            parameter.add_(0.1)
    assert policy.logprobs(replies(), 0.7)[0].tolist() == before_BT.tolist()
    assert policy.logprobs(replies(), 0.7, reference=True)[0].tolist() == reference_BT.tolist()
    policy.save(tmp_path / "beside")
    name = "adapter_model.safetensors"
    assert (tmp_path / "beside" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()


def test_weights_that_are_no_numbers_are_named(tmp_path: Path) -> None:
    folder = learning_policy(tmp_path / "policy")
    path = folder / "model.safetensors"
    weights = load_file(path)
    name = next(name for name in weights if name.endswith("layers.0.mlp.up_proj.weight"))
    weights[name][0, 0] = float("nan")
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(InvalidInput, match="its states are no finite numbers, so weights are damaged"):
        Policy.load(folder)
