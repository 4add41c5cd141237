"""PPO's arithmetic, worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from trainer.losses import (
    explained_variance,
    importance_weights,
    k1,
    k3,
    masked_mean,
    masked_whiten,
    policy_loss,
    value_loss,
)

ONES = torch.ones(1, 2)


def test_masked_mean_ignores_padding() -> None:
    # (1 + 3) / 2; the 100 is padding
    assert masked_mean(torch.tensor([[1.0, 3.0, 100.0]]), torch.tensor([[1.0, 1.0, 0.0]])).item() == 2.0


def test_whitening_gives_mean_0_and_variance_1_over_real_tokens() -> None:
    # values 1 and 3: mean 2, variance 1 -> -1 and 1; padding 0
    white = masked_whiten(torch.tensor([[1.0, 3.0, 50.0]]), torch.tensor([[1.0, 1.0, 0.0]]))
    assert torch.allclose(white, torch.tensor([[-1.0, 1.0, 0.0]]), atol=1e-6)


def test_policy_loss_is_the_clipped_surrogate() -> None:
    # token 1: rho = e^0.5 = 1.6487, A = 1: max(-1.6487, -1.2) = -1.2 (clipped)
    # token 2: rho = e^0.1 = 1.10517, A = -2: max(2.21034, 2.21034) = 2.21034
    result = policy_loss(torch.tensor([[0.5, 0.1]]), torch.zeros(1, 2), torch.tensor([[1.0, -2.0]]), ONES, 0.2)
    assert result.loss.item() == pytest.approx((-1.2 + 2 * math.exp(0.1)) / 2, abs=1e-6)
    assert result.clipfrac.item() == 0.5
    assert result.ratio.item() == pytest.approx((math.exp(0.5) + math.exp(0.1)) / 2, abs=1e-6)


def test_policy_loss_pushes_up_what_was_good() -> None:
    logprobs = torch.zeros(1, 2, requires_grad=True)
    policy_loss(logprobs, torch.zeros(1, 2), torch.tensor([[1.0, -1.0]]), ONES, 0.2).loss.backward()  # type: ignore[no-untyped-call]
    assert logprobs.grad is not None
    # d/dx of -A·e^x / 2 at 0 is -A / 2: a step against it raises the good token; with the sign flipped it would fall
    assert torch.allclose(logprobs.grad, torch.tensor([[-0.5, 0.5]]))


def test_importance_weights_are_capped() -> None:
    # e^0.5 = 1.6487 stays, e^2 = 7.39 is cut to 2
    assert torch.allclose(importance_weights(torch.tensor([0.5, 2.0]), torch.zeros(2), 2.0), torch.tensor([1.6487213, 2.0]))


def test_kl_estimators_agree_in_sign_and_zero() -> None:
    assert k1(torch.tensor([0.3]), torch.tensor([0.1])).item() == pytest.approx(0.2, abs=1e-6)
    # e^-0.2 - 1 + 0.2 = 0.0187308
    assert k3(torch.tensor([0.3]), torch.tensor([0.1])).item() == pytest.approx(0.0187308, abs=1e-6)
    assert k3(torch.tensor([0.1]), torch.tensor([0.1])).item() == 0.0


def test_value_loss_takes_the_worse_of_plain_and_clipped() -> None:
    # value 1 against old 0 and return 1: plain error 0, clipped to 0.2 gives 0.64 -> half of it
    assert value_loss(torch.ones(1, 1), torch.zeros(1, 1), torch.ones(1, 1), torch.ones(1, 1), 0.2).item() == pytest.approx(0.32)


def test_explained_variance_is_1_for_perfect_values_and_0_for_a_constant() -> None:
    returns = torch.tensor([[1.0, 2.0, 3.0]])
    assert explained_variance(returns, returns, torch.ones(1, 3)).item() == pytest.approx(1.0)
    assert explained_variance(torch.ones(1, 3), returns, torch.ones(1, 3)).item() == pytest.approx(0.0)


def test_padding_never_changes_a_loss() -> None:
    torch.manual_seed(0)
    new, old, advantages = torch.randn(3, 4), torch.randn(3, 4), torch.randn(3, 4)
    mask = torch.tensor([[1.0, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]])
    short = policy_loss(new, old, advantages, mask, 0.2).loss
    junk = torch.where(mask.bool(), new, torch.full_like(new, 7.0))
    longer = [torch.nn.functional.pad(item, (0, 2), value=9.0) for item in (junk, old, advantages)]
    assert policy_loss(*longer, torch.nn.functional.pad(mask, (0, 2)), 0.2).loss.item() == pytest.approx(short.item(), abs=1e-6)
