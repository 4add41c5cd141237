"""The critic: how good a reply is expected to become, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.policy import GROUP_TOKENS, Policy
from trainer.reply import Reply, by_tokens

CRITIC = "critic"
"""Its adapter's name on the backbone."""
CRITIC_RIDGE = 10.0
"""Of the start, times the square root of the number of tokens."""
WARMUP_REPLIES = 64
"""Replies that the critic starts from: more would cost a big policy half a minute."""
WARMUP_EPOCHS = 2
"""Of an adapter over them."""


@dataclass(frozen=True)
class Warmup:
    """Scored replies of the reference, from which the critic starts."""

    replies: list[Reply]
    scores_B: Tensor


class Critic(torch.nn.Module):
    """A linear value head, 0 at first, on states of the backbone.

    Without an adapter it reads the policy's states, detached, so that it can never pull at the policy. With one (`rank` > 0) it takes a
    pass of its own through the backbone and learns what it reads; the policy's adapter is off there, so neither pulls at the other.
    """

    def __init__(self, policy: Policy, *, rank: int = 0, alpha: int = 16, seed: int = 0) -> None:
        super().__init__()
        self.policy = policy
        self.linear = torch.nn.Linear(policy.hidden_size, 1)
        torch.nn.init.zeros_(self.linear.weight)
        torch.nn.init.zeros_(self.linear.bias)
        self.register_buffer("mean_D", torch.zeros(policy.hidden_size))
        self.register_buffer("scale_D", torch.ones(policy.hidden_size))
        self.to(policy.device)
        self.adapted = rank > 0
        policy.drop_adapter(CRITIC)  # an earlier run's
        if self.adapted:
            policy.add_adapter(CRITIC, rank=rank, alpha=alpha, seed=seed)

    @property
    def adapter(self) -> list[torch.nn.Parameter]:
        """The adapter's parameters; none without one."""
        return self.policy.parameters_of(CRITIC)

    @property
    def trained(self) -> list[torch.nn.Parameter]:
        """The head's parameters and the adapter's."""
        return [*self.parameters(), *self.adapter]

    def forward(self, replies: Sequence[Reply], states_BTD: Tensor) -> Tensor:
        """Values of the replies' tokens, B x T; `states_BTD` are the policy's."""
        values_BT: Tensor = self.linear(self._standardised(self._own(replies, states_BTD))).squeeze(-1)
        return values_BT

    def _own(self, replies: Sequence[Reply], states_BTD: Tensor) -> Tensor:
        if not self.adapted:
            return states_BTD.detach()
        with self.policy.using(CRITIC):
            return self.policy.hidden(replies)[0]

    def _standardised(self, states_BTD: Tensor) -> Tensor:
        return (states_BTD.float() - self.get_buffer("mean_D")) / self.get_buffer("scale_D")

    def warm_up(self, warmup: Warmup, optimiser: torch.optim.Optimizer, minibatch: int, group_tokens: int) -> None:
        """Start where the reference's score is expected, at every token of its replies: ridge, then an adapter learns a little."""
        replies, scores_B = warmup.replies[:WARMUP_REPLIES], warmup.scores_B[:WARMUP_REPLIES].float().to(self.policy.device)
        states, returns = [], []
        for group in by_tokens(replies, GROUP_TOKENS):
            with torch.no_grad():
                states_BTD, mask_BT, _ = self.policy.hidden([replies[i] for i in group])
            states.append(states_BTD[mask_BT.bool()])
            returns.append(scores_B[group].repeat_interleave(mask_BT.sum(1).long()))
        self.fit(torch.cat(states), torch.cat(returns))
        for _ in range(WARMUP_EPOCHS if self.adapted else 0):
            for start in range(0, len(replies), minibatch):
                some = replies[start : start + minibatch]
                tokens = sum(len(reply.tokens) for reply in some)
                for group in by_tokens(some, group_tokens):
                    with self.policy.using(CRITIC):
                        states_BTD, mask_BT, _ = self.policy.hidden([some[i] for i in group])
                    values_BT = self.linear(self._standardised(states_BTD)).squeeze(-1)
                    errors_BT = (values_BT - scores_B[start:][group, None]) * mask_BT
                    (0.5 * errors_BT.square().sum() / tokens).backward()
                torch.nn.utils.clip_grad_norm_(self.adapter, 1.0)
                optimiser.step()
                optimiser.zero_grad()

    @torch.no_grad()
    def fit(self, states_ND: Tensor, returns_N: Tensor) -> None:
        """Ridge regression of returns on standardised states."""
        self.get_buffer("mean_D").copy_(states_ND.mean(0))
        self.get_buffer("scale_D").copy_(states_ND.std(0).clamp(min=1e-6))
        X = self._standardised(states_ND)
        ridge = CRITIC_RIDGE * len(X) ** 0.5 * torch.eye(X.shape[1], device=X.device)
        self.linear.weight.copy_(torch.linalg.solve(X.T @ X + ridge, X.T @ (returns_N - returns_N.mean()))[None])
        self.linear.bias.fill_(float(returns_N.mean()))
