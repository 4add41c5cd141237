"""Rewards of tokens and GAE against hand-worked examples."""

from __future__ import annotations

import torch

from trainer.advantages import gae, token_rewards


def test_the_score_lands_on_the_last_real_token() -> None:
    mask = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
    kl = torch.tensor([[0.5, 1.0, 9.0], [0.0, 0.0, 2.0]])
    # beta 0.1: -0.05, then -0.1 + 3; and 0, 0, -0.2 - 1
    expected = torch.tensor([[-0.05, 2.9, 0.0], [0.0, 0.0, -1.2]])
    assert torch.allclose(token_rewards(torch.tensor([3.0, -1.0]), kl, mask, 0.1), expected)


def test_gae_by_hand() -> None:
    # r = (0, 1), V = (0.5, 0.25), gamma 1, lambda 0.5:
    # delta_1 = 1 - 0.25 = 0.75; delta_0 = 0 + 0.25 - 0.5 = -0.25; A_1 = 0.75; A_0 = -0.25 + 0.5 x 0.75 = 0.125
    advantages, returns = gae(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 0.25]]), torch.ones(1, 2), 1.0, 0.5)
    assert torch.allclose(advantages, torch.tensor([[0.125, 0.75]]))
    assert torch.allclose(returns, torch.tensor([[0.625, 1.0]]))


def test_with_lambda_1_and_no_values_advantages_are_what_is_still_to_come() -> None:
    advantages, _ = gae(torch.tensor([[1.0, 2.0, 3.0]]), torch.zeros(1, 3), torch.ones(1, 3), 1.0, 1.0)
    assert torch.allclose(advantages, torch.tensor([[6.0, 5.0, 3.0]]))


def test_padding_changes_nothing() -> None:
    torch.manual_seed(0)
    rewards, values = torch.randn(2, 3), torch.randn(2, 3)
    mask = torch.tensor([[1.0, 1, 1], [1, 1, 0]])
    short, _ = gae(rewards * mask, values * mask, mask, 1.0, 0.95)
    grow = torch.nn.functional.pad
    # A critic says something about padding too; it must not leak into what comes before.
    long, _ = gae(grow(rewards * mask, (0, 2)), grow(values, (0, 2), value=5.0), grow(mask, (0, 2)), 1.0, 0.95)
    assert torch.allclose(long[:, :3] * mask, short)
