"""People about their own data: whose it is, what becomes of it, and that nobody else can say so."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx2
import pytest
from serving_world import MODEL, World, serve
from waiting import until

from deploy.engine import Scripted
from feedback import audit
from feedback.clock import COUNTER_BITS, wall_ms
from feedback.errors import Gone, NotDurable
from feedback.events import FinishedText, StartedText
from serving.who import COOKIE

UP = {"kind": "rating", "value": "up"}
ERASE, WITHDRAW = "/v1/people/erase", "/v1/people/withdraw"


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with serve(tmp_path_factory.mktemp("world")) as world:
        yield world


@pytest.fixture
def world(running: World) -> World:
    return running.fresh()


def token_of(reply: httpx2.Response) -> str:
    token: str = reply.json()["plaudit"]["token"]
    return token


def asked(world: World, path: str, token: str, **headers: str) -> httpx2.Response:
    return world.http.post(path, headers={"Authorization": f"Feedback {token}", **headers})


def key(world: World, *scopes: Any) -> dict[str, str]:
    return {"Authorization": f"Bearer {world.stores.api_keys.create('support desk', scopes)[1]}"}


def about(world: World, subject: str) -> list[str]:
    return [event.type for event in world.events() if getattr(event, "subject", getattr(event, "rater", None)) == subject]


def test_a_person_erases_themselves_and_may_come_back(world: World) -> None:
    token, other = token_of(world.chat("my secret", user="ann")), token_of(world.chat("hi", user="ben"))
    assert world.feedback(token, UP).status_code == 200
    ann = world.started()[0].subject
    sealed = world.started()[0].sealed
    reply = asked(world, ERASE, token)
    assert reply.status_code == 200
    assert reply.json() == {"erased": True, "complete": True, "snapshots": [], "reward_models": [], "adapters": {}}
    assert about(world, ann) == ["subject.erased"]
    assert sealed is not None
    with pytest.raises(Gone):
        world.stores.subjects.open(sealed, StartedText)
    assert [world.feedback(token, UP).status_code, world.state(token).status_code] == [410, 410]
    assert [asked(world, ERASE, token).status_code, asked(world, WITHDRAW, token).status_code] == [410, 410]
    assert world.feedback(other, UP).status_code == 200
    again = token_of(world.chat("hello again", user="ann"))  # within the same second
    assert world.feedback(again, UP).json()["state"]["rating"] == "up"
    told = [(row["actor"], row["subject"]) for row in audit.read(world.stores.engine) if row["action"] == "subject.erased"]
    assert told == [("the person", ann)]


def test_an_erasure_that_broke_off_is_done_when_the_person_asks_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    token = token_of(world.chat("hi", user="ida"))
    ida = world.started()[0].subject

    def full(*_: object, **__: object) -> int:
        raise NotDurable("the registry's database does not answer: database or disk is full", retry_after_s=2)

    monkeypatch.setattr(world.stores.subjects, "erase", full)
    assert asked(world, ERASE, token).status_code == 503  # say it again
    monkeypatch.undo()
    assert world.stores.subjects.alive(ida)
    assert asked(world, ERASE, token).status_code == 410 and not world.stores.subjects.alive(ida)
    assert [row["actor"] for row in audit.read(world.stores.engine) if row["subject"] == ida] == ["the person"]


def test_a_visitor_of_the_page_speaks_for_their_own_session(world: World) -> None:
    with httpx2.Client(base_url=world.url) as visitor:
        assert visitor.get("/").status_code == 200
        assert visitor.post(ERASE).status_code == 404  # nothing of theirs is here yet
        body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
        token = token_of(visitor.post("/v1/chat/completions", json=body))
        assert visitor.post(ERASE, headers={"Sec-Fetch-Site": "cross-site"}).status_code == 403
        assert visitor.post(ERASE, headers={"Sec-Fetch-Site": "same-origin"}).status_code == 200
        assert world.feedback(token, UP).status_code == 410
        token = token_of(visitor.post("/v1/chat/completions", json=body))
        assert world.feedback(token, UP).status_code == 200
        assert visitor.cookies[COOKIE]


def test_nobody_speaks_for_somebody_else(world: World) -> None:
    token = token_of(world.chat("hi", user="cleo"))
    cleo = world.started()[0].subject
    for path in (ERASE, WITHDRAW):
        named = {"subject": "cleo"}
        headers = {"Authorization": f"Feedback {token}"}
        assert world.http.post(path, json=named, headers=headers).json()["error"]["param"] == "subject"
        own = world.http.post(path, json={"reason": "I, Cleo, ..."}, headers=headers)  # would stay in the audit for ever
        assert (own.status_code, own.json()["error"]["param"]) == (403, "reason")
        assert world.http.post(path, json=named).status_code == 401
        assert world.http.post(path).status_code == 401
        assert world.http.post(path, json=named, headers=key(world, "chat", "feedback", "dataset")).status_code == 403
        assert world.http.post(path, json=named, headers={"Authorization": "Bearer pl_x"}).status_code == 401
        assert asked(world, path, token[:-2] + "xx").status_code == 401
        with httpx2.Client(base_url=world.url, cookies={COOKIE: "x" * 32}) as stranger:
            assert stranger.post(path).status_code == 404 and stranger.post(path, json=named).status_code == 403
    assert "subject.erased" not in about(world, cleo) and "consent.withdrawn" not in about(world, cleo)


def test_an_application_names_somebody(world: World) -> None:
    token = token_of(world.chat("hi", user="dora"))
    desk = key(world, "erase")
    assert world.http.post(ERASE, json={}, headers=desk).json()["error"]["param"] == "subject"
    assert world.http.post(ERASE, json={"subject": "nobody at all"}, headers=desk).status_code == 404
    assert world.http.post(ERASE, json={"who": "dora"}, headers=desk).status_code == 400
    for reason in ("two\nlines", "\x1b[31mred", " ", "x" * 501):
        refused = world.http.post(ERASE, json={"subject": "dora", "reason": reason}, headers=desk)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "reason"), reason
    for _ in range(2):  # again is no error
        assert world.http.post(ERASE, json={"subject": "dora", "reason": "ticket 7"}, headers=desk).status_code == 200
    assert world.feedback(token, UP).status_code == 410
    told = [row for row in audit.read(world.stores.engine) if row["reason"] == "ticket 7"]
    assert [(row["actor"], row["action"]) for row in told] == [("support desk", "subject.erased")]


def test_what_a_person_says_after_withdrawing_is_kept_and_not_counted(world: World) -> None:
    token = token_of(world.chat("hi", user="emil"))
    assert world.feedback(token, UP).status_code == 200
    assert world.state(token).json()["became"] == "counts"
    assert asked(world, WITHDRAW, token).json() == {"withdrawn": True, "snapshots": [], "reward_models": [], "adapters": {}}
    assert world.state(token).json()["became"] == "not_counted"
    assert world.feedback(token, {"kind": "rating", "value": "down"}).json()["state"]["rating"] == "down"


def test_who_returns_while_the_stamps_run_ahead_of_the_clock_may_rate(world: World) -> None:
    ahead = (wall_ms() + 50 * 60_000) << COUNTER_BITS  # as somebody's `version` may say, or after the clock was set back
    assert world.feedback(token_of(world.chat("hi", user="gil")), UP | {"version": ahead}).status_code == 200
    old = token_of(world.chat("hi", user="hal"))
    assert asked(world, ERASE, old).status_code == 200
    for compare in (False, True):
        reply = world.chat("back", user="hal", compare=compare)
        said = {"kind": "choice", "value": "a"} if compare else UP
        assert world.feedback(token_of(reply), said).status_code == 200
    assert [world.feedback(old, UP).status_code, asked(world, ERASE, old).status_code] == [410, 410]
    assert asked(world, ERASE, token_of(world.chat("back", user="hal"))).status_code == 200


def test_an_answer_in_flight_leaves_nothing_under_the_new_key(tmp_path: Path) -> None:
    going, ended = threading.Event(), threading.Event()

    def slow(name: str, messages: Sequence[Mapping[str, Any]]) -> str:
        return "word " * 60 if messages[-1]["content"] == "slow" else "quick"

    with serve(tmp_path, engine=Scripted(slow, token_s=0.02)) as world:
        body = {"model": MODEL, "messages": [{"role": "user", "content": "slow"}], "user": "ann", "stream": True, "max_tokens": 60}
        got: list[str] = []

        def chat() -> None:
            headers = {"Authorization": f"Bearer {world.secret}"}
            with (
                httpx2.Client(base_url=world.url, timeout=30) as client,
                client.stream("POST", "/v1/chat/completions", json=body, headers=headers) as reply,
            ):
                for line in reply.iter_lines():
                    got.append(line)
                    going.set()
            ended.set()

        thread = threading.Thread(target=chat)
        thread.start()
        assert going.wait(10)
        first = world.started()[0]
        assert world.http.post(ERASE, json={"subject": "ann"}, headers=key(world, "erase")).status_code == 200
        assert world.chat("back", user="ann").status_code == 200  # somebody new, while the old answer still streams
        assert not ended.is_set()
        thread.join(30)
        assert "data: [DONE]" in got  # who reads it notices nothing
        until(lambda: not world.app.state.gateway.tasks)
        (finished,) = world.finished()
        assert finished.interaction_id != first.interaction_id and finished.sealed
        assert world.stores.subjects.open(finished.sealed, FinishedText).answer == "quick"


def test_two_at_once_and_one_after_the_other_are_one_erasure(world: World) -> None:
    world.chat("hi", user="fay")
    fay = world.started()[0].subject
    desk, codes = key(world, "erase"), []

    def erase() -> None:
        codes.append(httpx2.post(world.url + ERASE, json={"subject": fay}, headers=desk, timeout=30).status_code)

    threads = [threading.Thread(target=erase) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert codes == [200] * 4 and about(world, fay) == ["subject.erased"]
    assert sum(row["subject"] == fay for row in audit.read(world.stores.engine)) == 1
