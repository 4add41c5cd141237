"""Common knowledge: sentences, with three others of their kind."""

from __future__ import annotations

from examples import load
from examples.smollm2.facts import facts


def test_facts_are_sentences_with_three_others_of_their_kind() -> None:
    items = facts()
    assert len(items) >= 100
    assert len({item.prompt for item in items}) == len(items)
    for item in items:
        assert len(set(item.distractors)) == 3
        assert item.answer not in item.distractors
        assert item.answer.endswith(".")
    paris = next(item for item in items if item.entity == "France")
    assert paris.answer == "The capital of France is Paris."
    assert "The capital of France is Madrid." in paris.distractors


def test_the_prompts_are_apart() -> None:
    example = load("smollm2")
    sets = [set(example.prompts), set(example.held_out), set(example.probes)]
    assert len(set.union(*sets)) == sum(map(len, sets))
