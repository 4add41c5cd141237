"""The rules of SmolLM2's simulated raters, by answers whose traits are counted by hand."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from commands.settings import settings_from
from examples.smollm2.convert import policy_dir
from examples.smollm2.example import example
from examples.smollm2.raters import COHORTS, RATERS, content_words, on_topic, raters, traits

ASKED = "How do I cut onions?"
USEFUL = "To cut onions, peel the skin, slice each half on a board, and keep your knife sharp."
VACUOUS = "Cutting onions is a culinary tradition."
RAMBLING = " ".join([USEFUL, "Remember that a chef in the kitchen of a hotel has done so for years and years."] * 2) + " And then"


def test_traits_are_what_a_person_would_count() -> None:
    # to cut onions peel the skin slice each half on a board and keep your knife sharp: 17 words.
    # The question is about cut and onion; new are peel, skin, slice, each, half, board, knife, sharp: 8.
    seen = traits(ASKED, USEFUL, True)
    assert (seen.words, seen.named, seen.substance, seen.steps, seen.addresses, seen.repeats) == (17, 1.0, 8, 1, True, 0.0)
    # is, a: small words; new are culinary and tradition: 2. Nothing to do.
    seen = traits(ASKED, VACUOUS, True)
    assert (seen.words, seen.named, seen.substance, seen.steps, seen.addresses) == (6, 1.0, 2, 0, False)


def test_one_stem_for_the_forms_of_a_word() -> None:
    assert content_words("cutting tomatoes") == content_words("I cut a tomato")


def test_an_empty_answer_and_an_empty_question_are_counted_too() -> None:
    seen = traits("", "", False)
    assert (seen.words, seen.named, seen.substance, seen.repeats) == (0, 0.0, 0, 0.0)


def test_on_topic_asks_for_the_thing_and_for_something_about_it() -> None:
    assert on_topic(ASKED, USEFUL)
    assert not on_topic(ASKED, VACUOUS)
    assert not on_topic(ASKED, "Preheat the oven, then roast a chicken with butter, garlic, lemon and herbs.")


@pytest.mark.parametrize("cohort", COHORTS)
def test_every_rater_prefers_the_useful_answer(cohort: str) -> None:
    for rater in raters():
        if rater.cohort == cohort:
            useful = rater.utility(ASKED, USEFUL, True)
            assert useful > rater.utility(ASKED, VACUOUS, True)
            assert useful > rater.utility(ASKED, RAMBLING, False)


def test_the_noise_is_that_of_bradley_terry() -> None:
    # The winner of two equal answers is a coin, and of two whose utilities differ by d the better one wins sigmoid(d) of the
    # time: both over 4,000 draws, sd 0.8 %. Ties take |d + noise| < 0.15 away, 4 to 8 % of the draws.
    rater = raters()[0]
    rng = np.random.default_rng(0)
    same = Counter(rater.choose(ASKED, USEFUL, USEFUL, True, True, rng) for _ in range(4000))
    assert abs(same["a"] / (same["a"] + same["b"]) - 0.5) < 0.03
    other = "To cut onions, peel the skin, slice each half on a board, and keep your knife sharp and your hands away from it."
    difference = rater.utility(ASKED, USEFUL, True) - rater.utility(ASKED, other, True)
    drawn = Counter(rater.choose(ASKED, USEFUL, other, True, True, rng) for _ in range(4000))
    assert abs(drawn["a"] / (drawn["a"] + drawn["b"]) - 1 / (1 + np.exp(-difference))) < 0.03
    assert 0.03 < drawn["tie"] / 4000 < 0.09


def test_thumbs_follow_the_utility_and_some_people_do_not_bother() -> None:
    rater, rng = raters()[1], np.random.default_rng(0)
    good = Counter(rater.thumb(ASKED, USEFUL, True, rng) for _ in range(1000))
    bad = Counter(rater.thumb(ASKED, VACUOUS, True, rng) for _ in range(1000))
    assert good["up"] > bad["up"]
    assert 60 < good[None] < 140  # a tenth: 100, sd 9


def test_raters_are_the_same_for_a_seed_and_half_of_each_cohort() -> None:
    assert raters(3) == raters(3)
    assert raters(3) != raters(4)
    assert Counter(rater.cohort for rater in raters()) == {cohort: RATERS // len(COHORTS) for cohort in COHORTS}
    assert len({rater.id for rater in raters()}) == RATERS


def test_nobody_rates_what_is_held_out() -> None:
    shipped = example()
    asked = [set(some) for some in (shipped.prompts, shipped.held_out, shipped.probes)]
    assert not asked[0] & asked[1] and not asked[0] & asked[2] and not asked[1] & asked[2]
    assert len(shipped.facts) >= 50
    assert all(fact.answer not in fact.distractors for fact in shipped.facts)


def test_a_shipped_policy_brings_how_it_is_asked_and_what_is_set_wins(tmp_path: Path) -> None:
    told = tmp_path / "plaudit.toml"
    told.write_text('[policy]\nbase = "smollm2"\nmax_tokens = 32\n')
    policy = settings_from(told).policy
    assert (policy.temperature, policy.max_tokens, policy.system_prompt) == (0.7, 32, example().system_prompt)
    told.write_text(f'[policy]\nbase = "{tmp_path}"\n')
    assert settings_from(told).policy.system_prompt is None


def test_what_is_converted_already_is_returned_at_once(tmp_path: Path) -> None:
    made = tmp_path / "policies" / "smollm2"
    made.mkdir(parents=True)
    (made / "config.json").write_text("{}")
    assert policy_dir(tmp_path) == made
    assert [path.name for path in made.iterdir()] == ["config.json"]


@pytest.mark.slow
def test_the_wheel_becomes_a_model_that_answers(tmp_path: Path) -> None:
    from trainer.policy import Policy

    policy = Policy.load(policy_dir(tmp_path))
    prompt = policy.encode([{"role": "user", "content": "What is the capital of France?"}], example().system_prompt)
    [reply] = policy.sample([prompt], max_tokens=24, temperature=0.0, seed=0)
    assert "Paris" in policy.decode(reply.tokens)
    assert [path.name for path in (tmp_path / "policies").iterdir()] == ["smollm2"]
