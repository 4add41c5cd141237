"""How far two runs of PPO differ, in figures worked out by hand."""

from __future__ import annotations

import pytest
import torch

from trainer.evaluation import Answers
from trainer.seeds import Outcome, compare, gains_apart, undecided, words

ENDED = {"released": 3, "stopped_because": "all iterations were done"}


def scored(*scores: float) -> Answers:
    """Answers of which only scores count, two to each prompt."""
    return Answers([], [], torch.tensor(scores), {"length": 20.0, "finished": 1.0})


BASE = scored(0.0, 2.0, 0.0, 0.0, -1.0, 1.0)


def test_gains_are_held_against_different_base_answers() -> None:
    # Base's first answers are 0, 0, -1 and its second ones 2, 0, 1. The first run's first answers are 1, 2, 2, the other's means 3, 0, 2.
    first_P, other_P = gains_apart(scored(1.0, 1.0, 2.0, 2.0, 2.0, 4.0), scored(3.0, 3.0, 0.0, 0.0, 2.0, 2.0), BASE, 2)
    assert first_P.tolist() == [1.0, 2.0, 3.0] and other_P.tolist() == [1.0, 0.0, 1.0]


def test_a_run_that_says_what_base_says_gains_nothing_on_any_prompt() -> None:
    """Both have base's random numbers: with all of its answers against half of base's it would gain where the other run loses."""
    first_P, _ = gains_apart(BASE, scored(3.0, 3.0, 0.0, 0.0, 2.0, 2.0), BASE, 2)
    assert first_P.tolist() == [0.0, 0.0, 0.0]


def test_the_disagreement_by_hand() -> None:
    first = Outcome(0, scored(1.0, 1.0, 2.0, 2.0, 3.0, 3.0), 4.0, ENDED)
    other = Outcome(1000, scored(3.0, 3.0, 0.0, 0.0, 2.0, 2.0), 5.0, ENDED)
    found = compare([first, other], BASE, 2)
    (apart,) = found["against_first"]
    # Differences of the means: 3 - 1, 0 - 2, 2 - 3: mean -1/3.
    assert apart["difference"]["mean"] == pytest.approx(-1 / 3) and apart["difference"]["n"] == 3
    # Gains (1, 2, 4) and (1, 0, 1) around their means: (-4/3, -1/3, 5/3) and (1/3, -2/3, 1/3):
    # products -4/9 + 2/9 + 5/9 = 1/3, squares 42/9 and 6/9, so r = (1/3) / sqrt(42·6/81) = 3 / sqrt(252).
    assert apart["correlation"] == pytest.approx(3 / 252**0.5)
    # Only the second prompt is better by the first alone.
    assert apart["opposite"] == pytest.approx(1 / 3)
    (line,) = words(found)
    assert line.startswith("seed 1000 gains -0.33 sd (") and "KL 5.0 and 4.0 nats" in line and "33% of prompts" in line


def test_one_seed_has_nothing_to_disagree_with() -> None:
    found = compare([Outcome(0, scored(1.0, 1.0, 1.0, 1.0, 1.0, 1.0), 4.0, ENDED)], BASE, 2)
    assert len(found["runs"]) == 1 and found["against_first"] == [] and words(found) == [] and not undecided(found)


def test_a_gain_that_only_the_first_seed_found_is_called_lucky() -> None:
    sure, unsure = scored(2.0, 2.1, 2.0, 2.1, 2.0, 2.1), scored(3.0, 3.0, -3.0, -3.0, 0.0, 0.0)
    assert undecided(compare([Outcome(0, sure, 1.0, ENDED), Outcome(1, unsure, 1.0, ENDED)], BASE, 2))
    assert not undecided(compare([Outcome(0, sure, 1.0, ENDED), Outcome(1, sure, 1.0, ENDED)], BASE, 2))
