"""What needs no PPO: the best of n answers, and an adapter that imitates them. For reports and benchmarks to compare with."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from feedback.errors import TrainingRefused
from trainer.policy import Policy
from trainer.ppo import Score
from trainer.reply import Reply, by_tokens


def best_of_n_kl(n: int) -> float:
    """log n - (n - 1) / n nats: how far the best of n answers is from the policy that gave them (Stiennon et al. 2020, appendix G.3).

    An upper bound, exact where no two answers have the same score (Beirami et al. 2024).
    """
    return math.log(n) - (n - 1) / n


def best_of_n(
    policy: Policy, prompts: Sequence[tuple[int, ...]], score: Score, n: int, *, max_tokens: int, temperature: float, seed: int
) -> tuple[list[Reply], Tensor]:
    """The best of n answers to each prompt, and the scores of all, P x n; of equal ones the first."""
    asked = [prompt for prompt in prompts for _ in range(n)]
    replies = policy.sample(asked, max_tokens=max_tokens, temperature=temperature, seed=seed)
    scores_PN = score(replies, policy.features(replies)).float().view(len(prompts), n)
    return [replies[row * n + best] for row, best in enumerate(scores_PN.argmax(1).tolist())], scores_PN


def imitate(
    policy: Policy,
    replies: Sequence[Reply],
    *,
    temperature: float,
    learning_rate: float,
    epochs: int,
    minibatch: int = 16,
    group_tokens: int = 512,
    seed: int = 0,
) -> list[float]:
    """Supervised fine-tuning of the policy's adapter on these replies, in place; the loss of each epoch, nats a token.

    The loss is -log pi_T: the policy is what samples at this temperature. Raises TrainingRefused on a loss that is not finite.
    """
    optimiser = torch.optim.AdamW(policy.parameters, lr=learning_rate, eps=1e-5, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for epoch in range(epochs):
        total = 0.0
        for rows in torch.split(torch.randperm(len(replies), generator=generator), minibatch):
            part = [replies[i] for i in rows.tolist()]
            tokens = sum(len(reply.tokens) for reply in part)
            for group in by_tokens(part, group_tokens):
                some = [part[i] for i in group]
                states_BTD, mask_BT, _ = policy.hidden(some)
                loss = -policy.token_logprobs(states_BTD, mask_BT, some, temperature).sum()
                if not torch.isfinite(loss):
                    raise TrainingRefused(f"imitation: the loss is {loss.item()} in epoch {epoch}; lower the learning rate", field="loss")
                (loss / tokens).backward()  # type: ignore[no-untyped-call]
                total += float(loss.detach())
            torch.nn.utils.clip_grad_norm_(policy.parameters, 1.0)
            optimiser.step()
            optimiser.zero_grad()
        losses.append(total / sum(len(reply.tokens) for reply in replies))
    return losses
