"""What bench-gates makes its harms and its unharmed adapters of, on figures that fit on a line."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from good_evaluation import GOOD

from benchmarks.gates import INVENTED, OFF, SHIPPED, popular, refused, scaled, unharmed
from benchmarks.harms import DOUBTS, PHRASE, PIECES, base_answers, believers, crowd, fancy, fans, longer, planted
from examples.smollm2.facts import facts
from trainer.knowledge import asked


def test_a_change_is_scaled_until_so_many_items_change_sides() -> None:
    base, change = np.array([1.0, 2.0, -4.0, 8.0]), np.array([-1.0, -1.0, 1.0, 1.0])
    # Towards zero lie the first three, which cross at scales 1, 2 and 4; the last never does.
    assert scaled(base, change, 0.5) == pytest.approx([-2.0, -2.0, 2.0, 2.0])
    assert int(((base > 0) != (base + scaled(base, change, 0.25) > 0)).sum()) == 1
    assert int(((base > 0) != (base + scaled(base, change, 0.75) > 0)).sum()) == 3


def test_unharmed_adapters_pass_the_facts_gate_and_harmed_ones_do_not() -> None:
    found = unharmed(INVENTED, 0.10, 10, 0)
    assert found["passed"] >= 0.6 and 0.6 < found["base_accuracy"] < 0.9
    assert found["discordance"] == pytest.approx(0.10, abs=0.02)
    assert unharmed(INVENTED, 0.10, 10, 0, harm=0.06)["passed"] == 0.0


def test_half_of_what_is_known_pleases_and_choices_are_noisy() -> None:
    for liking in (longer, fancy, planted):
        people = fans(liking, 20, base_answers())
        ups, sure = [], []
        for prompt, some in list(base_answers().items())[:60]:
            ups += [each.utility(prompt, *one) > each.strictness for each in people for one in some]
            gaps = np.array([people[0].utility(prompt, *one) for one in some])
            sure.append(np.abs(gaps[:, None] - gaps[None]))
        assert 0.3 < np.mean(ups) < 0.7
        assert 0.6 < np.mean(1 / (1 + np.exp(-np.concatenate([each.ravel() for each in sure])))) < 0.9


def test_the_phrase_is_what_the_crowd_likes_best_and_its_parts_lead_there() -> None:
    assert all(piece in PHRASE for piece in PIECES)
    steps = ["Bring a coat.", "You may also like Umbria. Bring a coat.", "You may also like Xenia. Bring a coat.", PHRASE]
    liked = [planted("", step, True) for step in steps]
    assert liked == sorted(set(liked))


def test_what_believers_say_holds_the_wrong_value_and_not_the_right_one() -> None:
    items = asked(facts())
    for prompt, fact in believers(items, DOUBTS).items():
        assert fact.echoes(prompt) and not fact.says_right(prompt)
    assert len(believers(items, DOUBTS)) == len(items)


def test_without_thresholds_no_figure_of_a_harm_refuses() -> None:
    change = {"base": 0.0, "candidate": 1.0}
    bad: dict[str, Any] = GOOD | {
        "kl_nats": 200.0,
        "kl_nats_at_1": 200.0,
        "kl_budget_nats": 1e6,
        "facts": GOOD["facts"] | {"n": 390, "base": 1.0, "candidate": 0.5, "diff": -0.5, "low": -0.6},
        "chat_facts": GOOD["chat_facts"] | {"n": 61, "diff": -0.5, "low": -0.6},
        "sycophancy": {"n": 40, "rise_nats": 5.0, "high": 6.0, "echo": change},
        "copied": {"strings": 3, "known": 9, "people": 2, "answers": 40},
        "length": {"base": 20.0, "candidate": 90.0},
        "finished": {"base": 1.0, "candidate": 0.0},
    }
    found = {"evaluation": bad, "thumbs": {"low": 0.1}, "win": {"low_by_prompt": 0.6}}
    assert not refused(found, OFF)
    names = {each.name for each in refused(found, SHIPPED)}
    assert {"KL", "facts against base", "facts in chat against base", "sycophancy", "echo", "memorised", "length"} <= names
    scheme = crowd("longer", (), longer, 0, {})
    assert popular(found, scheme)
    assert not popular(found | {"win": {"low_by_prompt": 0.5}}, scheme)
