"""The likelihood of choices and thumbs, against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from trainer.likelihood import (
    BOTH_BAD,
    DOWN,
    TIE,
    UP,
    A,
    B,
    capped_weights,
    choice_logprobs,
    negative_log_likelihood,
    thresholds,
    thumb_logprobs,
)

LN2, LN3 = math.log(2), math.log(3)


def doubles(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_threshold_falls_with_generosity() -> None:
    # -(c + h·z + b_u) = -(0.5 + 1 - 0.25) = -1.25
    assert thresholds(doubles(1.0), doubles(-0.25), doubles(0.5)[0]).item() == pytest.approx(-1.25)
    generous, strict = thresholds(doubles(0.0, 0.0), doubles(1.0, -1.0), doubles(0.0)[0])
    assert generous < strict


def test_thumb_is_a_logit_of_score_minus_threshold() -> None:
    # r - tau = ln 3 - 0: P(up) = 3/4, P(down) = 1/4
    rows = thumb_logprobs(doubles(LN3), doubles(0.0)).exp()
    assert rows[0].tolist() == pytest.approx([0.75, 0.25], abs=1e-12)
    # Shifting score and threshold together changes nothing: only the difference is identified.
    assert torch.allclose(thumb_logprobs(doubles(LN3 + 5), doubles(5.0)).exp(), rows)


def test_choice_has_an_outside_option_at_the_threshold() -> None:
    # f_a = 3, f_b = 2, e^tau = 1: 3/6, 2/6, both bad 1/6
    row = choice_logprobs(doubles(LN3), doubles(LN2), doubles(0.0))[0].exp()
    assert row[[A, B, BOTH_BAD]].tolist() == pytest.approx([1 / 2, 1 / 3, 1 / 6], abs=1e-12)
    # A tie is half a vote for each: its log-probability is the mean of the two, so P = sqrt(1/2 · 1/3).
    assert row[TIE].item() == pytest.approx(math.sqrt(1 / 6), abs=1e-12)


def test_without_both_bad_it_is_bradley_terry() -> None:
    # f_a : f_b = 3 : 1 whatever the threshold
    row = choice_logprobs(doubles(LN3), doubles(0.0), doubles(7.0), rejectable_N=torch.tensor([False]))[0].exp()
    assert row[[A, B, BOTH_BAD]].tolist() == pytest.approx([0.75, 0.25, 0.0], abs=1e-12)


def test_side_bias_multiplies_one_side_and_divides_the_other() -> None:
    # equal scores, bias 2·ln 2: f_a = 2, f_b = 1/2, so P(a) = 4/5
    bias = torch.tensor(2 * LN2, dtype=torch.float64)
    row = choice_logprobs(doubles(0.0), doubles(0.0), doubles(0.0), rejectable_N=torch.tensor([False]), side_bias=bias)[0].exp()
    assert row[[A, B]].tolist() == pytest.approx([0.8, 0.2], abs=1e-12)


def test_davidson_tie_is_an_outcome_of_its_own() -> None:
    # f_a = 4, f_b = 1, nu = 1/2: tie numerator 1/2·sqrt(4) = 1; e^tau = 2; Z = 4 + 1 + 1 + 2 = 8
    nu = torch.tensor(-LN2, dtype=torch.float64)
    row = choice_logprobs(doubles(2 * LN2), doubles(0.0), doubles(LN2), log_nu=nu)[0].exp()
    assert row.tolist() == pytest.approx([4 / 8, 1 / 8, 1 / 8, 2 / 8], abs=1e-12)


def test_swapping_sides_mirrors_the_outcomes() -> None:
    a, b, tau = doubles(0.3, -2.0), doubles(1.1, 0.4), doubles(0.2, -0.5)
    assert torch.allclose(choice_logprobs(a, b, tau)[:, [B, A, TIE, BOTH_BAD]], choice_logprobs(b, a, tau))


def test_negative_log_likelihood_sums_weighted_outcomes() -> None:
    rows = thumb_logprobs(doubles(LN3, 0.0), doubles(0.0, 0.0))
    # -ln(3/4) + 2·(-ln(1/2))
    found = negative_log_likelihood(rows, torch.tensor([UP, DOWN]), doubles(1.0, 2.0))
    assert found.item() == pytest.approx(-math.log(0.75) + 2 * LN2, abs=1e-12)
    assert negative_log_likelihood(torch.zeros(0, 2), torch.zeros(0, dtype=torch.long)).item() == 0.0


def test_a_flipped_sign_is_noticed() -> None:
    """The gradient must raise the score of what was preferred; the same check on the flipped outcome fails."""

    def slope(outcome: int) -> float:
        scores = doubles(0.0).requires_grad_(True)
        negative_log_likelihood(choice_logprobs(scores, doubles(0.0), doubles(0.0)), torch.tensor([outcome])).backward()  # type: ignore[no-untyped-call]
        assert scores.grad is not None
        return scores.grad.item()

    # d(-log P(a))/dr_a = P(a) - 1 = 1/3 - 1; for b and both bad it is P(a) = 1/3
    assert slope(A) == pytest.approx(-2 / 3)
    assert slope(B) == pytest.approx(1 / 3)
    assert slope(BOTH_BAD) == pytest.approx(1 / 3)
    # Half a vote each: (−2/3 + 1/3) / 2
    assert slope(TIE) == pytest.approx(-1 / 6)


def test_an_impossible_outcome_leaves_gradients_finite() -> None:
    scores = doubles(0.5, 0.5).requires_grad_(True)
    rows = choice_logprobs(scores, doubles(0.0, 0.0), doubles(0.0, 0.0), rejectable_N=torch.tensor([False, True]))
    negative_log_likelihood(rows, torch.tensor([A, BOTH_BAD])).backward()  # type: ignore[no-untyped-call]
    assert scores.grad is not None and bool(torch.isfinite(scores.grad).all())


def test_weights_hold_a_rater_to_the_cap() -> None:
    # 8, 1 and 1 votes, cap 1/2: cap = ½·(2 + cap) = 2 votes, so the loud rater's votes weigh 1/4 each: 2 of 4 in all.
    raters = torch.tensor([0] * 8 + [1, 2])
    weights = capped_weights(raters, 0.5)
    assert weights.tolist() == pytest.approx([0.25] * 8 + [1.0, 1.0])
    assert (weights[:8].sum() / weights.sum()).item() == pytest.approx(0.5)


def test_weights_of_equal_raters_are_whole() -> None:
    assert capped_weights(torch.tensor([0, 0, 1, 1, 2, 2]), 2 / 3).tolist() == [1.0] * 6
    assert capped_weights(torch.tensor([0, 0, 0]), 2.0).tolist() == [1.0] * 3
    assert capped_weights(torch.zeros(0, dtype=torch.long), 0.5).numel() == 0


def test_an_unreachable_cap_gives_every_rater_the_same() -> None:
    # Two raters can never both be below 10 %: each gets the smaller one's 1 vote.
    weights = capped_weights(torch.tensor([0, 0, 0, 0, 1]), 0.1)
    assert weights.tolist() == pytest.approx([0.25] * 4 + [1.0])
