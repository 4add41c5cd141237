"""Rewards and advantages against numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch

from trainer.advantages import gae, leave_one_out, token_rewards

MASK = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]])


def test_the_score_lands_on_the_last_real_token() -> None:
    kl = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    rewards = token_rewards(torch.tensor([10.0, 20.0]), kl, MASK, 0.1)
    assert rewards[0].tolist() == pytest.approx([-0.1, -0.2, 9.7], abs=1e-5)
    assert rewards[1].tolist() == pytest.approx([-0.4, 19.5, 0.0], abs=1e-5)


def test_a_reward_notices_a_flipped_kl() -> None:
    assert token_rewards(torch.tensor([10.0, 20.0]), -torch.ones(2, 3), MASK, 0.1)[0, 0].item() == pytest.approx(0.1, abs=1e-5)


def test_gae_by_hand() -> None:
    rewards, values = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.2, 0.4, 0.6]])
    # deltas 0.2, 0.2, 0.4; lam 0.5: A3 = 0.4, A2 = 0.2 + 0.2 = 0.4, A1 = 0.2 + 0.2 = 0.4
    advantages, returns = gae(rewards, values, torch.ones(1, 3), 1.0, 0.5)
    assert advantages[0].tolist() == pytest.approx([0.4, 0.4, 0.4], abs=1e-5)
    assert returns[0].tolist() == pytest.approx([0.6, 0.8, 1.0], abs=1e-5)


def test_lambda_one_is_the_return_minus_the_value() -> None:
    rewards, values = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[0.5, -0.5, 0.25]])
    advantages, returns = gae(rewards, values, torch.ones(1, 3), 1.0, 1.0)
    assert returns[0].tolist() == pytest.approx([6.0, 5.0, 3.0], abs=1e-5)
    assert advantages[0].tolist() == pytest.approx([5.5, 5.5, 2.75], abs=1e-5)
    flipped, _ = gae(-rewards, values, torch.ones(1, 3), 1.0, 1.0)
    assert flipped[0, 0].item() == pytest.approx(-6.5, abs=1e-5)


def test_padding_changes_nothing() -> None:
    rewards, values = torch.tensor([[1.0, 2.0, 9.0]]), torch.tensor([[0.3, 0.1, 9.0]])
    mask = torch.tensor([[1.0, 1.0, 0.0]])
    padded, padded_returns = gae(rewards * mask, values * mask, mask, 1.0, 0.95)
    plain, plain_returns = gae(rewards[:, :2], values[:, :2], torch.ones(1, 2), 1.0, 0.95)
    assert padded[:, :2].tolist() == plain.tolist()
    assert padded_returns[:, :2].tolist() == plain_returns.tolist()
    assert padded[0, 2].item() == 0.0


def test_leave_one_out_by_hand() -> None:
    # 1 - (2 + 6) / 2 = -3; 2 - 7 / 2 = -1.5; 6 - 3 / 2 = 4.5; equal samples of the second prompt teach nothing
    rewards = torch.tensor([1.0, 2.0, 6.0, 5.0, 5.0, 5.0])
    assert leave_one_out(rewards, 3).tolist() == pytest.approx([-3.0, -1.5, 4.5, 0.0, 0.0, 0.0], abs=1e-5)
    assert leave_one_out(-rewards, 3)[0].item() == pytest.approx(3.0, abs=1e-5)
    assert leave_one_out(torch.tensor([1.0, 4.0]), 2).tolist() == pytest.approx([-3.0, 3.0], abs=1e-5)
