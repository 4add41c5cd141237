"""Who is answered by which arm: shares, stickiness, and nobody in two arms."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.routing import AdapterRef, RoutingTable, assign, position

STABLE = AdapterRef(adapter="a" * 64, temperature=0.7)
CANARY = AdapterRef(adapter="c" * 64, temperature=0.7)


def table(weight: float = 0.3, salt: str = "s") -> RoutingTable:
    return RoutingTable(version=2, stable=STABLE, canary=CANARY, rollout="r7", weight=weight, salt=salt)


def test_names_of_the_arms() -> None:
    assert STABLE.name == "a-" + "a" * 16
    assert table().baseline_name == "a-" + "a" * 16 + "-br7"
    assert RoutingTable(version=1, stable=STABLE).baseline_name is None


def test_a_position_by_hand() -> None:
    # The first 8 bytes of SHA-256 of salt, a zero byte and the subject, as a fraction of 2^64.
    digest = hashlib.sha256(b"s\x00ann").digest()
    assert position("ann", "s") == pytest.approx(digest[0] / 256 + digest[1] / 65536, abs=1 / 65536)
    # The zero byte keeps salt and subject apart.
    assert position("b", "a") != position("", "ab")


@given(st.text(max_size=40), st.text(max_size=10))
def test_positions_lie_in_the_unit_interval(subject: str, salt: str) -> None:
    assert 0 <= position(subject, salt) < 1


@given(st.text(max_size=40), st.floats(min_value=0.01, max_value=0.5), st.text(max_size=10))
def test_the_arm_follows_from_the_position(subject: str, weight: float, salt: str) -> None:
    found, place = assign(subject, table(weight, salt)), position(subject, salt)
    expected = "canary" if place < weight else "baseline" if place >= 1 - weight else "stable"
    assert found.arm == expected
    assert found == assign(subject, table(weight, salt)), "the same person is always in the same arm"
    assert found.adapter == (CANARY if expected == "canary" else STABLE)
    assert found.name == {"canary": CANARY.name, "baseline": f"{STABLE.name}-br7", "stable": STABLE.name}[expected]
    assert found.propensity == pytest.approx({"canary": weight, "baseline": weight, "stable": 1 - 2 * weight}[expected])
    assert found.rollout == "r7"


@given(st.text(max_size=40), st.lists(st.floats(min_value=0.01, max_value=0.5), min_size=2, max_size=4, unique=True).map(sorted))
def test_whoever_is_in_an_arm_stays_when_the_weight_grows(subject: str, weights: list[float]) -> None:
    arms = [assign(subject, table(weight)).arm for weight in weights]
    first = next((arm for arm in arms if arm != "stable"), "stable")
    assert arms == ["stable"] * arms.count("stable") + [first] * (len(arms) - arms.count("stable"))


def test_the_arms_have_their_shares() -> None:
    arms = [assign(f"person {i}", table(0.3)).arm for i in range(20_000)]
    # sd of a share of 0.3 among 20,000 is 0.0032; five of them
    for arm, share in (("canary", 0.3), ("baseline", 0.3), ("stable", 0.4)):
        assert sum(each == arm for each in arms) / len(arms) == pytest.approx(share, abs=0.018)


def test_the_next_rollout_picks_other_people() -> None:
    first = {i for i in range(4000) if assign(f"person {i}", table(0.3, "one")).arm == "canary"}
    second = {i for i in range(4000) if assign(f"person {i}", table(0.3, "two")).arm == "canary"}
    # Independent: a share of 0.3 of the first is in the second again; sd sqrt(0.21 / 1200) = 0.013, five of them.
    assert len(first & second) / len(first) == pytest.approx(0.3, abs=0.07)


def test_half_and_half_leaves_nobody_to_plain_stable() -> None:
    assert {assign(f"person {i}", table(0.5)).arm for i in range(500)} == {"canary", "baseline"}


@pytest.mark.parametrize("without", [RoutingTable(version=1, stable=STABLE), table().without_canary(), table(0.0)])
def test_without_a_canary_everybody_gets_stable(without: RoutingTable) -> None:
    for i in range(200):
        found = assign(f"person {i}", without)
        assert (found.arm, found.name, found.propensity, found.rollout) == ("stable", STABLE.name, 1.0, None)
