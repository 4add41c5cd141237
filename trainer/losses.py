"""PPO's losses as functions of tensors. Shapes: B replies, T tokens of the longest one; masks are 1 on real tokens.

Sources: Schulman et al. 2017 (clipped surrogate), Schulman 2020 "Approximating KL divergence" (k1, k3),
Ziegler et al. 2019 (KL as a reward, masks).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


def masked_mean(values_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Mean over real tokens, a scalar; 0 where there are none."""
    return (values_BT * mask_BT).sum() / mask_BT.sum().clamp(min=1)


def masked_whiten(values_BT: Tensor, mask_BT: Tensor, eps: float = 1e-8) -> Tensor:
    """Mean 0 and variance 1 over real tokens; padding becomes 0."""
    mean = masked_mean(values_BT, mask_BT)
    variance = masked_mean((values_BT - mean).square(), mask_BT)
    return (values_BT - mean) * torch.rsqrt(variance + eps) * mask_BT


def k1(logprobs_BT: Tensor, reference_BT: Tensor) -> Tensor:
    """log pi - log ref of each token: its mean under pi is KL(pi || ref), in nats."""
    return logprobs_BT - reference_BT


def k3(logprobs_BT: Tensor, reference_BT: Tensor) -> Tensor:
    """exp(ref - pi) - 1 - (ref - pi): never negative, the same mean as `k1`, less variance near 0."""
    log_ratio_BT = reference_BT - logprobs_BT
    return log_ratio_BT.exp() - 1 - log_ratio_BT


class PolicyLoss(NamedTuple):
    """The loss, a scalar, and what to look at."""

    loss: Tensor
    ratio: Tensor
    """Mean ratio; 1 on the first minibatch."""
    ratio_deviation: Tensor
    """Largest |ratio - 1|."""
    clipfrac: Tensor
    """Share of tokens where the clip took the gradient."""
    approx_kl: Tensor
    """k3 estimate of KL(old || new), in nats an action: a token, or a whole reply with RLOO."""


def policy_loss(
    logprobs_BT: Tensor,
    old_logprobs_BT: Tensor,
    advantages_BT: Tensor,
    mask_BT: Tensor,
    clip: float,
    weights_BT: Tensor | None = None,
) -> PolicyLoss:
    """Clipped surrogate, negated so that it is minimised: mean of max(-A·rho, -A·clip(rho, 1 - clip, 1 + clip)).

    `weights_BT` are truncated importance weights of the old policy against the one that sampled.
    """
    log_ratio_BT = (logprobs_BT - old_logprobs_BT) * mask_BT
    ratio_BT = log_ratio_BT.exp()
    plain_BT = -advantages_BT * ratio_BT
    clipped_BT = -advantages_BT * ratio_BT.clamp(1 - clip, 1 + clip)
    loss_BT = torch.maximum(plain_BT, clipped_BT)
    if weights_BT is not None:
        loss_BT = loss_BT * weights_BT
    with torch.no_grad():
        deviation = ((ratio_BT - 1).abs() * mask_BT).max()
        clipfrac = masked_mean((clipped_BT > plain_BT).to(mask_BT.dtype), mask_BT)
        approx_kl = masked_mean(k3(old_logprobs_BT, logprobs_BT.detach()), mask_BT)
        ratio = masked_mean(ratio_BT, mask_BT)
    return PolicyLoss(masked_mean(loss_BT, mask_BT), ratio, deviation, clipfrac, approx_kl)


def value_loss(values_BT: Tensor, old_values_BT: Tensor, returns_BT: Tensor, mask_BT: Tensor, clip: float) -> Tensor:
    """Half the squared error, the worse of plain and clipped around the old value; a scalar."""
    clipped_BT = old_values_BT + (values_BT - old_values_BT).clamp(-clip, clip)
    squared_BT = torch.maximum((values_BT - returns_BT).square(), (clipped_BT - returns_BT).square())
    return 0.5 * masked_mean(squared_BT, mask_BT)


def explained_variance(values_BT: Tensor, returns_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """1 - Var(returns - values) / Var(returns) over real tokens; 1 is perfect, 0 no better than a constant."""
    residual_BT = returns_BT - values_BT
    variance = masked_mean((returns_BT - masked_mean(returns_BT, mask_BT)).square(), mask_BT)
    left = masked_mean((residual_BT - masked_mean(residual_BT, mask_BT)).square(), mask_BT)
    return 1 - left / variance.clamp(min=1e-8)


def importance_weights(old_logprobs_BT: Tensor, behaviour_BT: Tensor, cap: float) -> Tensor:
    """min(pi_old / pi_behaviour, cap) of each token: corrects for rollouts sampled by another engine."""
    return (old_logprobs_BT - behaviour_BT).exp().clamp(max=cap)


LOGITS_ROWS = 256
"""Rows of logits that exist at once: rows x vocabulary x 4 bytes, 50 MB for 49,152 words."""


class _ChosenLogprobs(torch.autograd.Function):
    """log softmax(h·W / T)[target] with d/dh = (W[target] - softmax·W) / T, worked out while the logits are there.

    Backwards is then one product with N x D numbers: no logits are kept, and none are computed twice.
    """

    @staticmethod
    def forward(ctx: Any, states_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, temperature: float) -> Tensor:
        chosen_N = states_ND.new_empty(len(targets_N), dtype=torch.float32)
        slope_ND = torch.empty_like(states_ND) if ctx.needs_input_grad[0] else None
        for start in range(0, len(targets_N), LOGITS_ROWS):
            rows = slice(start, start + LOGITS_ROWS)
            logits_NV = (states_ND[rows] @ weight_VD.T).float().div_(temperature)
            total_N = logits_NV.logsumexp(1)
            chosen_N[rows] = logits_NV.gather(1, targets_N[rows, None])[:, 0] - total_N
            if slope_ND is not None:
                probabilities_NV = logits_NV.sub_(total_N[:, None]).exp_()
                slope_ND[rows] = (weight_VD[targets_N[rows]] - probabilities_NV.to(weight_VD.dtype) @ weight_VD) / temperature
        if slope_ND is not None:
            ctx.save_for_backward(slope_ND)
        return chosen_N

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor, None, None, None]:
        (slope_ND,) = ctx.saved_tensors
        return grad_N[:, None].to(slope_ND.dtype) * slope_ND, None, None, None


def chosen_logprobs(states_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, temperature: float) -> Tensor:
    """Log-probability of each target under softmax(states · weightᵀ / temperature), N; the weight is frozen.

    The logits of `LOGITS_ROWS` rows exist at a time, with and without gradients; softmax is float32 whatever the states are.
    """
    chosen_N: Tensor = _ChosenLogprobs.apply(states_ND, weight_VD, targets_N, temperature)  # type: ignore[no-untyped-call]
    return chosen_N
