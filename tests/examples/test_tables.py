"""Facts out of tables: enough of them, each with distractors that could be meant, the same every time."""

from __future__ import annotations

from collections import Counter

from examples.smollm2.tables import DISTRACTORS, tables


def test_two_thousand_items_about_a_thousand_things() -> None:
    items = tables()
    assert len(items) >= 2000 and len({item.entity for item in items}) >= 1000
    assert items == tables()
    assert max(Counter((item.prompt, item.answer) for item in items).values()) == 1
    for item in items:
        assert len({item.answer, *item.distractors}) == 1 + DISTRACTORS


def test_distractors_are_what_is_easily_confused() -> None:
    by_prompt = {item.prompt: item for item in tables()}
    assert by_prompt["What is the capital of France?"].distractors[0] in (
        "The capital of France is Rome.",
        "The capital of France is Madrid.",
    )
    assert by_prompt["What is the atomic number of selenium?"].distractors[:2] == (
        "The atomic number of selenium is 33.",
        "The atomic number of selenium is 35.",
    )
    # A name that stands for two cities has no right answer.
    assert "In which country is the city Hyderabad?" not in by_prompt
    # The answer would stand in the question.
    assert "What is the capital of Guatemala?" not in by_prompt
