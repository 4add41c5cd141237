"""Each gate by hand: what passes, what is refused, and that the words name value, threshold and next step."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from deploy.config import GateSettings
from deploy.gates import GATES, Evaluation, Verdict, judge

SETTINGS = GateSettings()
GOOD: dict[str, Any] = {
    "reward_gain_base": {"mean": 0.8, "low": 0.5, "high": 1.1, "n": 24},
    "reward_gain_stable": {"mean": 0.4, "low": 0.1, "high": 0.7, "n": 24},
    "likelihood_gain": {"mean": 0.05, "low": 0.02, "high": 0.08, "n": 420},
    "kl_nats": 2.5,
    "kl_budget_nats": 2.0,
    "facts": {"n": 3000, "base": 0.8, "candidate": 0.795, "diff": -0.005, "low": -0.012, "margin_points": 2.0, "certifies_points": 1.0},
    "length": {"base": 20.0, "candidate": 24.0},
    "finished": {"base": 0.9, "candidate": 0.85},
    "repetition": {"base": 0.01, "candidate": 0.02},
    "refusal": {"base": 0.0, "candidate": 0.0},
    "on_topic": {"base": 0.9, "candidate": 0.88},
    "probes": [{"prompt": "Hello", "base": "Hi.", "candidate": "Hi!", "stable": "Hi."}],
    "shuffled": False,
}


def verdict(name: str, settings: GateSettings = SETTINGS, **changed: Any) -> Verdict:
    found = {each.name: each for each in judge(Evaluation.model_validate({**GOOD, **changed}), settings)}
    others = [each for each in found.values() if each.name != name and each.verdict != "pass"]
    assert not others, "a change of one figure concerns one gate"
    return found[name]


def facts(**changed: float) -> dict[str, float]:
    return {**GOOD["facts"], **changed}


def test_a_good_candidate_passes_every_gate() -> None:
    verdicts = judge(Evaluation.model_validate(GOOD), SETTINGS)
    assert [each.verdict for each in verdicts] == ["pass"] * len(GATES)


@pytest.mark.parametrize(
    ("name", "changed", "outcome", "said"),
    [
        ("real labels", {"shuffled": True}, "fail", "shuffled as a control"),
        ("reward model", {"likelihood_gain": {"mean": 0.1, "low": None, "high": None, "n": 9}}, "inconclusive", "rate other prompts"),
        ("reward model", {"likelihood_gain": {"mean": 0.0, "low": -0.01, "high": 0.01, "n": 120}}, "fail", "120 ratings"),
        ("reward model", {"likelihood_gain": {"mean": 0.02, "low": -0.01, "high": 0.05, "n": 90}}, "inconclusive", "needed > 0;"),
        ("gain over stable", {"reward_gain_stable": {"mean": 0.1, "low": -0.1, "high": 0.3, "n": 24}}, "inconclusive", "cannot tell"),
        ("gain over stable", {"reward_gain_stable": {"mean": -0.1, "low": -0.3, "high": 0.1, "n": 24}}, "fail", "collect more ratings"),
        ("gain over base", {"reward_gain_base": {"mean": 0.5, "low": 0.1, "high": 0.9, "n": 7}}, "inconclusive", "at least 8 are needed"),
        ("gain over base", {"reward_gain_base": {"mean": 0.5, "low": None, "high": None, "n": 9}}, "error", "without a lower bound"),
        ("KL", {"kl_nats": 3.01}, "fail", "3.01 nats an answer from base > 3.00; train again with a smaller ppo.kl_target_nats"),
        ("KL", {"kl_nats": float("nan")}, "error", "evaluate again"),
        ("facts", {"facts": None}, "error", "give the trainer a facts file"),
        ("facts", {"facts": facts(candidate=0.75, diff=-0.05, low=-0.06)}, "fail", "facts were lost"),
        ("length", {"length": {"base": 20.0, "candidate": 31.0}}, "fail", "1.55 times as long, 1.5 times at most"),
        ("length", {"length": {"base": 20.0, "candidate": 10.0}}, "fail", "gates.allow_shorter"),
        ("repetition", {"repetition": {"base": 0.01, "candidate": 0.07}}, "fail", "worse by +6.0% > 5.0%"),
        ("answers that end", {"finished": {"base": 0.9, "candidate": 0.7}}, "fail", "raise max_tokens"),
        ("refusals", {"refusal": {"base": 0.0, "candidate": 0.1}}, "fail", "it refuses more"),
        ("on topic", {"on_topic": {"base": 0.9, "candidate": 0.7}}, "fail", "name less of what was asked"),
    ],
)
def test_what_is_refused_and_why(name: str, changed: dict[str, Any], outcome: str, said: str) -> None:
    found = verdict(name, **changed)
    assert found.verdict == outcome
    assert said in found.reason


def test_the_kl_of_answers_that_ended_counts_too_where_there_are_enough() -> None:
    # The limit is 1.5 x 2 nats; all answers together have 2.5.
    found = verdict("KL", kl_finished_nats=3.2, finished_replies=30)
    assert (found.verdict, found.value) == ("fail", 3.2)
    assert "3.20 nats an answer from base > 3.00 (3.20 of the 30 that ended by themselves, 2.50 of all)" in found.reason
    found = verdict("KL", kl_finished_nats=3.2, finished_replies=29)
    assert (found.verdict, found.value) == ("pass", 2.5)
    # What was cut off has at least as much as was seen of it, so it cannot hide behind answers that ended.
    assert verdict("KL", kl_nats=9.0, kl_finished_nats=2.9, finished_replies=96).verdict == "fail"


def test_the_thresholds_themselves_pass() -> None:
    # 1.5 x 2 nats; a rise of 0.05 and falls of 0.1 although 0.9 - 0.8 is 0.09999999999999998 and 0.06 - 0.01 is 0.049999999999999996
    assert verdict("KL", kl_nats=3.0).verdict == "pass"
    assert verdict("repetition", repetition={"base": 0.1, "candidate": 0.15}).verdict == "pass"
    assert verdict("on topic", on_topic={"base": 0.9, "candidate": 0.8}).verdict == "pass"
    # A gain must exceed its threshold.
    assert verdict("gain over base", reward_gain_base={"mean": 0.5, "low": 0.0, "high": 1.0, "n": 24}).verdict == "inconclusive"


def test_figures_stand_in_the_verdict() -> None:
    found = verdict("gain over stable", reward_gain_stable={"mean": 0.1, "low": -0.1, "high": 0.3, "n": 24})
    assert (found.value, found.comparison, found.threshold) == (-0.1, ">", 0.0)
    found = verdict("facts", facts=facts(candidate=0.75, diff=-0.05, low=-0.06))
    assert (found.value, found.comparison, found.threshold) == (-6.0, ">=", -2.0)


def test_few_facts_say_what_they_cannot_certify() -> None:
    # 100 items certify 5 points: nothing lost (diff 0) but at worst 4 points. (5/2)² = 6.25 times as many items are needed.
    few = facts(n=100, candidate=0.8, diff=0.0, low=-0.04, certifies_points=5.0)
    found = verdict("facts", facts=few)
    assert found.verdict == "inconclusive"
    assert "so few items cannot certify 2 points, only 5.0" in found.reason and "about 625 items can tell" in found.reason
    # The demonstration's margin is named, and never used by a set that can certify the strict one.
    demo = GateSettings(demo_facts_margin_points=8.0)
    found = verdict("facts", demo, facts=few)
    assert found.verdict == "pass" and found.threshold == -8.0 and "judged by the demonstration's margin of 8" in found.reason
    found = verdict("facts", demo, facts=facts(candidate=0.75, diff=-0.05, low=-0.06))
    assert found.verdict == "fail" and found.threshold == -2.0


def test_raters_who_like_brevity_may_have_it() -> None:
    found = verdict("length", GateSettings(allow_shorter=True), length={"base": 20.0, "candidate": 2.0})
    assert found.verdict == "pass" and found.value == pytest.approx(0.1)
    assert verdict("length", GateSettings(allow_shorter=True), length={"base": 20.0, "candidate": 31.0}).verdict == "fail"


def test_an_evaluation_without_a_figure_is_refused_by_name() -> None:
    body = {key: value for key, value in GOOD.items() if key != "kl_nats"}
    with pytest.raises(ValidationError, match="kl_nats"):
        Evaluation.model_validate(body)


def test_what_a_newer_trainer_adds_does_not_stop_the_gates() -> None:
    verdicts = judge(Evaluation.model_validate({**GOOD, "sycophancy": 0.1}), SETTINGS)
    assert {each.verdict for each in verdicts} == {"pass"}
