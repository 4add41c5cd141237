"""Limits at the gateway: 429 with everything a client needs to come back, and a repetition that is never refused."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx2
import pytest
from serving_world import MODEL, World, serve
from waiting import until

from deploy.engine import Scripted
from feedback.config import LimitSettings
from feedback.events import FeedbackGiven

UP, DOWN = {"kind": "rating", "value": "up"}, {"kind": "rating", "value": "down"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    settings = LimitSettings(chat_per_minute=0, streams_per_key=2, streams_per_user=1, feedback_per_minute=4, changes=3)
    slow = Scripted(lambda name, messages: "word " * 40 if "slowly" in str(messages) else "hi", token_s=0.02)
    with serve(tmp_path_factory.mktemp("world"), engine=slow, limits=settings) as world:
        yield world


def given(world: World, target: str) -> list[FeedbackGiven]:
    return [event for event in world.events() if isinstance(event, FeedbackGiven) and event.target == target]


def test_too_many_changes_are_refused_and_repetitions_are_not(world: World) -> None:
    receipt = world.chat(user="ann").json()["plaudit"]
    key = {"Idempotency-Key": "one"}
    first = world.feedback(receipt["token"], UP, **key).json()
    assert [world.feedback(receipt["token"], body).status_code for body in (DOWN, UP)] == [200, 200]
    refused = world.feedback(receipt["token"], DOWN)
    error = refused.json()["error"]
    assert (refused.status_code, error["type"], error["code"]) == (429, "rate_limit_error", "rate_limit_exceeded")
    assert error["param"] == "limits.changes" and "3 within 30 days" in error["message"]
    assert refused.headers["retry-after"] == refused.headers["ratelimit-reset"] == str(30 * 24 * 3600)
    assert (refused.headers["ratelimit-limit"], refused.headers["ratelimit-remaining"]) == ("3", "0")
    again = world.feedback(receipt["token"], UP, **key)
    assert again.status_code == 200 and again.json()["feedback_id"] == first["feedback_id"]
    assert world.feedback(receipt["token"], UP).status_code == 200, "it stands already, so it is no change"
    assert world.state(receipt["token"]).json()["state"]["rating"] == "up"
    assert [event.value for event in given(world, receipt["interaction_id"])] == ["up", "down", "up"]


def test_a_person_is_limited_over_all_answers_and_another_one_is_not(world: World) -> None:
    tokens = [world.chat(user="ben").json()["plaudit"]["token"] for _ in range(5)]
    codes = [world.feedback(token, UP).status_code for token in tokens]
    assert codes == [200] * 4 + [429]
    other = world.chat(user="cyd").json()["plaudit"]["token"]
    assert world.feedback(other, UP).status_code == 200


def test_the_same_rating_many_times_at_once_is_one_change(world: World) -> None:
    for headers in ({}, {"Idempotency-Key": "same"}):
        receipt = world.chat(user=f"dan {headers}").json()["plaudit"]
        with ThreadPoolExecutor(20) as pool:
            replies = list(pool.map(lambda _: world.feedback(receipt["token"], UP, **headers), range(100)))  # noqa: B023  # it ends here
        assert {reply.status_code for reply in replies} == {200}
        assert len({reply.json()["feedback_id"] for reply in replies}) == 1
        assert len(given(world, receipt["interaction_id"])) == 1
    until(lambda: not world.app.state.gateway.speaking)


def test_streams_of_one_person_and_of_one_key_end_before_others_begin(world: World) -> None:
    headers = {"Authorization": f"Bearer {world.secret}"}

    def ask(user: str, client: httpx2.Client) -> httpx2.Response:
        body = {"model": MODEL, "messages": [{"role": "user", "content": "slowly"}], "stream": True, "user": user}
        return client.post("/v1/chat/completions", json=body, headers=headers)

    with httpx2.Client(base_url=world.url, timeout=10) as client, ThreadPoolExecutor(2) as pool:
        running = [pool.submit(ask, user, client) for user in ("eve", "fay")]
        until(lambda: len(world.app.state.gateway.in_flight._open) == 3)  # the key and two people
        by_person, by_key = world.chat(user="eve"), world.chat(user="gus")
        assert [by_person.status_code, by_key.status_code] == [429, 429]
        assert by_key.json()["error"]["param"] == "limits.streams_per_key" and by_key.headers["retry-after"] == "1"
        assert [each.result().status_code for each in running] == [200, 200]
    until(lambda: not world.app.state.gateway.in_flight._open)
    assert world.chat(user="eve").status_code == 200


def test_a_person_at_their_limit_hears_which_one(tmp_path_factory: pytest.TempPathFactory) -> None:
    with serve(tmp_path_factory.mktemp("chat"), limits=LimitSettings(chat_per_minute=2)) as world:
        assert [world.chat().status_code for _ in range(3)] == [200, 200, 429]
        assert "limits.chat_per_minute" in world.chat().json()["error"]["message"]
