"""One likelihood for everything that people said about answers: choices, ties, both bad and thumbs.

A reward model gives each answer a score r. Scores have a zero: what a person would just not send back. It lies at the
threshold

    tau(x, u) = -(offset + h·z(x) + b_u)

of prompt x and rater u, and every kind of feedback speaks about the same threshold, which is what identifies it:

    thumb      P(up)       = sigmoid(r - tau)
    choice     P(a)        = f_a / Z          f = exp(r), side bias beta: f_a·exp(beta/2), f_b·exp(-beta/2)
               P(b)        = f_b / Z
               P(both bad) = exp(tau) / Z
               P(tie)      = nu·sqrt(f_a·f_b) / Z      (Davidson 1970, where nu is fitted)
               Z           = the sum of the numerators of what was offered

so a choice is Bradley-Terry with an outside option. Without nu a tie counts as half a vote for either answer. Pure
functions of tensors: no model, settings or device inside. All logits are linear in the parameters, so the negative
log-likelihood is convex.
"""

from __future__ import annotations

import torch
from torch import Tensor

A, B, TIE, BOTH_BAD = 0, 1, 2, 3
"""Columns of `choice_logprobs`."""
UP, DOWN = 0, 1
"""Columns of `thumb_logprobs`."""


def thresholds(prompt_offsets_N: Tensor, rater_offsets_N: Tensor, offset: Tensor) -> Tensor:
    """tau of each rating: minus (offset + h·z(x) + b_u). The more generous the rater, the lower the threshold."""
    return -(offset + prompt_offsets_N + rater_offsets_N)


def thumb_logprobs(scores_N: Tensor, thresholds_N: Tensor) -> Tensor:
    """Log-probabilities of (up, down), shape N x 2: a logit of r - tau."""
    logits_N = scores_N - thresholds_N
    return torch.stack([torch.nn.functional.logsigmoid(logits_N), torch.nn.functional.logsigmoid(-logits_N)], dim=1)


def choice_logprobs(
    scores_a_N: Tensor,
    scores_b_N: Tensor,
    thresholds_N: Tensor,
    *,
    rejectable_N: Tensor | None = None,
    side_bias: Tensor | None = None,
    log_nu: Tensor | None = None,
) -> Tensor:
    """Log-probabilities of (a, b, tie, both bad), shape N x 4.

    `rejectable_N` says where "both bad" could be chosen; elsewhere its log-probability is -inf (default: everywhere).
    `side_bias` is the advantage of side a in nats. With `log_nu` a tie is an outcome of its own and each row sums to 1;
    without it, ties are half votes: their column is the mean of the log-probabilities of a and b, and the other three sum to 1.
    """
    half_bias = 0.0 if side_bias is None else side_bias / 2
    utility_a_N = scores_a_N + half_bias
    utility_b_N = scores_b_N - half_bias
    bad_N = thresholds_N if rejectable_N is None else thresholds_N.masked_fill(~rejectable_N, float("-inf"))
    if log_nu is None:
        a_N, b_N, both_bad_N = torch.log_softmax(torch.stack([utility_a_N, utility_b_N, bad_N], dim=1), dim=1).unbind(1)
        return torch.stack([a_N, b_N, (a_N + b_N) / 2, both_bad_N], dim=1)
    tie_N = log_nu + (utility_a_N + utility_b_N) / 2
    return torch.log_softmax(torch.stack([utility_a_N, utility_b_N, tie_N, bad_N], dim=1), dim=1)


def negative_log_likelihood(logprobs_NK: Tensor, outcomes_N: Tensor, weights_N: Tensor | None = None) -> Tensor:
    """Sum over ratings of -weight·log P(outcome), a scalar. Zero for no ratings."""
    chosen_N = logprobs_NK.gather(1, outcomes_N[:, None])[:, 0]
    return -(chosen_N if weights_N is None else weights_N * chosen_N).sum()


def capped_weights(raters_N: Tensor, share: float) -> Tensor:
    """Weights in (0, 1] that hold every rater's share of the total weight at `share` or below.

    A rater with count n gets min(n, cap) votes' worth, cap being the largest with cap <= share·(sum of all min(n, cap)).
    Where even equal raters would exceed `share` (fewer than 1/share of them), all raters get the smallest rater's weight.
    """
    if raters_N.numel() == 0:
        return torch.ones(0, dtype=torch.float64)
    counts_R = torch.bincount(raters_N).double()
    present_R, _ = counts_R[counts_R > 0].sort()
    cap = present_R[0]
    below = torch.zeros((), dtype=torch.float64)
    for position, count in enumerate(present_R):
        # With the k largest raters at the cap and the rest whole: cap = share·(rest + k·cap).
        at_cap = len(present_R) - position
        room = 1 - share * at_cap
        candidate = share * below / room if room > 0 else present_R[-1]
        if candidate >= count:
            cap = count
        else:
            cap = torch.maximum(cap, candidate)
            break
        below = below + count
    return (cap / counts_R.clamp(min=1)).clamp(max=1.0)[raters_N]
