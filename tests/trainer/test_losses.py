"""Losses against numbers worked out by hand; each has a test that flips a sign and sees the failure."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from trainer.losses import (
    LOGITS_ROWS,
    chosen_logprobs,
    explained_variance,
    importance_weights,
    k1,
    k3,
    masked_mean,
    masked_whiten,
    policy_loss,
    value_loss,
)

MASK = torch.tensor([[1.0, 1.0, 0.0]])
OLD = torch.log(torch.tensor([[0.5, 0.25, 1.0]]))
NEW = torch.log(torch.tensor([[0.75, 0.125, 1.0]]))
ADVANTAGES = torch.tensor([[2.0, -1.0, 99.0]])


def widen(values: Tensor, filler: float = 7.0) -> Tensor:
    return torch.cat([values, torch.full((values.shape[0], 3), filler)], 1)


def test_masked_mean_and_whitening() -> None:
    values = torch.tensor([[1.0, 3.0, 100.0]])
    assert masked_mean(values, MASK).item() == 2.0
    # mean 2, variance ((-1)^2 + 1^2) / 2 = 1
    assert masked_whiten(values, MASK).tolist()[0] == pytest.approx([-1.0, 1.0, 0.0], abs=1e-5)


def test_policy_loss_by_hand() -> None:
    # ratios 1.5 and 0.5; A = 2: max(-3, -2·1.2) = -2.4 (clipped); A = -1: max(0.5, 0.8) = 0.8 (clipped); mean -0.8
    out = policy_loss(NEW, OLD, ADVANTAGES, MASK, 0.2)
    assert out.loss.item() == pytest.approx(-0.8, abs=1e-5)
    assert out.clipfrac.item() == 1.0
    assert out.ratio.item() == pytest.approx(1.0, abs=1e-5)
    assert out.ratio_deviation.item() == pytest.approx(0.5, abs=1e-5)
    # k3 of old against new: (r - 1 - ln r) with r = 1.5: 0.094535, r = 0.5: 0.193147; mean 0.143841
    assert out.approx_kl.item() == pytest.approx(0.143841, abs=1e-5)


def test_policy_loss_notices_a_flipped_sign() -> None:
    assert policy_loss(NEW, OLD, -ADVANTAGES, MASK, 0.2).loss.item() != pytest.approx(-0.8, abs=0.1)


def test_policy_loss_raises_what_was_good() -> None:
    logprobs = OLD.clone().requires_grad_()
    policy_loss(logprobs, OLD, ADVANTAGES, MASK, 0.2).loss.backward()  # type: ignore[no-untyped-call]
    # At ratio 1 the gradient is -A / tokens: descending raises a token with A > 0.
    assert logprobs.grad is not None
    assert logprobs.grad[0].tolist() == pytest.approx([-1.0, 0.5, 0.0], abs=1e-6)


def test_importance_weights_are_a_separate_factor() -> None:
    weights = importance_weights(OLD, OLD - torch.tensor([[math.log(4.0), math.log(0.5), 0.0]]), 2.0)
    assert weights[0, :2].tolist() == pytest.approx([2.0, 0.5], abs=1e-5)
    # -2.4·2 and 0.8·0.5: mean -2.2
    assert policy_loss(NEW, OLD, ADVANTAGES, MASK, 0.2, weights).loss.item() == pytest.approx(-2.2, abs=1e-5)


def test_a_loss_is_a_sum_over_tokens_so_groups_add_up() -> None:
    # Two replies of 2 and 1 tokens: parts weighted by their share of the 3 tokens are the whole, in any cut.
    new, old, A = NEW.repeat(2, 1), OLD.repeat(2, 1), torch.tensor([[2.0, -1.0, 0.0], [3.0, 0.0, 0.0]])
    mask = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    # -2.4 and 0.8 as above, and max(-3·1.5, -3·1.2) = -3.6 of the second: -5.2 / 3
    whole = policy_loss(new, old, A, mask, 0.2).loss.item()
    assert whole == pytest.approx(-5.2 / 3, abs=1e-5)
    parts = [policy_loss(new[[i]], old[[i]], A[[i]], mask[[i]], 0.2).loss.item() * float(mask[i].sum()) / 3 for i in range(2)]
    assert sum(parts) == pytest.approx(whole, abs=1e-5)


def test_a_reply_as_one_action_by_hand() -> None:
    # RLOO: the ratio of the whole reply is 1.5·0.5 = 0.75; A = -2: max(1.5, 2·0.8) = 1.6
    out = policy_loss((NEW * MASK).sum(1, keepdim=True), (OLD * MASK).sum(1, keepdim=True), torch.tensor([[-2.0]]), torch.ones(1, 1), 0.2)
    assert out.loss.item() == pytest.approx(1.6, abs=1e-5)
    assert out.ratio.item() == pytest.approx(0.75, abs=1e-5)


def test_value_loss_by_hand() -> None:
    values, old, returns = torch.tensor([[1.0, 0.0, 9.0]]), torch.tensor([[0.0, 0.0, 0.0]]), torch.tensor([[2.0, 1.0, 0.0]])
    # token 1: max((1 - 2)^2, (0.2 - 2)^2) = 3.24; token 2: 1; half of the mean: 1.06
    assert value_loss(values, old, returns, MASK, 0.2).item() == pytest.approx(1.06, abs=1e-5)
    assert value_loss(values, old, -returns, MASK, 0.2).item() != pytest.approx(1.06, abs=0.1)


def test_kl_estimators() -> None:
    # One token whose policy says 0.5 and reference 0.25: k1 = ln 2; k3 = 0.5 - 1 + ln 2
    one, two = torch.log(torch.tensor([[0.5]])), torch.log(torch.tensor([[0.25]]))
    assert k1(one, two).item() == pytest.approx(math.log(2), abs=1e-6)
    assert k1(two, one).item() == pytest.approx(-math.log(2), abs=1e-6)
    assert k3(one, two).item() == pytest.approx(math.log(2) - 0.5, abs=1e-6)
    pi, ref = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.2, 0.3, 0.5])
    exact = (pi * (pi / ref).log()).sum().item()
    for estimator in (k1, k3):
        assert (pi * estimator(pi.log(), ref.log())).sum().item() == pytest.approx(exact, abs=1e-5)


def test_explained_variance() -> None:
    returns = torch.tensor([[1.0, 3.0, 50.0]])
    assert explained_variance(returns, returns, MASK).item() == pytest.approx(1.0, abs=1e-6)
    assert explained_variance(torch.zeros(1, 3), returns, MASK).item() == pytest.approx(0.0, abs=1e-6)
    # residuals 2 and 6: variance 4 against 1
    assert explained_variance(-returns, returns, MASK).item() == pytest.approx(-3.0, abs=1e-5)


def test_padding_changes_nothing() -> None:
    mask = widen(MASK, 0.0)
    assert masked_whiten(widen(ADVANTAGES), mask)[:, :3].tolist() == masked_whiten(ADVANTAGES, MASK).tolist()
    plain = policy_loss(NEW, OLD, ADVANTAGES, MASK, 0.2)
    padded = policy_loss(widen(NEW), widen(OLD, 1.0), widen(ADVANTAGES), mask, 0.2)
    assert [value.item() for value in padded] == [value.item() for value in plain]
    one = value_loss(NEW, OLD, ADVANTAGES, MASK, 0.2)
    assert value_loss(widen(NEW), widen(OLD, 1.0), widen(ADVANTAGES), mask, 0.2).item() == one.item()


def test_chosen_logprobs_are_log_softmax_and_so_is_the_gradient() -> None:
    torch.manual_seed(0)
    rows = LOGITS_ROWS + 5  # two chunks
    states, weight = torch.randn(rows, 6, requires_grad=True), torch.randn(11, 6)
    targets, upstream = torch.randint(0, 11, (rows,)), torch.randn(rows)
    ours = chosen_logprobs(states, weight, targets, 0.7)
    (ours_grad,) = torch.autograd.grad(ours @ upstream, states)
    plain = torch.log_softmax(states @ weight.T / 0.7, 1).gather(1, targets[:, None])[:, 0]
    (plain_grad,) = torch.autograd.grad(plain @ upstream, states)
    assert torch.allclose(ours, plain, atol=1e-5)
    assert torch.allclose(ours_grad, plain_grad, atol=1e-5)
    assert not torch.allclose(ours_grad, -plain_grad, atol=1e-2)
