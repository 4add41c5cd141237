"""Facts before and after, with figures worked out by hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_policy import make_tiny_policy

from feedback.errors import InvalidInput
from trainer.facts import FactLine, compare, lower_bound, margins, read_facts, write_facts
from trainer.policy import Policy


def test_accuracy_difference_and_discordance() -> None:
    base, new = np.array([1.0, 1.0, -1.0, 2.0]), np.array([2.0, -1.0, 1.0, 2.0])
    found = compare(base, new, ["a", "b", "c", "d"], margin_points=2.0)
    # Right before: items 0, 1, 3; after: 0, 2, 3. One lost, one won.
    assert (found.base, found.candidate, found.diff, found.discordant) == (0.75, 0.75, 0.0, 0.5)
    # Margins moved by 1, -2, 2 and 0 nats.
    assert found.margin_change_nats == pytest.approx(0.25)
    assert found.low is not None and -1 <= found.low < 0
    # (1.644854 + 0.841621)·sqrt(0.5 / 4) = 0.879101
    assert found.certifies_points == pytest.approx(87.9101, abs=1e-3)
    assert "cannot certify 2 points" in found.words


def test_an_unharmed_set_of_two_thousand_certifies_two_points_and_a_small_one_does_not() -> None:
    values = np.ones(2000)
    large = compare(values, values, [str(i) for i in range(2000)], margin_points=2.0)
    assert large.low == 0.0
    # At the least discordance of 5 %: 2.486475·sqrt(0.05 / 2000) = 1.2432 points
    assert large.certifies_points == pytest.approx(1.2432, abs=1e-3)
    assert "can certify 2 points" in large.words
    small = compare(values[:500], values[:500], [str(i) for i in range(500)], margin_points=2.0)
    assert small.certifies_points == pytest.approx(2.4865, abs=1e-3)
    assert "cannot certify" in small.words


def test_harm_shows_in_the_lower_bound_and_a_flipped_sign_would_hide_it() -> None:
    base = np.ones(400)
    worse = np.where(np.arange(400) < 40, -1.0, 1.0)
    names = [str(i) for i in range(400)]
    found = compare(base, worse, names, margin_points=2.0)
    assert found.diff == pytest.approx(-0.1)
    # sd of a share of 40 of 400: sqrt(0.1·0.9 / 400) = 0.015; 1.645 of it below -0.1
    assert found.low == pytest.approx(-0.1 - 1.645 * 0.015, abs=0.005)
    better = compare(worse, base, names, margin_points=2.0)
    assert better.low is not None and better.low > 0


def test_items_about_one_entity_stand_or_fall_together() -> None:
    base = np.ones(100)
    worse = np.where(np.arange(100) < 10, -1.0, 1.0)
    apart = compare(base, worse, [str(i) for i in range(100)], margin_points=2.0)
    together = compare(base, worse, [str(i // 10) for i in range(100)], margin_points=2.0)
    assert together.low is not None and apart.low is not None and together.low < apart.low


def test_one_entity_gives_no_bound_and_few_a_wide_one() -> None:
    base, new = np.ones(100), np.where(np.arange(100) % 10 == 0, -1.0, 1.0)
    found = compare(base, new, ["one"] * 100, margin_points=2.0)
    assert found.low is None and found.diff == pytest.approx(-0.1) and "without an interval" in found.words
    # Two of ten and none of ten: a bootstrap of two entities draws both alike every second time, so its 5 % quantile is the worse one's
    # -0.2, that is 0.1 below the mean. Student's 0.95 quantile of 1 degree is 6.313752: 0.1 · 6.313752 / 1.644854 · sqrt(2) = 0.542846.
    change = np.array([-1.0, -1.0, *[0.0] * 18])
    assert lower_bound(change, ["a"] * 10 + ["b"] * 10) == pytest.approx(-0.1 - 0.542846, abs=1e-5)


def test_the_same_seed_gives_the_same_bound() -> None:
    base, new = np.ones(30), np.where(np.arange(30) % 7 == 0, -1.0, 1.0)
    names = [str(i // 2) for i in range(30)]
    assert compare(base, new, names, margin_points=2.0, seed=4) == compare(base, new, names, margin_points=2.0, seed=4)


def test_no_items_are_refused() -> None:
    with pytest.raises(InvalidInput, match="0 items"):
        compare(np.zeros(0), np.zeros(0), [], margin_points=2.0)


def test_margins_are_differences_of_sums_of_logprobs(tmp_path: Path) -> None:
    policy = Policy.load(make_tiny_policy(tmp_path))
    fact = FactLine(" red", " one two", (" two one", " three"), "red")
    found = margins(policy, [fact, fact], None, reference=True)

    def likelihood(text: str) -> float:
        reply = policy.reply([{"role": "user", "content": " red"}], None, text, True)
        logprobs, mask = policy.logprobs([reply], 1.0, reference=True)
        assert mask.sum() == len(text.split()) + 1  # its words and the end
        return float((logprobs * mask).sum())

    expected = likelihood(" one two") - max(likelihood(" two one"), likelihood(" three"))
    assert found.tolist() == pytest.approx([expected, expected], abs=1e-4)
    assert math.isfinite(expected) and expected != 0
    # With B = 0 the candidate is the base.
    assert margins(policy, [fact], None, reference=False).tolist() == pytest.approx([expected], abs=1e-5)
    assert torch.is_grad_enabled()


def test_a_file_of_facts_and_its_broken_lines(tmp_path: Path) -> None:
    path = tmp_path / "facts.jsonl"
    facts = [FactLine("Capital of Perú?", "Lima", ("Quito", "Cusco"), "Perú")]
    write_facts(path, facts)
    assert read_facts(path) == facts
    path.write_text(path.read_text() + '{"prompt": "x", "answer": "y", "entity": "z"}\n')
    with pytest.raises(InvalidInput, match=r"line 2.*distractors"):
        read_facts(path)
    path.write_text('{"prompt": "x", "answer": "y", "distractors": ["y"], "entity": "z"}\n')
    with pytest.raises(InvalidInput, match="line 1: distractors must be there and differ"):
        read_facts(path)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"cycle\.facts: .*gone\.jsonl cannot be read: .*No such file"):
        read_facts(tmp_path / "gone.jsonl")
    (tmp_path / "facts.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(InvalidInput, match=r"cycle\.facts: .*cannot be read: .*utf-8"):
        read_facts(tmp_path / "facts.jsonl")
