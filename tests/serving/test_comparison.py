"""Two answers side by side: who meets whom, in lock-step, and without a trace of who is who."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from serving_world import CANARY, MODEL, STABLE, World, said, serve, sse
from waiting import until

from deploy.engine import Scripted
from deploy.routing import RoutingTable, assign
from feedback.errors import EngineRefused
from serving.comparison import lockstep, seats

TABLE = RoutingTable(version=1, stable=STABLE, canary=CANARY, rollout="rollout-7", weight=0.3, salt="s")


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with serve(tmp_path_factory.mktemp("world")) as world:
        yield world


@pytest.fixture
def world(running: World) -> World:
    return running.fresh()


class Script:
    """Says its lines, each after a delay counted in turns of the event loop."""

    def __init__(self, lines: Sequence[tuple[str, int]]) -> None:
        self.lines = list(lines)

    async def next(self) -> dict[str, Any] | None:
        if not self.lines:
            return None
        line, delay = self.lines.pop(0)
        for _ in range(delay):
            await asyncio.sleep(0)
        return {"line": line}


LINES = st.lists(st.tuples(st.text(max_size=5), st.integers(0, 5)), max_size=8)


@given(st.lists(LINES, min_size=1, max_size=4))
def test_lockstep_loses_nothing_and_waits_for_the_slowest(scripts: list[list[tuple[str, int]]]) -> None:
    async def rounds() -> list[list[tuple[int, str]]]:
        talkers = [Script(lines) for lines in scripts]
        return [[(talkers.index(talker), choice["line"]) for talker, choice in spoken] async for spoken in lockstep(talkers)]

    got = asyncio.run(rounds())
    for index, lines in enumerate(scripts):
        assert [line for spoken in got for who, line in spoken if who == index] == [line for line, _ in lines]
    # Round k holds exactly those who have a k-th line, in their order: when a line comes says nothing about whose it is.
    for k, spoken in enumerate(got):
        assert [who for who, _ in spoken] == [index for index, lines in enumerate(scripts) if len(lines) > k]
    assert len(got) == max(len(lines) for lines in scripts)


@given(st.integers(0, 10_000), st.integers(1, 4))
def test_seats_of_a_plain_request_are_the_persons_arm(number: int, choices: int) -> None:
    mine = assign(f"s_{number}", TABLE)
    got = seats(f"s_{number}", TABLE, choices, False, random.Random(0))
    assert [(seat.arm, seat.name, seat.propensity, seat.side) for seat in got] == [(mine.arm, mine.name, mine.propensity, None)] * choices


@given(st.integers(0, 10_000), st.integers())
def test_seats_of_a_comparison(number: int, seed: int) -> None:
    mine = assign(f"s_{number}", TABLE)
    pair = seats(f"s_{number}", TABLE, 2, True, random.Random(seed))
    assert [seat.side for seat in pair] == ["a", "b"]
    if mine.arm == "stable":
        assert {seat.name for seat in pair} == {STABLE.name}
    else:
        assert {seat.ref.adapter for seat in pair} == {STABLE.adapter, CANARY.adapter}
        assert {seat.arm for seat in pair} == {"baseline", "canary"}


def test_sides_are_drawn_at_random() -> None:
    someone = next(f"s_{n}" for n in range(1000) if assign(f"s_{n}", TABLE).arm == "canary")
    chance = random.Random(1)
    first = [seats(someone, TABLE, 2, True, chance)[0].arm for _ in range(2000)]
    # Of 2000 fair draws the share strays from a half by more than 4 standard deviations (0.045) once in 16,000 times.
    assert abs(first.count("canary") / 2000 - 0.5) < 0.045


def test_a_comparison_in_one_stream(world: World) -> None:
    reply = world.chat("hi there", compare=True, stream=True)
    events = sse(reply.text)
    receipt = events[0]["plaudit"]
    assert said(events, 0) == said(events, 1) == "old heard hi there"
    order = [choice["index"] for event in events[:-1] for choice in event["choices"]]
    assert order == [0, 1] * (len(order) // 2)
    one, two = world.started()
    assert (one.side, two.side) == ("a", "b") and one.comparison_id == two.comparison_id == receipt["comparison_id"]
    assert [each["interaction_id"] for each in receipt["interactions"]] == [one.interaction_id, two.interaction_id]
    assert reply.headers["plaudit-feedback-token"] == receipt["token"]
    assert world.feedback(receipt["token"], {"kind": "choice", "value": "b"}).json()["state"]["choice"] == "b"


def test_a_comparison_with_the_openai_client(world: World) -> None:
    with openai.OpenAI(base_url=f"{world.url}/v1", api_key=world.secret, max_retries=0) as client:
        ask: Any = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "extra_body": {"compare": True}}
        reply = client.chat.completions.create(**ask)
        assert [choice.message.content for choice in reply.choices] == ["old heard hi"] * 2
        chunks = list(client.chat.completions.create(**ask, stream=True))
        assert {choice.index for chunk in chunks for choice in chunk.choices} == {0, 1}


def pair_people(world: World, count: int) -> list[str]:
    """People who compare stable with the canary."""
    table = world.routes.table
    names = (f"user{n}" for n in range(10_000))
    chosen = [name for name in names if assign(world.stores.subjects.pseudonym("default", name), table).arm != "stable"]
    return chosen[:count]


def test_what_a_client_gets_does_not_tell_the_sides(world: World) -> None:
    world.routes.with_canary(weight=0.3)
    until(lambda: world.app.state.gateway.route.current().version == 2)
    shapes: dict[str, list[Any]] = {"canary": [], "baseline": []}
    for person in pair_people(world, 6):
        reply = world.chat("hi", compare=True, stream=True, user=person)
        for secret in (STABLE.name, CANARY.name, STABLE.adapter, CANARY.adapter, "canary", "baseline", "rollout-7"):
            assert secret not in reply.text and secret not in str(reply.headers)
        events = sse(reply.text)
        ids = [each["interaction_id"] for each in events[0]["plaudit"]["interactions"]]
        arms = {event.interaction_id: event.arm for event in world.started()}
        for index, each in enumerate(ids):
            mine = [
                json.dumps(choice).replace(f'"index": {index}', "")
                for event in events[:-1]
                for choice in event["choices"]
                if choice["index"] == index
            ]
            shapes[arms[each]].append([text.replace("new", "xxx").replace("old", "xxx") for text in mine])
    # With the words themselves taken out, both sides look the same, byte for byte.
    assert len(shapes["canary"]) == len(shapes["baseline"]) == 6
    assert len({json.dumps(shape) for both in shapes.values() for shape in both}) == 1


def one_fails(name: str, messages: Sequence[Mapping[str, Any]]) -> str:
    if name == CANARY.name:
        raise EngineRefused("out of slots")
    return "all is well"


def test_a_side_that_fails_leaves_one_ordinary_answer(tmp_path: Path) -> None:
    with serve(tmp_path, engine=Scripted(one_fails)) as world:
        world.routes.with_canary(weight=0.5)
        until(lambda: world.app.state.gateway.route.current().version == 2)
        reply = world.chat("hi", compare=True, user="ann").json()
        assert [choice["message"]["content"] for choice in reply["choices"]] == ["all is well"]
        assert set(reply["plaudit"]) == {"interaction_id", "token"}
        survivor = next(event for event in world.started() if event.arm == "baseline")
        assert reply["plaudit"]["interaction_id"] == survivor.interaction_id
        assert sorted(event.finish_reason for event in world.finished()) == ["error", "stop"]
        assert world.feedback(reply["plaudit"]["token"], {"kind": "rating", "value": "up"}).status_code == 200


class BreaksOff(Scripted):
    """The canary's answers end in the middle."""

    async def _chunks(self, body: Any, answers: Any) -> Any:
        count = 0
        async for chunk in super()._chunks(body, answers):
            count += 1
            if body["model"] == CANARY.name and count == 3:
                raise EngineRefused("the worker died")
            yield chunk


@pytest.mark.parametrize("stream", [True, False])
def test_a_side_that_breaks_off_voids_the_comparison(tmp_path: Path, stream: bool) -> None:
    with serve(tmp_path, engine=BreaksOff(lambda name, messages: "one two three four", token_s=0.01)) as world:
        world.routes.with_canary(weight=0.5)
        until(lambda: world.app.state.gateway.route.current().version == 2)
        reply = world.chat("hi", compare=True, user="ann", stream=stream)
        sides = {event.arm: index for index, event in enumerate(world.started())}
        if stream:
            events = sse(reply.text)
            assert said(events, sides["baseline"]) == "one two three four"
            assert events[-2]["plaudit"] == {"comparison": "void", "failed": [sides["canary"]]}
            assert events[-1] == "[DONE]"
        else:
            assert [choice["message"]["content"] for choice in reply.json()["choices"]] == ["one two three four"]
            assert set(reply.json()["plaudit"]) == {"interaction_id", "token"}
