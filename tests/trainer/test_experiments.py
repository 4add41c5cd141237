"""Experiments on over-optimisation that take seconds; docs/lab.md tells the figures. The worlds are fixed, nothing is tuned to a seed."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
from gaussian_world import ZERO, GaussianWorld, climb, expected_score, learned, together
from torch import Tensor

from benchmarks.overopt import Hump
from trainer.labels import Labels
from trainer.reward_model import RewardModel

LENGTH = 6.0
"""18 nats where the path is straight."""
FEW, ROUNDS, MANY = 120, 4, 1600
SEEDS = range(2)


@cache
def ratings(seed: int, rounds: int, pairs: int = FEW) -> Labels:
    """Of the base's answers, and of those of every round before the last."""
    world = GaussianWorld(seed)
    asked = [ZERO, *(path(seed, i)[-1] for i in range(1, rounds))]
    return together([world.rated(m_D, pairs, i) for i, m_D in enumerate(asked)])


@cache
def model(seed: int, rounds: int = 1, pairs: int = FEW) -> RewardModel:
    return learned(ratings(seed, rounds, pairs))


@cache
def path(seed: int, rounds: int = 1, pairs: int = FEW) -> list[Tensor]:
    """Policies of the last of so many rounds, each of which starts at the base."""
    return climb(model(seed, rounds, pairs), ZERO, LENGTH)


def gains(seed: int, policies: list[Tensor]) -> list[float]:
    world = GaussianWorld(seed)
    return [world.gold(m_D) - world.gold(ZERO) for m_D in policies]


def kl_nats(m_D: Tensor) -> float:
    return float(m_D.square().sum() / 2)


def test_a_hump_is_found_again() -> None:
    # R(d) = d (2 - 1·ln d): R(1) = 2, R(e) = e, R(e²) = 0; its peak is at e^(2/1 - 1) = e.
    e = math.e
    found = Hump.fit([0.5, 1.0, e, e**2], [9.0, 2.0, e, 0.0])  # what lies below 1 is not looked at
    assert (found.alpha, found.beta, found.r2, found.peak) == pytest.approx((2.0, 1.0, 1.0, e), abs=1e-5)
    # R(d) = d (4 - 1·d): R(1) = 3, R(2) = 4, R(4) = 0; its peak is at 4 / (2·1) = 2.
    found = Hump.fit([1.0, 2.0, 4.0], [3.0, 4.0, 0.0], best_of_n=True)
    assert (found.alpha, found.beta, found.r2, found.peak) == pytest.approx((4.0, 1.0, 1.0, 2.0), abs=1e-5)
    # With the other sign of beta, d (2 + 1·ln d), nothing ever turns.
    assert Hump.fit([1.0, e, e**2], [2.0, 3 * e, 4 * e**2]).peak == math.inf


@pytest.mark.slow
def test_the_proxy_is_a_line_over_the_distance_and_gold_a_hump() -> None:
    for seed in SEEDS:
        for pairs in (FEW, MANY):
            policies = path(seed, 1, pairs)
            distances, gold = [kl_nats(m_D) ** 0.5 for m_D in policies], gains(seed, policies)
            proxy = [float(expected_score(model(seed, 1, pairs), m_D)) for m_D in policies[::6]]
            line = float(torch.corrcoef(torch.tensor([proxy, distances[::6]]))[0, 1]) ** 2
            hump, other = Hump.fit(distances, gold, best_of_n=True), Hump.fit(distances, gold)
            print(f"seed {seed}, {pairs}: line {line:.3f}, hump {hump.r2:.3f} (with ln {other.r2:.2f}), peak {hump.peak:.2f}")
            assert line > 0.98
            assert hump.r2 > 0.9
        # No number of ratings tells a line that the preference bends.
        assert gold[-1] < 0.95 * max(gold)


@pytest.mark.slow
def test_rating_what_was_learned_beats_rating_the_base_again() -> None:
    for seed in SEEDS:
        once, again = gains(seed, path(seed, 1, ROUNDS * FEW)), gains(seed, path(seed, ROUNDS))
        print(f"seed {seed}: {once[-1]:.2f} in one round (best {max(once):.2f}), {again[-1]:.2f} in {ROUNDS} with as many ratings")
        assert again[-1] > max(once)


@pytest.mark.slow
def test_a_second_round_from_the_base_recovers_what_the_first_one_lost() -> None:
    for seed in SEEDS:
        first, second = path(seed), path(seed, 2)
        # A Gaussian can lose nothing that it needs, so going on does recover; it only pays for both ways in KL.
        on = climb(model(seed, 2), first[-1], LENGTH)
        alone = climb(learned(GaussianWorld(seed).rated(first[-1], FEW, 1)), ZERO, LENGTH)
        for name, policies in (("round 1", first), ("round 2", second), ("going on", on), ("without round 1's ratings", alone)):
            found = gains(seed, policies)
            print(f"seed {seed}, {name}: {found[-1]:.2f} at {kl_nats(policies[-1]):.0f} nats, best {max(found):.2f}")
        assert gains(seed, second)[-1] > max(gains(seed, first))
        assert kl_nats(on[-1]) > 1.5 * kl_nats(second[-1])
