"""Guardrails by hand, their words, and by simulation with the negative control: answers taken for people."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest

from deploy.answers import Answer
from deploy.guards import (
    BETS,
    GUARDRAILS,
    HARMS,
    LEAST_PAIRS,
    WAITING,
    Arm,
    Evidence,
    Guardrail,
    Guards,
    bar,
    path,
    ratio_log_e,
    with_margins,
)
from feedback.errors import ConfigError

ERRORS = GUARDRAILS[0]
REWARD = next(each for each in GUARDRAILS if each.name == "reward")
ARMS: tuple[Arm, Arm] = ("canary", "baseline")


def said(guards: Guards) -> Mapping[str, str]:
    return {each.name.removeprefix("guardrail "): each.reason for each in guards.verdicts()}


def outcomes(guards: Guards) -> Mapping[str, str]:
    return {each.name.removeprefix("guardrail "): each.verdict for each in guards.verdicts()}


def test_evidence_by_hand() -> None:
    # d = 1 against a margin of 0 multiplies by 1 + b: in the mean 1 + mean(b). Then d = -1: by 1 - b, so 1 - mean(b²).
    found = path(np.array([1.0, -1.0]), 0.0)
    assert np.exp(found) == pytest.approx([1 + BETS.mean(), 1 - (BETS**2).mean()], abs=1e-12)
    # Against a margin of 1/2, d = 1/2 changes nothing and d = 1 multiplies by 1 + b·(1/2)/(3/2).
    assert np.exp(path(np.array([0.5, 1.0]), 0.5)) == pytest.approx([1.0, 1 + BETS.mean() / 3], abs=1e-12)


def test_all_tests_together_risk_alpha() -> None:
    # 12 guardrails at three depths and the sample ratio: 37 tests, each at 0.025/37.
    assert bar(0.025) == pytest.approx(37 / 0.025, rel=1e-12)


def test_evidence_that_comes_in_pieces_is_that_of_the_whole() -> None:
    rng = np.random.default_rng(0)
    canary, baseline = rng.random(700), rng.random(700)
    straight, pieces = Evidence(ERRORS), Evidence(ERRORS)
    for one, other in zip(canary, baseline, strict=True):
        straight.add("canary", one)
        straight.add("baseline", other)
        straight.look()
    # A look after each pair sees the highest of the whole path.
    assert straight.log_e == pytest.approx(max(0.0, float(path(canary - baseline, ERRORS.margin).max())), abs=1e-9)
    assert straight.mean == pytest.approx(float((canary - baseline).mean()), abs=1e-12)
    for at in range(703):  # the baseline lags by three people
        if at < 700:
            pieces.add("canary", canary[at])
        if at >= 3:
            pieces.add("baseline", baseline[at - 3])
        if at % 70 == 0:
            pieces.look()
    pieces.look()
    assert pieces.pairs == 700
    assert pieces.mean == pytest.approx(straight.mean, abs=1e-12)
    assert pieces.log_e <= straight.log_e, "fewer looks see less"


def test_an_outage_of_both_arms_stops_nobody() -> None:
    def stopped(kept: int) -> int:
        found = 0
        for run in range(25):
            rng, evidence = np.random.default_rng([run, 3]), Evidence(ERRORS)
            evidence._partners._waiting = deque(maxlen=kept)
            for at in range(600):
                evidence.add(ARMS[int(rng.random() < 0.5)], float(at >= 400))
                evidence.look()
            found += evidence.log_e >= math.log(bar(0.025))
        return found

    assert stopped(WAITING) == 0
    assert stopped(1000) > 2, "the control: who is ahead by many waits through the beginning of the outage"


def test_less_reward_is_worse_and_more_is_not() -> None:
    worse, better = Evidence(REWARD), Evidence(REWARD)
    for _ in range(200):
        for evidence, arms in ((worse, (-1.0, 0.0)), (better, (1.0, 0.0))):
            for arm, value in zip(ARMS, arms, strict=True):
                evidence.add(arm, value)
    worse.look()
    better.look()
    assert worse.log_e > math.log(bar(0.025)) and better.log_e == 0.0
    low, high = worse.bounds(40)
    assert 0.1 < low <= 1.0 <= high < 2.0
    assert better.bounds(40)[1] < 0 < worse.bounds(40)[0]


def test_bounds_hold_the_truth_at_all_looks() -> None:
    rng = np.random.default_rng(1)
    missed = 0
    for _ in range(150):
        evidence = Evidence(ERRORS)
        for _ in range(12):
            for failed_c, failed_b in zip(rng.random(25) < 0.3, rng.random(25) < 0.1, strict=True):
                evidence.add("canary", float(failed_c))
                evidence.add("baseline", float(failed_b))
            evidence.look()
        low, high = evidence.bounds(40)  # each side at 2.5 %
        missed += not low <= 0.2 <= high
    assert missed / 150 <= 0.05
    assert low > -1.0 and high < 1.0


def paired(guardrail: Guardrail, canary: Sequence[float], baseline: Sequence[float]) -> Evidence:
    evidence = Evidence(guardrail)
    for pair in zip(canary, baseline, strict=True):
        for arm, value in zip(ARMS, pair, strict=True):
            evidence.add(arm, value)
    evidence.look()
    return evidence


def test_the_smallest_harm_of_a_share_by_hand() -> None:
    # No pair differs and the margin is 0, so a share h of 100 people at their worst makes (1 + b)^(100h) of each bet b.
    guardrail = replace(ERRORS, margin=0.0)
    found = paired(guardrail, [0.0] * 100, [0.0] * 100).detectable(40)
    assert found is not None and ((1 + BETS) ** (100 * found)).mean() >= 40
    smaller = HARMS[found - 1e-12 > HARMS][-1]
    assert ((1 + BETS) ** (100 * smaller)).mean() < 40
    # And that many people at their worst do stop it: 100h of them rounded up, not rounded down to those of the harm before.
    many, few = math.ceil(100 * found), math.floor(100 * smaller)
    assert paired(guardrail, [1.0] * many + [0.0] * (100 - many), [0.0] * 100).log_e >= math.log(40)
    assert paired(guardrail, [1.0] * few + [0.0] * (100 - few), [0.0] * 100).log_e < math.log(40)
    # Where half of the baseline's thumbs are down already, people at their worst differ less: more of them are needed.
    thumbs = next(each for each in GUARDRAILS if each.name == "thumbs")
    best, mixed = (paired(thumbs, ups, ups).detectable(40) for ups in ([1.0] * 100, [1.0, 0.0] * 50))
    assert best is not None and mixed is not None and mixed > best


def test_the_smallest_harm_of_a_mean_is_the_shift_that_stops() -> None:
    rng = np.random.default_rng(2)
    baseline, noise = rng.normal(0, 1, 150), rng.normal(0, 0.5, 150)
    evidence = paired(REWARD, list(baseline + noise), list(baseline))
    found = evidence.detectable(bar(0.025))
    assert found is not None and evidence.log_e < math.log(bar(0.025))
    # Less reward is the harm: everybody's falls by what the mean difference lacks to it.
    shift = found - evidence.mean
    assert paired(REWARD, list(baseline + noise - shift), list(baseline)).log_e >= math.log(bar(0.025))
    assert paired(REWARD, list(baseline + noise - shift / 1.2), list(baseline)).log_e < math.log(bar(0.025))


def test_few_people_could_have_seen_no_harm_and_more_see_smaller_ones() -> None:
    seen = [paired(ERRORS, [0.0] * people, [0.0] * people).detectable(bar(0.025)) for people in (5, 50, 500)]
    assert seen[0] is None and seen[1] is not None and seen[2] is not None and seen[1] > seen[2] > ERRORS.margin
    # One that was stopped had seen the harm that it had.
    stopped = paired(ERRORS, [1.0] * 50, [0.0] * 50)
    assert stopped.detectable(bar(0.025)) == stopped.mean == 1.0


def test_the_sample_ratio_by_hand() -> None:
    halves = (0.5, 0.5)
    # The prior is worth 20 people an arm. The first person says nothing: (20/40)/(1/2) = 1.
    assert ratio_log_e((1, 0), halves) == pytest.approx(0.0, abs=1e-12)
    # Two in one arm: (20/40)·(21/41)/(1/4) = 1.0243902. One in each: (20/40)·(20/41)/(1/4) = 0.9756098.
    assert math.exp(ratio_log_e((2, 0), halves)) == pytest.approx(42 / 41, abs=1e-9)
    assert math.exp(ratio_log_e((1, 1), halves)) == pytest.approx(40 / 41, abs=1e-9)
    # In the mean over what is assigned, (42/41 + 40/41)/2 = 1: nothing is won on average.
    # Other shares: the first person in an arm of 1/4 says nothing either.
    assert ratio_log_e((1, 0), (0.25, 0.75)) == pytest.approx(0.0, abs=1e-12)


def fill(guards: Guards, people: int, canary: Answer, baseline: Answer) -> None:
    for person in range(people):
        for arm, answer in zip(ARMS, (canary, baseline), strict=True):
            guards.arrived(f"{arm}{person}", arm)
            guards.answered(f"{arm}{person}", arm, answer)


def test_words_of_each_verdict() -> None:
    guards = Guards(0.025)
    fine = Answer("stop", tokens=100, first_token_ms=200.0, total_ms=2000.0)
    fill(guards, LEAST_PAIRS - 1, fine, fine)
    assert said(guards)["errors"] == "answers that broke off: 9 people in the smaller arm, at least 10 are needed"
    assert outcomes(guards)["errors"] == "inconclusive"
    assert all(each.detectable is None for each in guards.verdicts()), "nine people could not have seen anything"
    guards = Guards(0.025)
    fill(guards, 200, Answer("stop", tokens=300, first_token_ms=200.0, total_ms=5600.0), fine)
    verdict = next(each for each in guards.verdicts() if each.name == "guardrail longer")
    assert verdict.verdict == "fail" and verdict.value is not None and verdict.value > math.log2(1.5) == verdict.threshold
    assert verdict.reason.startswith("length of an answer: x3.00 against the baseline, surely x")
    assert verdict.detectable is not None and math.log2(1.5) < verdict.detectable <= math.log2(3) + 1e-9
    assert ", worse than x1.50 allowed (200 people an arm, the first figure of each)" in verdict.reason
    others = outcomes(guards)
    assert [name for name, outcome in others.items() if outcome == "fail"] == ["longer"]
    assert [others[name] for name in ("errors", "latency", "shorter", "sample ratio", "thumbs")] == [*["pass"] * 4, "inconclusive"]
    assert "cannot be ruled out with 200 people an arm" in said(guards)["errors"]


def test_arms_of_unequal_size_are_an_error() -> None:
    guards = Guards(0.025)
    for person in range(400):
        arm: Arm = "canary" if person % 4 == 0 else "baseline"
        for _ in range(3):
            guards.arrived(str(person), arm)  # told often, counted once
    verdict = guards.verdicts()[-1]
    assert (verdict.name, verdict.verdict) == ("guardrail sample ratio", "error")
    assert verdict.reason.startswith("people: 100 in the canary and 300 in the baseline, evidence ")


def test_one_person_who_fails_all_day_is_one_person() -> None:
    by_person, by_answer = Guards(0.025), Guards(0.025)
    for turn in range(400):
        for arm, broken in zip(ARMS, (turn % 2 == 0, False), strict=True):
            answer = Answer("error" if broken else "stop", tokens=10)
            by_person.answered("busy" if broken else f"{arm}{turn}", arm, answer)
            by_answer.answered(f"{arm}{turn}", arm, answer)
    assert outcomes(by_person)["errors"] == "pass"
    assert outcomes(by_answer)["errors"] == "fail", "the control: the same answers, each taken for a person"


def test_later_figures_of_a_person_count_at_their_depth() -> None:
    guards = Guards(0.025)
    for person in range(150):
        for turn in range(4):
            for arm in ARMS:
                broken = arm == "canary" and turn > 0
                guards.answered(f"{arm}{person}", arm, Answer("error" if broken else "stop", tokens=10))
    # Every first answer is fine, so only the depth of four sees it: (0 + 1 + 1 + 1)/4 = 75 points.
    assert "+75.0 points against the baseline" in said(guards)["errors"]
    assert "(150 people an arm, the first 4 figures of each)" in said(guards)["errors"]


def test_who_is_erased_is_forgotten_and_sums_stay() -> None:
    guards = Guards(0.025)
    fill(guards, 50, Answer("error"), Answer("stop", tokens=5))
    before = said(guards)["errors"]
    guards.forget({"canary0", "nobody"})
    assert "canary0" not in repr(vars(guards)) and said(guards)["errors"] == before


def test_margins_can_be_changed_by_name() -> None:
    changed = {each.name: each.margin for each in with_margins({"errors": 0.05})}
    assert changed["errors"] == 0.05 and changed["refusals"] == 0.03
    with pytest.raises(ConfigError, match="there is no guardrail 'mistakes'; there are errors, empty answers, "):
        with_margins({"mistakes": 0.1})
    with pytest.raises(ConfigError, match=r"errors = 1 is not in \[0, 1\)"):
        with_margins({"errors": 1.0})
