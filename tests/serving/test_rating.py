"""The feedback routes: who may say what about which answer, and what counts in the end."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from serving_world import MODEL, World, serve, sse
from waiting import until

from deploy.engine import Scripted
from feedback.events import FeedbackGiven, FeedbackText, SubjectErased, new_id
from feedback.tokens import Claims


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with serve(tmp_path_factory.mktemp("world")) as world:
        yield world


@pytest.fixture
def world(running: World) -> World:
    return running.fresh()


def token_of(reply: httpx2.Response) -> str:
    token: str = reply.json()["plaudit"]["token"]
    assert reply.headers["plaudit-feedback-token"] == token
    return token


def given(world: World) -> list[FeedbackGiven]:
    return [event for event in world.events() if isinstance(event, FeedbackGiven)]


def test_a_rating_is_on_disk_when_it_is_acknowledged(world: World) -> None:
    token = token_of(world.chat("hi", user="ann", cohorts=["simulated"]))
    reply = world.feedback(token, {"kind": "rating", "value": "down", "reasons": ["too_long"], "comment": "ramble"})
    told = reply.json()
    (event,) = given(world)
    assert (told["feedback_id"], told["version"], told["durable"]) == (event.event_id, event.stamp, "local")
    assert told["state"] == {
        "rating": "down",
        "choice": None,
        "reasons": ["too_long"],
        "comment": "ramble",
        "correction": None,
        "signal": None,
    }
    assert (event.rater, event.source, event.target) == (world.started()[0].subject, "simulated", world.started()[0].interaction_id)
    assert event.sealed and world.stores.subjects.open(event.sealed, FeedbackText).comment == "ramble"


def test_rating_again_changes_it_and_clear_takes_it_back(world: World) -> None:
    token = token_of(world.chat("hi"))
    first = world.feedback(token, {"kind": "rating", "value": "up"}).json()
    second = world.feedback(token, {"kind": "rating", "value": "down", "version": first["version"]}).json()
    assert second["version"] > first["version"]
    assert world.state(token).json()["state"]["rating"] == "down"
    cleared = world.feedback(token, {"kind": "clear", "slot": "rating"}).json()
    assert cleared["state"]["rating"] is None
    assert world.state(token).json()["state"]["rating"] is None
    assert world.state(token).json()["became"] == "nothing_said"


def test_saying_the_same_again_changes_nothing(world: World) -> None:
    token = token_of(world.chat("hi"))
    body = {"kind": "rating", "value": "up", "comment": "nice"}
    first, again = world.feedback(token, body).json(), world.feedback(token, body).json()
    assert first["feedback_id"] == again["feedback_id"] and len(given(world)) == 1
    other = world.feedback(token, {**body, "comment": "very nice"}).json()
    assert other["feedback_id"] != first["feedback_id"]


def test_an_idempotency_key(world: World) -> None:
    token = token_of(world.chat("hi"))
    up, down = {"kind": "rating", "value": "up"}, {"kind": "rating", "value": "down"}
    key = {"Idempotency-Key": "one"}
    ids: list[str] = []

    def send() -> None:
        ids.append(world.feedback(token, up, **key).json()["feedback_id"])

    threads = [threading.Thread(target=send) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ids) == 8 and len(set(ids)) == 1 and len(given(world)) == 1
    for other in (down, {"kind": "comment", "comment": "nice"}):
        refused = world.feedback(token, other, **key)
        assert refused.status_code == 422 and refused.json()["error"]["code"] == "idempotency_mismatch"
    assert world.feedback(token, up, **{"Idempotency-Key": "x" * 256}).status_code == 400


def test_rating_while_the_answer_streams(tmp_path: Path) -> None:
    with serve(tmp_path, engine=Scripted(lambda name, messages: "word " * 60, token_s=0.01)) as world, world.client() as client:
        body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "stream": True}
        with client.stream("POST", "/v1/chat/completions", json=body) as reply:
            token = reply.headers["plaudit-feedback-token"]
            assert world.feedback(token, {"kind": "rating", "value": "up"}).status_code == 200
            assert world.finished() == []
            assert world.state(token).json()["became"] == "waiting_for_answer"
            events = sse(reply.read().decode())
        assert events[-1] == "[DONE]"
        assert world.state(token).json()["became"] == "counts"


@pytest.mark.parametrize(
    ("body", "field", "said"),
    [
        ({"kind": "love"}, "kind", "rating"),
        ({"kind": "rating"}, "value", "up, down"),
        ({"kind": "rating", "value": "meh"}, "value", "meh"),
        ({"kind": "rating", "value": "up", "stars": 5}, "stars", "not supported"),
        ({"kind": "rating", "value": "up", "reasons": ["NO GOOD"]}, "reasons.0", "NO GOOD"),
        ({"kind": "rating", "value": "up", "reasons": ["a"] * 11}, "reasons", "10"),
        ({"kind": "rating", "value": True}, "value", "true"),
        ({"kind": "rating", "value": "up", "version": -1}, "version", "-1"),
        ({"kind": "rating", "value": "up", "version": 2**62}, "version", "ahead"),
        ({"kind": "comment"}, "comment", "missing"),
        ({"kind": "comment", "comment": ""}, "comment", "at least 1"),
        ({"kind": "comment", "comment": "x" * 4001}, "comment", "4000"),
        ({"kind": "correction", "correction": "x" * (32 * 1024 + 1)}, "correction", "32768"),
        ({"kind": "correction", "comment": "x"}, "comment", "does not belong"),
        ({"kind": "signal", "value": "sneezed"}, "value", "sneezed"),
        ({"kind": "clear"}, "slot", "missing"),
        ({"kind": "clear", "slot": "mood"}, "slot", "mood"),
        ({"kind": "clear", "slot": "rating", "value": "up"}, "value", "does not belong"),
        ([], None, "list"),
    ],
)
def test_what_is_refused_names_field_and_value(world: World, body: object, field: str | None, said: str) -> None:
    token = token_of(world.chat("hi"))
    reply = world.feedback(token, body)
    error = reply.json()["error"]
    assert (reply.status_code, error["param"]) == (400, field)
    assert said in error["message"] or field is None
    assert given(world) == []


def test_an_interaction_id_must_be_the_tokens(world: World) -> None:
    receipt = world.chat("hi").json()["plaudit"]
    up = {"kind": "rating", "value": "up"}
    assert world.feedback(receipt["token"], up | {"interaction_id": receipt["interaction_id"]}).status_code == 200
    other = world.feedback(receipt["token"], up | {"interaction_id": "another"})
    assert other.status_code == 400 and other.json()["error"]["param"] == "interaction_id" and len(given(world)) == 1


def test_an_answer_is_not_chosen_and_a_comparison_not_rated(world: World) -> None:
    answer = token_of(world.chat("hi"))
    reply = world.feedback(answer, {"kind": "choice", "value": "a"})
    assert reply.status_code == 403 and "choice" in reply.json()["error"]["message"]
    assert world.feedback(answer, {"kind": "clear", "slot": "choice"}).status_code == 403
    pair = world.chat("hi", compare=True).json()["plaudit"]
    assert world.feedback(pair["token"], {"kind": "rating", "value": "up"}).status_code == 403
    assert world.feedback(pair["interactions"][1]["token"], {"kind": "rating", "value": "up"}).status_code == 200
    for value in ("a", "b", "tie", "both_bad"):
        assert world.feedback(pair["token"], {"kind": "choice", "value": value}).json()["state"]["choice"] == value


def test_tokens_that_are_not_ours(world: World, tmp_path: Path) -> None:
    token = token_of(world.chat("hi"))
    up = {"kind": "rating", "value": "up"}
    with serve(tmp_path / "other") as other:
        foreign = token_of(other.chat("hi"))
    tries: list[Any] = [token[:-2], token[:-1] + ("A" if token[-1] != "A" else "B"), token + "=", "!" + token, "-", foreign, "x" * 5000]
    for bad in tries:
        assert world.feedback(bad, up).status_code == 401, bad
    with httpx2.Client(base_url=world.url) as client:
        assert client.post("/v1/feedback", json=up).status_code == 401
        assert client.get("/v1/feedback", headers={"Authorization": "Basic xyz"}).status_code == 401
    assert given(world) == []


def test_expired_and_foreign_tenant(world: World) -> None:
    claims = Claims(target=new_id(), target_kind="interaction", interactions=("x",), subject="s_1", actions=("rating",), expires=1)
    assert world.feedback(world.stores.tokens.mint(claims), {"kind": "rating", "value": "up"}).status_code == 410
    foreign = claims.model_copy(update={"tenant": "acme", "expires": 2**40})
    assert world.feedback(world.stores.tokens.mint(foreign), {"kind": "rating", "value": "up"}).status_code == 401


def test_an_erased_answer_is_gone(world: World) -> None:
    token = token_of(world.chat("hi", user="leaver"))
    world.feedback(token, {"kind": "rating", "value": "up"})
    subject = world.started()[0].subject
    world.stores.subjects.erase(subject)
    asyncio.run(world.stores.log.append([SubjectErased(event_id=new_id(), subject=subject)]))
    assert world.feedback(token, {"kind": "rating", "value": "down"}).status_code == 410
    assert world.state(token).status_code == 410


def test_an_api_key_rates_by_interaction(world: World) -> None:
    interaction = world.chat("hi", user="ann").json()["plaudit"]["interaction_id"]
    with world.client() as client:
        up = {"kind": "rating", "value": "up"}
        assert client.post("/v1/feedback", json={**up, "interaction_id": interaction}).json()["state"]["rating"] == "up"
        assert client.get("/v1/feedback", params={"interaction_id": interaction}).json()["state"]["rating"] == "up"
        assert client.post("/v1/feedback", json=up).json()["error"]["param"] == "interaction_id"
        assert client.post("/v1/feedback", json={**up, "interaction_id": new_id()}).status_code == 404
    assert given(world)[0].rater == world.started()[0].subject


def test_an_api_key_rates_what_its_owner_asked_for(world: World) -> None:
    interaction = world.chat("hi", user="ann").json()["plaudit"]["interaction_id"]
    up = {"kind": "rating", "value": "up", "interaction_id": interaction}
    codes = {}
    for owner in ("tests", "another app"):
        _, secret = world.stores.api_keys.create(owner, ("feedback",))
        codes[owner] = world.http.post("/v1/feedback", json=up, headers={"Authorization": f"Bearer {secret}"}).status_code
    assert codes == {"tests": 200, "another app": 404}


def test_scopes(world: World) -> None:
    _, chat_only = world.stores.api_keys.create("app", ("chat",))
    _, other = world.stores.api_keys.create("ops", ("audit",))
    with httpx2.Client(base_url=world.url) as client:
        body = {"kind": "rating", "value": "up", "interaction_id": new_id()}
        assert client.post("/v1/feedback", json=body, headers={"Authorization": f"Bearer {chat_only}"}).status_code == 403
        asked = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
        reply = client.post("/v1/chat/completions", json=asked, headers={"Authorization": f"Bearer {other}"})
        assert reply.status_code == 403 and "chat" in reply.json()["error"]["message"]
        assert client.post("/v1/chat/completions", json=asked).status_code == 401
    until(lambda: world.events() == [])
