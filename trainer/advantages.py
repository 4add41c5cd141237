"""From scores to rewards of tokens, and from rewards to advantages."""

from __future__ import annotations

import torch
from torch import Tensor


def token_rewards(scores_B: Tensor, kl_BT: Tensor, mask_BT: Tensor, beta: float) -> Tensor:
    """-beta·kl of every token, and the score on the last real one. Shape B x T."""
    rewards_BT = -beta * kl_BT * mask_BT
    last_B = mask_BT.sum(1).long().clamp(min=1) - 1
    return rewards_BT.scatter_add(1, last_B[:, None], scores_B[:, None].to(rewards_BT.dtype))


def gae(rewards_BT: Tensor, values_BT: Tensor, mask_BT: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016); returns (advantages, returns), B x T each, 0 on padding.

    delta_t = r_t + gamma·V_{t+1} - V_t and A_t = delta_t + gamma·lam·A_{t+1}; nothing follows a reply's last token.
    """
    width = rewards_BT.shape[1]
    advantages_BT = torch.zeros_like(rewards_BT)
    following_B = torch.zeros_like(rewards_BT[:, 0])
    for t in reversed(range(width)):
        next_value_B = values_BT[:, t + 1] * mask_BT[:, t + 1] if t + 1 < width else torch.zeros_like(following_B)
        delta_B = rewards_BT[:, t] + gamma * next_value_B - values_BT[:, t]
        following_B = (delta_B + gamma * lam * following_B) * mask_BT[:, t]
        advantages_BT[:, t] = following_B
    return advantages_BT, (advantages_BT + values_BT) * mask_BT


def leave_one_out(rewards_B: Tensor, samples: int) -> Tensor:
    """RLOO's advantages (Ahmadian et al. 2024), B: each reward minus the mean of the other samples of its prompt.

    Neighbours are samples of one prompt, `samples` each. A prompt's advantages sum to 0.
    """
    rewards_PK = rewards_B.view(-1, samples)
    others_PK = (rewards_PK.sum(1, keepdim=True) - rewards_PK) / (samples - 1)
    return (rewards_PK - others_PK).flatten()
