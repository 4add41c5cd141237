"""`/ops/v1` over HTTP: two gateways with a registry between them, on either database."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from ops_world import Instance, MakeAdapter, Two, two_gateways
from waiting import until

from deploy.operations import OPERATIONS
from feedback import audit
from feedback.keys import SCOPES


@pytest.fixture
def two(tmp_path: Path, database_url: str, tiny_policy: Path, make_adapter: MakeAdapter) -> Iterator[Two]:
    made = [make_adapter(tiny_policy, tmp_path / "store", seed) for seed in (0, 1, 2, 3)]
    with two_gateways(tmp_path, database_url, made) as running:
        yield running


def answers(gateway: Instance, adapter: str) -> bool:
    """Whether this gateway sends people to the adapter now."""
    return bool(gateway.app.state.gateway.route.current().stable.adapter == adapter)


def test_either_gateway_takes_back_what_the_other_promoted(two: Two) -> None:
    first, second = two.gateways
    rollout, (stable, better) = two.awaiting(), two.adapters[:2]
    done = first.ask(two.secrets["mara"], "POST", f"/rollouts/{rollout}/approve")
    assert done.status_code == 200 and (done.json()["state"], done.json()["approved_by"]) == ("promoted", "mara")
    until(lambda: answers(first, better) and answers(second, better))
    back = second.ask(two.secrets["omar"], "POST", "/aliases/rollback", reason="they complain", expect=better)
    assert back.status_code == 200 and back.json() == {"stable": stable}
    until(lambda: answers(first, stable) and answers(second, stable))
    # The same wish again, from whoever saw what Omar saw, does not bring it back.
    again = first.ask(two.secrets["mara"], "POST", "/aliases/rollback", reason="they complain", expect=better)
    assert again.status_code == 409 and again.headers["content-type"] == "application/problem+json"
    told = f"rollback: stable is {stable}, expected was {better}: somebody else was first"
    assert again.json() == {"type": "urn:plaudit:conflict", "title": "Conflict", "status": 409, "detail": told, "field": "stable"}
    aliases = first.ask(two.secrets["mara"], "GET", "/aliases").json()
    assert (aliases["stable"], aliases["previous"], aliases["canary"]) == (stable, better, None)
    assert aliases["history"][-1]["actor"] == "omar" and {move["reason"] for move in aliases["history"][-2:]} == {"they complain"}
    chain, fault = audit.verify(first.stores.engine)
    assert fault is None and chain.rows == len(list(audit.read(second.stores.engine)))


def test_a_rollback_ends_a_canary_on_both(two: Two) -> None:
    first, second = two.gateways
    two.awaiting()
    first.registry.promote(first.registry.rollouts()[-1].id, "mara")
    two.at_canary(2)
    until(lambda: second.app.state.gateway.route.current().weight == 0.25)
    back = second.ask(two.secrets["omar"], "POST", "/aliases/rollback", reason="all of it", expect=two.adapters[1])
    assert back.status_code == 200
    until(lambda: first.app.state.gateway.route.current().weight == 0.0 and answers(first, two.adapters[0]))
    assert first.registry.rollouts()[-1].reason == "rollback by omar: all of it"


def test_of_two_approvals_at_once_one_wins(two: Two) -> None:
    rollout = two.awaiting()
    start, replies = threading.Barrier(2), []

    def approve(number: int, who: str) -> None:
        start.wait()
        replies.append((who, two.gateways[number].ask(two.secrets[who], "POST", f"/rollouts/{rollout}/approve")))

    threads = [threading.Thread(target=approve, args=each) for each in ((0, "mara"), (1, "omar"))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = [who for who, reply in replies if reply.status_code == 200]
    (lost,) = [reply for _, reply in replies if reply.status_code != 200]
    assert lost.status_code == 409 and "promoted" in lost.json()["detail"]
    assert two.gateways[0].registry.rollout(rollout).approved_by == winner
    moves = two.gateways[0].ask(two.secrets["mara"], "GET", "/aliases").json()["history"]
    assert [move["name"] for move in moves] == ["stable", "canary", "stable", "previous", "canary"]


def test_an_approval_is_of_the_rollout_that_was_looked_at(two: Two) -> None:
    registry = two.gateways[0].registry
    seen = two.awaiting()
    registry.end_rollout(seen, "a guard", "controller")
    registry.reconsider(two.adapters[1], "mara", "once more")
    newer = two.awaiting()
    refused = two.gateways[1].ask(two.secrets["mara"], "POST", f"/rollouts/{seen}/approve")
    assert refused.status_code == 409 and refused.json()["type"] == "urn:plaudit:promotion_refused"
    assert refused.json()["detail"].endswith("does not wait for approval; its rollout is 'stopped': a guard")
    stopped = two.gateways[1].ask(two.secrets["mara"], "POST", f"/rollouts/{seen}/stop", reason="late")
    assert stopped.status_code == 409 and registry.rollout(newer).state == "awaiting"
    assert two.gateways[1].ask(two.secrets["mara"], "POST", f"/adapters/{two.adapters[1][:12]}/approve").status_code == 200


def test_an_approval_takes_a_person_who_did_not_register(two: Two) -> None:
    rollout = two.awaiting()
    robot, trainer = two.key("ci", "adapters:promote"), two.key("trainer", "adapters:promote", person=True)
    no_person = two.gateways[0].ask(robot, "POST", f"/rollouts/{rollout}/approve").json()
    assert "names no person; make one with plaudit keys create --person" in no_person["detail"] and no_person["field"] == "key"
    registrant = two.gateways[0].ask(trainer, "POST", f"/rollouts/{rollout}/approve")
    assert registrant.status_code == 409 and "'trainer' registered" in registrant.json()["detail"]
    assert two.gateways[0].registry.rollout(rollout).state == "awaiting"


def test_stop_by_its_id_or_whichever_runs(two: Two) -> None:
    first, second = two.gateways
    nothing = first.ask(two.secrets["mara"], "POST", "/rollouts/running/stop", reason="x")
    assert nothing.status_code == 404 and nothing.json()["detail"] == "stop: no rollout is running"
    rollout = two.at_canary()
    done = second.ask(two.secrets["omar"], "POST", f"/rollouts/{rollout}/stop", reason="enough")
    assert done.status_code == 200 and done.json()["reason"] == "stopped by omar: enough"
    two.at_canary(2)
    assert first.ask(two.secrets["mara"], "POST", "/rollouts/running/stop", reason="all").json()["state"] == "stopped"
    listed = first.ask(two.secrets["mara"], "GET", "/rollouts").json()["rollouts"]
    assert [each["state"] for each in listed] == ["stopped", "stopped"] and listed[0]["id"] == rollout
    assert first.ask(two.secrets["mara"], "GET", f"/rollouts/{rollout}").json() == listed[0]


def test_an_adapter_in_the_store_is_registered_once_and_shown(two: Two) -> None:
    writer, late = two.key("loader", "adapters:write"), two.adapters[3]
    for gateway in two.gateways:
        done = gateway.ask(writer, "POST", "/adapters", adapter=late)
        assert done.status_code == 200 and (done.json()["id"], done.json()["registered_by"]) == (late, "loader")
    shown = two.gateways[1].ask(writer, "GET", f"/adapters/{late[:10]}").json()
    assert shown["adapter"]["id"] == late and shown["manifest"]["seed"] == 3 and shown["rollouts"] == shown["attestations"] == []
    assert len(two.gateways[0].ask(writer, "GET", "/adapters").json()["adapters"]) == 4
    assert two.gateways[0].ask(writer, "POST", "/adapters", adapter="f" * 64).status_code == 404
    for wrong in ("../../etc", late[:16], 5):
        refused = two.gateways[0].ask(writer, "POST", "/adapters", adapter=wrong)
        assert refused.status_code == 400 and refused.json()["field"] == "adapter"


def test_a_gate_is_overridden_with_a_reason(two: Two) -> None:
    mara = two.key("mara", "gates:override", person=True)
    path = f"/adapters/{two.adapters[1]}/override"
    done = two.gateways[0].ask(mara, "POST", path, gate="length", reason="wanted")
    assert done.status_code == 200 and done.json()["state"] == "candidate"
    unknown = two.gateways[0].ask(mara, "POST", path, gate="mood", reason="wanted")
    assert unknown.status_code == 400 and "'mood' is no gate; there are:" in unknown.json()["detail"]
    empty = two.gateways[0].ask(mara, "POST", path, gate="length", reason=" ")
    assert empty.status_code == 400 and empty.json()["field"] == "reason"


def test_routing_and_audit_are_read(two: Two) -> None:
    gateway = two.gateways[0]
    gateway.registry.report_held("vllm-1", {"a-1"})
    routing = gateway.ask(two.secrets["mara"], "GET", "/routing").json()
    assert routing["table"]["stable"]["adapter"] == two.adapters[0]
    assert [(each["replica"], each["names"], each["lives"]) for each in routing["replicas"]] == [("vllm-1", ["a-1"], True)]
    auditor = two.key("ada", "audit")
    records = gateway.ask(auditor, "GET", "/audit", limit=2).json()["records"]
    assert records == list(audit.read(gateway.stores.engine))[-2:]
    earlier = gateway.ask(auditor, "GET", "/audit", limit=1, before=records[0]["id"]).json()["records"]
    assert [each["id"] for each in earlier] == [records[0]["id"] - 1]
    for wrong in ({"limit": 0}, {"limit": 1001}, {"limit": "x"}, {"since": 1}):
        refused = gateway.ask(auditor, "GET", "/audit", **wrong)
        assert refused.status_code == 400 and refused.json()["field"] == next(iter(wrong))


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_every_scope_opens_its_own_operations_alone(two: Two) -> None:
    reads = {"adapters:write", "adapters:promote", "gates:override"}
    secrets = {scope: two.key(scope, scope) for scope in SCOPES}
    assert len(OPERATIONS) == 14
    for each in OPERATIONS:
        path = each.path.format(adapter="none", rollout="none")
        for scope, secret in secrets.items():
            opens = scope == each.scope or (each.scope == "adapters:read" and scope in reads)
            reply = two.gateways[0].ask(secret, each.method, path)
            assert (reply.status_code != 403) == opens, (each.path, scope, reply.status_code)
            if not opens:
                assert reply.json()["type"] == "urn:plaudit:not_allowed" and f"this needs '{each.scope}'" in reply.json()["detail"]
        nobody = two.gateways[0].http.request(each.method, f"/ops/v1{path}")
        assert nobody.status_code == 401 and nobody.json()["type"] == "urn:plaudit:not_authenticated"


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_what_is_no_request_is_a_problem_too(two: Two) -> None:
    http, headers = two.gateways[0].http, {"Authorization": f"Bearer {two.secrets['mara']}"}
    unknown = http.get("/ops/v1/nothing", headers=headers)
    assert unknown.status_code == 404 and unknown.json()["type"] == "urn:plaudit:not_found"
    assert http.put("/ops/v1/adapters", headers=headers).json()["type"] == "urn:plaudit:method_not_allowed"
    for body in (b"{", b"[]", b"[" * 5000, b"\xff"):
        refused = http.post("/ops/v1/aliases/rollback", content=body, headers=headers)
        assert refused.status_code == 400 and refused.headers["content-type"] == "application/problem+json", body
    missing = http.post("/ops/v1/aliases/rollback", json={"reason": "x"}, headers=headers)
    assert missing.status_code == 400 and missing.json()["field"] == "expect"
    twice = http.post("/ops/v1/rollouts/a/stop", json={"reason": "x", "rollout": "b"}, headers=headers)
    assert twice.status_code == 400 and twice.json()["field"] == "rollout"
