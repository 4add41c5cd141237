"""Overriding a gate: who may, what it leaves behind, and that it reaches only the one gate of the one adapter."""

from __future__ import annotations

from pathlib import Path

import pytest
from good_evaluation import GOOD
from rollout_world import MARA, MakeAdapter, Ring

from deploy.overrides import override
from feedback import audit
from feedback.errors import InvalidInput, NotAllowed, PromotionRefused
from feedback.keys import ApiKey

NOA = ApiKey(id="n", owner="noa", person=True, scopes=("gates:override",), created_ms=0)
WORDY = GOOD | {"length": {"base": 20.0, "candidate": 60.0}}


@pytest.fixture
def ring(tmp_path: Path, tiny_policy: Path, make_adapter: MakeAdapter) -> Ring:
    return Ring(tmp_path, tiny_policy, make_adapter)


def test_a_refused_adapter_comes_to_people_on_a_persons_word_and_everybody_sees_it(ring: Ring) -> None:
    adapter = ring.candidate(1, WORDY)
    ring.look(6)
    assert ring.registry.adapter(adapter).state == "refused"
    override(ring.registry, adapter, "length", "our readers asked for detail", NOA, two_people=True)
    ring.look(6)
    last = ring.registry.rollouts(adapter)[-1]
    assert last.state == "canary"
    (row,) = [row for row in last.verdicts if row["name"] == "length"]
    assert (row["verdict"], row["overridden"]) == ("pass", "fail")
    assert "overridden by noa: our readers asked for detail (it said fail: 20.0 tokens before, 60.0 after" in str(row["reason"])
    told = [(row["actor"], row["action"], row["reason"]) for row in audit.read(ring.stores.engine)]
    assert ("noa", "adapter.attested", "override of length: our readers asked for detail") in told
    assert ("noa", "adapter.reconsidered", "noa overrode length: our readers asked for detail") in told


def test_it_reaches_no_other_gate(ring: Ring) -> None:
    adapter = ring.candidate(1, WORDY | {"refusal": {"base": 0.0, "candidate": 0.5}})
    override(ring.registry, adapter, "length", "wanted", NOA, two_people=True)
    ring.look(6)
    record = ring.registry.adapter(adapter)
    assert record.state == "refused" and "refusals:" in record.reason and "length:" not in record.reason
    # Overriding what did not refuse it brings nothing back.
    override(ring.registry, adapter, "on topic", "wanted", NOA, two_people=True)
    assert ring.registry.adapter(adapter).state == "refused"


def test_who_may_not_and_what_never_can(ring: Ring) -> None:
    adapter = ring.candidate(1, WORDY)
    with pytest.raises(NotAllowed, match="gates:override"):
        override(ring.registry, adapter, "length", "wanted", MARA, two_people=True)
    with pytest.raises(PromotionRefused, match="names no person"):
        override(ring.registry, adapter, "length", "wanted", NOA.model_copy(update={"person": False}), two_people=True)
    own = NOA.model_copy(update={"owner": "trainer"})
    with pytest.raises(PromotionRefused, match=r"registered .* and so may not override"):
        override(ring.registry, adapter, "length", "wanted", own, two_people=True)
    with pytest.raises(InvalidInput, match="1 to 500"):
        override(ring.registry, adapter, "length", " ", NOA, two_people=True)
    with pytest.raises(InvalidInput, match="'real labels' cannot be overridden"):
        override(ring.registry, adapter, "real labels", "wanted", NOA, two_people=True)
    with pytest.raises(InvalidInput, match="'size' is no gate; there are: memorised, facts against base"):
        override(ring.registry, adapter, "size", "wanted", NOA, two_people=True)
    assert ring.registry.attestations(adapter, "override") == []
    override(ring.registry, adapter, "length", "one person runs this", own, two_people=False)
