"""The chat route: what is answered, what is recorded, and in which order."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import socket
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from serving_world import MODEL, World, echo, said, serve, sse
from waiting import until

from deploy.engine import Scripted
from feedback.errors import EngineRefused, NotDurable
from feedback.events import Event, FeedbackGiven, FinishedText, Sealed, StartedText
from serving.config import RecordSettings, ServerSettings


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with serve(tmp_path_factory.mktemp("world")) as world:
        yield world


@pytest.fixture
def world(running: World) -> World:
    return running.fresh()


def openai_client(world: World) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{world.url}/v1", api_key=world.secret, max_retries=0)


def test_the_openai_client_works_unchanged(world: World) -> None:
    with openai_client(world) as client:
        assert [model.id for model in client.models.list()] == [client.models.retrieve(MODEL).id] == [MODEL]
        reply = client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "how are you"}])
        assert reply.choices[0].message.content == "old heard how are you"
        assert reply.choices[0].finish_reason == "stop"
        # Prompt: "how are you" is 3 words; answer: "old heard how are you" is 5.
        assert reply.usage and (reply.usage.prompt_tokens, reply.usage.completion_tokens, reply.usage.total_tokens) == (3, 5, 8)


def test_the_readme_s_first_chat_and_rating(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = (Path(__file__).resolve().parents[2] / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    monkeypatch.setenv("KEY", world.secret)
    scope: dict[str, Any] = {}
    exec(code.replace("http://127.0.0.1:8000", world.url), scope)
    scope["client"].close()
    (given,) = [event for event in world.events() if isinstance(event, FeedbackGiven)]
    (asked,) = world.started()
    assert (given.target, given.value, given.rater) == (asked.interaction_id, "up", asked.subject)


def test_the_openai_client_streams(world: World) -> None:
    with openai_client(world) as client:
        stream = client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "one two"}], stream=True, stream_options={"include_usage": True}
        )
        chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "old heard one two"
    assert len(chunks) >= 6  # role, four words, finish: it did not come in one piece
    assert {chunk.model for chunk in chunks} == {MODEL}
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 4


def test_the_openai_client_sees_our_errors_as_its_own(world: World) -> None:
    with openai_client(world) as client:
        with pytest.raises(openai.NotFoundError, match="gpt-4"):
            client.chat.completions.create(model="gpt-4", messages=[{"role": "user", "content": "hi"}])
        for name in ("gpt-4", "org/gpt-4"):
            with pytest.raises(openai.NotFoundError, match=f"model: '{name}' is not served here") as unknown:
                client.models.retrieve(name)
            assert unknown.value.param == "model"
        with pytest.raises(openai.BadRequestError, match="best_of") as caught:
            client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "hi"}], extra_body={"best_of": 2})
        assert caught.value.param == "best_of"
        with pytest.raises(openai.AuthenticationError):
            client.with_options(api_key="pl_wrong").models.list()
        with pytest.raises(openai.AuthenticationError):
            client.with_options(api_key="pl_wrong").models.retrieve(MODEL)


def test_what_is_recorded(world: World) -> None:
    reply = world.chat("hi", user="ann", cohorts=["brief", "simulated"], metadata={"page": "7"}, temperature=0.2)
    (started,), (finished,) = world.started(), world.finished()
    assert reply.json()["plaudit"]["interaction_id"] == started.interaction_id == finished.interaction_id
    assert (started.subject_kind, started.cohorts, started.source, started.arm) == ("named", ("brief", "simulated"), "simulated", "stable")
    assert started.subject == world.stores.subjects.pseudonym("default", "ann")
    assert started.sampling == {"temperature": 0.2, "max_tokens": 64}
    assert (started.adapter, started.model, started.propensity) == ("a" * 64, MODEL, 1.0)
    assert started.sealed and finished.sealed
    asked = world.stores.subjects.open(started.sealed, StartedText)
    assert asked.messages == [{"role": "user", "content": "hi"}] and asked.metadata == {"page": "7"}
    assert world.stores.subjects.open(finished.sealed, FinishedText).answer == "old heard hi"
    assert finished.finish_reason == "stop" and finished.completion_tokens == 3
    assert started.stamp < finished.stamp


def test_nothing_a_person_wrote_lies_open_on_the_disk(world: World) -> None:
    world.chat("zanzibar-secret", user="ann-lee")
    for path in world.data_dir.rglob("*"):
        if path.is_file():
            assert b"zanzibar" not in path.read_bytes() and b"ann-lee" not in path.read_bytes()


def test_a_person_without_a_name_is_somebody_new_each_time(world: World) -> None:
    world.chat("hi")
    world.chat("hi")
    first, second = world.started()
    assert first.subject_kind == second.subject_kind == "single"
    assert first.subject != second.subject


def test_defaults_of_the_policy(tmp_path: Path) -> None:
    asked: list[Any] = []

    def answer(name: str, messages: Sequence[Any]) -> str:
        asked.append(list(messages))
        return "one two three four"

    with serve(tmp_path, engine=Scripted(answer), system_prompt="Be kind.", max_tokens=2) as world:
        reply = world.chat("hi").json()
        assert reply["choices"][0]["finish_reason"] == "length"
        assert reply["choices"][0]["message"]["content"] == "one two"
        body = {"model": MODEL, "messages": [{"role": "system", "content": "Mine."}, {"role": "user", "content": "hi"}]}
        with world.client() as client:
            client.post("/v1/chat/completions", json=body)
    assert asked[0] == [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "hi"}]
    assert asked[1][0] == {"role": "system", "content": "Mine."}


def test_several_choices_are_several_interactions_of_one_arm(world: World) -> None:
    reply = world.chat("hi", n=3).json()
    assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2]
    listed = reply["plaudit"]["interactions"]
    assert len({each["interaction_id"] for each in listed}) == 3 and len({each["token"] for each in listed}) == 3
    assert {event.arm for event in world.started()} == {"stable"}
    assert "comparison_id" not in reply["plaudit"]
    # The prompt counts once (1 word), the answers add up (3 x 3 words).
    assert reply["usage"] == {"prompt_tokens": 1, "completion_tokens": 9, "total_tokens": 10}


def test_store_false_leaves_no_trace(world: World) -> None:
    reply = world.chat("hi", store=False)
    assert reply.json()["choices"][0]["message"]["content"] == "old heard hi"
    assert "plaudit" not in reply.json() and "plaudit-feedback-token" not in reply.headers
    assert world.events() == []


def hold(world: World, monkeypatch: pytest.MonkeyPatch, which: str) -> threading.Event:
    """Commits of this type of event wait until the returned event is set."""
    gate = threading.Event()
    real = world.stores.log.append

    async def append(events: Sequence[Event]) -> list[Event]:
        if any(event.type == which for event in events):
            while not gate.is_set():
                await asyncio.sleep(0.005)
        return await real(events)

    monkeypatch.setattr(world.stores.log, "append", append)
    return gate


def ask_raw(world: World, text: str = "hi") -> socket.socket:
    """A streamed chat over a bare socket, so that every byte is seen when it comes."""
    body = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": text}], "stream": True})
    host, port = world.url.removeprefix("http://").split(":")
    link = socket.create_connection((host, int(port)), timeout=5)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {world.secret}\r\nContent-Length: {len(body)}\r\n\r\n"
    link.sendall(head.encode() + body.encode())
    return link


def silent(link: socket.socket, for_s: float = 0.3) -> bool:
    link.settimeout(for_s)
    try:
        return link.recv(1) == b""
    except TimeoutError:
        return True
    finally:
        link.settimeout(5)


def read_until(link: socket.socket, mark: bytes) -> bytes:
    got = b""
    while mark not in got:
        part = link.recv(65536)
        assert part, f"closed before {mark!r}: {got!r}"
        got += part
    return got


def test_no_byte_leaves_before_the_beginning_is_committed(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = hold(world, monkeypatch, "interaction.started")
    link = ask_raw(world)
    assert silent(link)  # the scripted engine has long finished
    assert world.started() == []
    gate.set()
    got = read_until(link, b"[DONE]")
    assert got.startswith(b"HTTP/1.1 200") and b"plaudit-feedback-token" in got.lower()
    link.close()


def test_done_leaves_after_the_end_is_committed(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = hold(world, monkeypatch, "interaction.finished")
    link = ask_raw(world)
    got = read_until(link, b"hi")
    link.settimeout(0.3)
    with pytest.raises(TimeoutError):
        while True:
            got += link.recv(65536)
    assert b"[DONE]" not in got and world.finished() == []
    link.settimeout(5)
    gate.set()
    read_until(link, b"[DONE]")
    assert len(world.finished()) == 1
    link.close()


def break_log(world: World, monkeypatch: pytest.MonkeyPatch, which: str) -> None:
    real = world.stores.log.append

    async def append(events: Sequence[Event]) -> list[Event]:
        if any(event.type == which for event in events):
            raise NotDurable("the disk is full", retry_after_s=7)
        return await real(events)

    monkeypatch.setattr(world.stores.log, "append", append)


def test_a_full_disk_refuses_the_chat(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    break_log(world, monkeypatch, "interaction.started")
    reply = world.chat("hi", stream=True)
    assert (reply.status_code, reply.headers["retry-after"], reply.json()["error"]["code"]) == (503, "7", "not_durable")
    until(lambda: world.engine.streams_open == 0)


def test_a_full_disk_at_the_end_is_said_instead_of_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Slow words: an answer that ended before its beginning was committed would be refused as a whole.
    with serve(tmp_path, engine=Scripted(echo, token_s=0.3)) as world:
        break_log(world, monkeypatch, "interaction.finished")
        events = sse(world.chat("hi", stream=True).text)
        assert said(events[:-1]) == "old heard hi"
        assert events[-1]["error"]["code"] == "not_durable"
        assert world.chat("hi").status_code == 503


def test_best_effort_answers_unrecorded_without_a_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve(tmp_path, record=RecordSettings(recording="best_effort")) as world:
        break_log(world, monkeypatch, "interaction.started")
        reply = world.chat("hi")
        assert reply.json()["choices"][0]["message"]["content"] == "old heard hi"
        assert reply.json()["plaudit"] == {"recorded": False}
        assert reply.headers["plaudit-recorded"] == "false" and "plaudit-feedback-token" not in reply.headers
        assert world.events() == []


def test_best_effort_answers_a_new_person_whose_key_cannot_be_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve(tmp_path, record=RecordSettings(recording="best_effort")) as world:

        def seal(*_: Any) -> Sealed:
            raise NotDurable("a subject's key could not be stored: database or disk is full", retry_after_s=2)

        monkeypatch.setattr(world.stores.subjects, "seal", seal)
        assert world.chat("hi", user="somebody new").json()["plaudit"] == {"recorded": False}


def test_a_client_that_leaves_ends_the_generation_and_is_recorded(tmp_path: Path) -> None:
    with serve(tmp_path, engine=Scripted(lambda name, messages: "word " * 10_000, token_s=0.01), max_tokens=512) as world:
        link = ask_raw(world)
        read_until(link, b'" word"')  # the second one
        assert world.engine.streams_open == 1
        link.close()
        until(lambda: world.engine.streams_open == 0, within_s=1.5)
        until(lambda: len(world.finished()) == 1)
        (finished,) = world.finished()
        assert finished.finish_reason == "client_closed"
        assert finished.sealed and world.stores.subjects.open(finished.sealed, FinishedText).answer.startswith("word word")
        assert world.app.state.gateway.streams == 0


def test_a_client_that_leaves_an_unstreamed_answer_ends_the_generation(tmp_path: Path) -> None:
    with serve(tmp_path, engine=Scripted(lambda name, messages: "word " * 10_000, token_s=0.01), max_tokens=512) as world:
        with pytest.raises(httpx2.ReadTimeout), world.client() as client:
            body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
            client.post("/v1/chat/completions", json=body, timeout=0.3)
        until(lambda: world.engine.streams_open == 0, within_s=1.5)
        until(lambda: [event.finish_reason for event in world.finished()] == ["client_closed"])


def test_an_engine_that_is_away(world: World) -> None:
    world.engine.up = False
    reply = world.chat("hi", stream=True)
    assert reply.status_code == 503 and reply.headers["retry-after"] == "2"
    assert reply.json()["error"]["code"] == "engine_unavailable"
    assert [event.finish_reason for event in world.finished()] == ["error"]
    world.engine.up = True
    assert world.chat("hi").status_code == 200


def test_an_engine_that_breaks_off_says_so_in_the_stream(tmp_path: Path) -> None:
    engine = Scripted(lambda name, messages: "word " * 200, token_s=0.01)
    with serve(tmp_path, engine=engine, max_tokens=512) as world:
        link = ask_raw(world)
        read_until(link, b"word")
        engine.up = False
        got = read_until(link, b'"error"')
        assert b"[DONE]" not in got
        until(lambda: [event.finish_reason for event in world.finished()] == ["error"])
        link.close()


def test_no_reply_names_the_adapter(world: World) -> None:
    world.engine.loaded.clear()
    reply = world.chat("hi")
    assert reply.status_code == 503
    assert "a-" + "a" * 16 not in reply.text


def test_a_prompt_that_is_too_long_is_named_as_such(tmp_path: Path) -> None:
    def refuse(name: str, messages: Sequence[Any]) -> str:
        raise EngineRefused("This model's maximum context length is 512 tokens. However, your request has 900 input tokens.")

    with serve(tmp_path, engine=Scripted(refuse)) as world:
        error = world.chat("hi").json()["error"]
    assert (error["param"], error["code"]) == ("messages", "context_length_exceeded")
    assert "512" in error["message"] and "900" in error["message"]


def test_busy(tmp_path: Path) -> None:
    engine = Scripted(lambda name, messages: "word " * 500, token_s=0.01)
    with serve(tmp_path, engine=engine, server=ServerSettings(max_streams=1), max_tokens=512) as world:
        link = ask_raw(world)
        read_until(link, b"word")
        reply = world.chat("hi")
        assert reply.status_code == 503 and reply.headers["retry-after"] == "1" and "max_streams" in reply.json()["error"]["message"]
        link.close()
        until(lambda: world.app.state.gateway.streams == 0)


def test_stale_routes_serve_stable_only(world: World) -> None:
    world.routes.with_canary(weight=0.5)
    until(lambda: world.app.state.gateway.route.current().version == 2)
    voices = {world.chat("hi", user=f"u{n}").json()["choices"][0]["message"]["content"] for n in range(30)}
    assert voices == {"old heard hi", "new heard hi"}
    world.routes.broken = True
    until(lambda: not world.app.state.gateway.route.fresh)
    assert {world.chat("hi", user=f"u{n}").json()["choices"][0]["message"]["content"] for n in range(30)} == {"old heard hi"}
    with world.client() as client:
        ready = client.get("/readyz")
    assert ready.status_code == 503 and "database is away" in ready.json()["missing"]["routing"]


def test_people_stay_with_their_adapter(world: World) -> None:
    world.routes.with_canary(weight=0.5)
    until(lambda: world.app.state.gateway.route.current().version == 2)
    for name in ("ann", "bob", "eve"):
        assert len({world.chat("hi", user=name).json()["choices"][0]["message"]["content"] for _ in range(4)}) == 1
    assert {event.propensity for event in world.started()} == {0.5}
    assert {event.rollout for event in world.started()} == {"rollout-7"}


def test_a_disk_without_room_is_not_ready(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = 4 * world.app.state.gateway.settings.server.max_body_bytes
    usage = shutil.disk_usage(world.data_dir)
    for free, status in ((needed - 1, 503), (needed, 200)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: usage._replace(free=free))
        ready = world.http.get("/readyz")
        assert ready.status_code == status and ("disk" in ready.json()["missing"]) == (status == 503)


def test_health_and_metrics(world: World) -> None:
    world.chat("hi")
    with world.client() as client:
        assert client.get("/livez").text == "ok\n"
        assert client.get("/readyz").json() == {"ready": True, "missing": {}}
        measured = client.get("/metrics").text
        assert 'plaudit_answers_total{arm="stable",finish="stop"}' in measured
        world.engine.up = False
        assert client.get("/readyz").json()["missing"] == {"engine": "the model server does not answer"}
        assert client.get("/nowhere").json()["error"]["code"] == "not_found"
        assert client.get("/v1/chat/completions").status_code == 405
