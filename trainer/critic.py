"""The critic: how good a reply is expected to become, token by token."""

from __future__ import annotations

import torch
from torch import Tensor

CRITIC_RIDGE = 10.0


class Critic(torch.nn.Module):
    """A linear value head on detached states, so that it can never pull at the policy."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(hidden_size, 1)
        torch.nn.init.zeros_(self.linear.weight)
        torch.nn.init.zeros_(self.linear.bias)
        self.register_buffer("mean_D", torch.zeros(hidden_size))
        self.register_buffer("scale_D", torch.ones(hidden_size))

    def forward(self, states_BTD: Tensor) -> Tensor:
        values_BT: Tensor = self.linear((states_BTD.detach() - self.get_buffer("mean_D")) / self.get_buffer("scale_D")).squeeze(-1)
        return values_BT

    @torch.no_grad()
    def fit(self, states_ND: Tensor, returns_N: Tensor) -> None:
        """Ridge regression of returns on standardised states."""
        mean, scale = states_ND.mean(0), states_ND.std(0).clamp(min=1e-6)
        self.get_buffer("mean_D").copy_(mean)
        self.get_buffer("scale_D").copy_(scale)
        X = (states_ND - mean) / scale
        ridge = CRITIC_RIDGE * len(X) ** 0.5 * torch.eye(X.shape[1])
        self.linear.weight.copy_(torch.linalg.solve(X.T @ X + ridge, X.T @ (returns_N - returns_N.mean()))[None])
        self.linear.bias.fill_(float(returns_N.mean()))
