"""Best of n and imitating it, against numbers worked out by hand and a known preference."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from learning_policy import learning_policy, low_words

from trainer.baselines import best_of_n, best_of_n_kl, imitate
from trainer.policy import Policy

PROMPTS = [(2, i, i + 1, 3) for i in range(6, 18)]


def test_kl_of_best_of_n_by_hand_and_by_counting() -> None:
    assert best_of_n_kl(1) == 0.0
    assert best_of_n_kl(2) == pytest.approx(math.log(2) - 0.5, abs=1e-9)
    # 1000 equally likely answers without ties: the k-th best is taken with probability (k^n - (k - 1)^n) / 1000^n
    k = torch.arange(1, 1001, dtype=torch.float64) / 1000
    chosen = k**4 - (k - 0.001) ** 4
    exact = float((chosen * (chosen * 1000).log()).sum())
    assert best_of_n_kl(4) == pytest.approx(exact, abs=2e-3)
    assert best_of_n_kl(4) == pytest.approx(1.386294 - 0.75, abs=1e-5)


def test_the_best_is_taken_and_imitated(tmp_path: Path) -> None:
    policy = Policy.load(learning_policy(tmp_path))
    chosen, scores_PN = best_of_n(policy, PROMPTS, low_words, 8, max_tokens=8, temperature=0.7, seed=0)
    assert [reply.prompt for reply in chosen] == PROMPTS
    assert low_words(chosen).tolist() == scores_PN.max(1).values.tolist()
    losses = imitate(policy, chosen, temperature=0.7, learning_rate=3e-3, epochs=6)
    # Before the first step it is the reference; the mean over all replies of -log pi_T.
    logprobs_BT, mask_BT = policy.logprobs(chosen, 0.7, reference=True)
    assert losses[0] == pytest.approx(-float(logprobs_BT.sum() / mask_BT.sum()), abs=1e-5)
    assert losses[-1] < losses[0] - 0.1
    after = policy.sample(PROMPTS * 8, max_tokens=8, temperature=0.7, seed=1)
    assert float(low_words(after).mean()) > float(scores_PN.mean()) + 0.4
