"""What is asked of a fact, and figures of policies that are known."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_policy import make_tiny_policy

from deploy.gates import Evaluation
from trainer.evaluation import Sampling
from trainer.facts import FactLine
from trainer.knowledge import Asked, Knowing, _chat, _sycophancy, asked, knowledge, values
from trainer.policy import Policy

HOW = Sampling(system_prompt=None, temperature=1.0, max_tokens=4, samples=2, seed=3)
PERU = FactLine(
    "Capital of Peru?", "The capital of Peru is Lima.", ("The capital of Peru is Quito.", "The capital of Peru is Cusco."), "Peru"
)


def test_a_value_is_what_answers_do_not_share() -> None:
    assert values(PERU.answer, PERU.distractors) == ["Lima", "Quito", "Cusco"]
    assert values("Lima", ("Quito",)) == ["Lima", "Quito"]
    assert values("The symbol of gold is Au", ("The symbol of gold is Ag",)) == ["Au", "Ag"]
    # Words after the value, and one value that begins with another.
    assert values("It is New York city.", ("It is New Delhi city.",)) == ["York", "Delhi"]
    assert values("It is Guinea.", ("It is Guinea Bissau.",)) == ["Guinea", "Guinea Bissau"]


def test_what_can_be_asked_in_chat() -> None:
    symbol = FactLine("Symbol of gold?", "It is Au.", ("It is Ag.",), "gold")
    told = FactLine("Is Lima the capital of Peru?", PERU.answer, PERU.distractors, "Peru")
    inside = FactLine("Where is Conakry?", "It is Guinea.", ("It is Guinea Bissau.",), "Conakry")
    found = asked([PERU, symbol, told, inside])
    assert [each.fact for each in found] == [PERU]
    (fact,) = found
    assert fact.says_right("I think it is lima, in Peru.") and not fact.says_right("Limassol") and not fact.says_right("Lima or Quito")
    assert fact.echoes("You are right, it is Quito.") and not fact.echoes("Not Quito but Lima.") and not fact.echoes("Cusco")


def knowing(right: list[float], sway: list[float], echo: list[float]) -> Knowing:
    return Knowing(np.zeros(0), np.array(right), np.array(sway), np.array(echo))


def test_figures_by_hand() -> None:
    facts = [replace(PERU, entity=str(i)) for i in range(4)]
    base, new = knowing([1, 1, 0, 0], [3, 4, 5, 6], [0, 0, 0, 1]), knowing([1, 0, 0, 0], [4, 4, 7, 7], [0, 1, 0, 1])
    chat = _chat(base, new, facts)
    assert chat is not None and (chat["n"], chat["base"], chat["candidate"], chat["diff"]) == (4, 0.5, 0.25, -0.25)
    assert chat["low"] < -0.25
    found = _sycophancy(base, new, [Asked(fact, "Lima", ("Quito",)) for fact in facts])
    # Belief takes 1, 0, 2 and 1 nats more than before: 1 on average; turned round, it would be a bound below the mean.
    assert found is not None and found["rise_nats"] == pytest.approx(1.0) and found["high"] > 1.0
    assert found["echo"] == {"base": 0.25, "candidate": 0.5}
    assert _sycophancy(base, new, []) is None


def test_an_unchanged_candidate_knows_what_base_knows(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    policy = Policy.load(make_tiny_policy(tmp_path))
    facts = [
        FactLine(" red", right, tuple(w for w in (" one two", " two one", " three") if w != right), str(i))
        for i, right in enumerate((" one two", " two one", " three"))
    ]
    body, details = knowledge(facts, policy, policy, HOW, 2.0)
    assert body["facts"] == body["facts_stable"] and body["facts"]["diff"] == 0.0 == body["facts"]["low"]
    assert "3 items" in details["facts_stable"]["words"]
    assert body["facts"]["margin_change_nats"] == pytest.approx(0.0, abs=1e-5)
    for found in (body["chat_facts"], body["sycophancy"]):
        assert found is not None
    assert body["chat_facts"]["diff"] == 0.0 and body["chat_facts_stable"] == body["chat_facts"]
    assert body["sycophancy"]["rise_nats"] == pytest.approx(0.0, abs=1e-5)
    assert set(body) <= set(Evaluation.model_fields)
    nothing, shown = knowledge([], policy, None, HOW, 2.0)
    assert set(nothing.values()) == {None} and shown == {"facts": None}
