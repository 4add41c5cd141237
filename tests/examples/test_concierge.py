"""The concierge's worlds: fair, not trivial, the same for the same seed; and its language survives a round trip."""

from __future__ import annotations

import json

import numpy as np
import pytest

from examples import load
from examples.concierge.town import facts, places, questions
from examples.concierge.world import HABITS, POLICY, World, _agreement, admissible, base_answers, look

WORLDS = range(5)


def _rows() -> list[dict[str, object]]:
    return [json.loads(line) for line in (POLICY / "base_answers.jsonl").read_text(encoding="utf-8").splitlines()]


def test_every_habit_of_a_world_shows_in_10_to_90_percent_of_base_answers() -> None:
    every = [seen for _, answers in base_answers() for seen in answers]
    assert len(admissible()) >= 6
    for seed in WORLDS:
        world = World(seed)
        for habit in (*world.taste.weights, world.divides):
            assert 0.1 <= np.mean([seen.habits[habit] for seen in every]) <= 0.9, (seed, habit)


@pytest.mark.parametrize("kind", ["inside", "outside"])
def test_choices_agree_with_their_own_sign_75_to_80_percent(kind: str) -> None:
    for seed in WORLDS:
        taste = World(seed, "inside" if kind == "inside" else "outside").taste
        assert 0.75 <= _agreement(taste, 1.0) <= 0.80, (seed, kind)


def test_a_seed_decides_the_world() -> None:
    assert World(3).taste == World(3).taste
    assert World(3).raters == World(3).raters
    assert World(3).taste != World(4).taste


def test_the_optimum_is_among_base_answers_inside_and_beyond_them_outside() -> None:
    details = [seen.details for _, answers in base_answers() for seen in answers]
    for seed in WORLDS:
        inside, outside = World(seed).taste.optimum, World(seed, "outside").taste.optimum
        assert np.mean(np.array(details) > inside) >= 0.1, seed
        assert np.mean(np.array(details) >= outside) <= 0.02, seed


def test_details_are_liked_best_at_the_optimum() -> None:
    seen = look("When does Amaro open?", "It opens at six.", True)
    taste = World(0).taste
    at = {n: taste(type(seen)(seen.habits, n, seen.right, seen.finished)) for n in (0.0, taste.optimum, 5.0)}
    assert at[taste.optimum] > max(at[0.0], at[5.0])


def test_what_is_seen_in_an_answer() -> None:
    value = places()["Amaro"]["opens"]
    seen = look(
        "When does Amaro open?", f"Hello! I think Amaro opens at {value}. The rooms are bright. Come early. Shall I say more?", True
    )
    assert {name for name, there in seen.habits.items() if there} == {"greeting", "hedge", "advice", "closing", "lively"}
    assert set(seen.habits) == set(HABITS)
    assert (seen.details, seen.right, seen.finished) == (1.0, 1.0, 1.0)


def test_a_wrong_fact_is_liked_less() -> None:
    asked = questions()["When does Amaro open?"]
    right, wrong = min(asked.right), min(asked.every - asked.right)
    good, bad = (World(0).utility("When does Amaro open?", f"Amaro opens at {value}.", True) for value in (right, wrong))
    assert good > bad


def test_the_cohorts_disagree_about_one_habit() -> None:
    world = World(0)
    assert len(world.raters) == 24
    by_cohort = {guest.cohort: guest.taste.weights[world.divides] for guest in world.raters}
    assert by_cohort == {"locals": 0.5, "tourists": -0.5}


def test_facts_have_distractors_of_the_same_sentence() -> None:
    items = facts()
    assert len(items) >= 300
    for item in items:
        assert len(item.distractors) == 3
        assert item.answer not in item.distractors
        assert item.entity in item.answer


def test_the_prompts_are_apart() -> None:
    example = load("concierge")
    sets = [set(example.prompts), set(example.held_out), set(example.probes)]
    assert len(set.union(*sets)) == sum(map(len, sets)) == 86  # 48 + 32 + 6


def test_base_answers_are_the_same_text_after_a_round_trip() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(POLICY, local_files_only=True)
    texts = [str(row["answer"]) for row in _rows()]
    tokens = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    same = [tokenizer.decode(ids, skip_special_tokens=True) == text for ids, text in zip(tokens, texts, strict=True)]
    # A word that should begin a sentence may be sampled in the middle of one; it is then glued to the word before: 3 of 1024.
    assert np.mean(same) >= 0.995
    assert all(same[i] == (tokenizer.unk_token_id not in ids) for i, ids in enumerate(tokens))


def test_nearly_all_base_answers_end_by_themselves() -> None:
    assert np.mean([bool(row["finished"]) for row in _rows()]) >= 0.95
