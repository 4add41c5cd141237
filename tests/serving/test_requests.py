"""What a chat request may say. Each refusal names the field, what it was and the limit; none leaves a traceback or an event."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx2
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving_world import MODEL, World, said, serve, sse

from deploy.engine import Scripted
from serving.config import ServerSettings
from serving.openai_api import Answer, parse


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with serve(tmp_path_factory.mktemp("world"), server=ServerSettings(allowed_origins=("https://app.example",))) as running:
        yield running


HI = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("body", "field", "told"),
    [
        (b"", None, "JSON"),
        (b"{", None, "JSON"),
        (b"\xff\xfe", None, "JSON"),
        (b"[" * 5000, None, "JSON"),
        (b"null", None, ""),
        (b'"hi"', None, ""),
        ({}, "model", "required"),
        ({"model": MODEL}, "messages", "required"),
        ({"model": MODEL, "messages": []}, "messages", "at least 1"),
        ({"model": MODEL, "messages": HI * 257}, "messages", "256"),
        ({"model": MODEL, "messages": "hi"}, "messages", "hi"),
        ({"model": MODEL, "messages": [{"role": "wizard", "content": "hi"}]}, "messages.0.role", "wizard"),
        ({"model": MODEL, "messages": [{"role": "user"}]}, "messages.0", "content is missing"),
        ({"model": MODEL, "messages": [{"role": "user", "content": 5}]}, "messages.0.content", "5"),
        ({"model": MODEL, "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, None, ""),
        ({"model": MODEL, "messages": HI, "frobnicate": 1}, "frobnicate", "not supported"),
        ({"model": MODEL, "messages": HI, "n": 5}, "n", "4"),
        ({"model": MODEL, "messages": HI, "n": 0}, "n", "1"),
        ({"model": MODEL, "messages": HI, "n": True}, "n", "true"),
        ({"model": MODEL, "messages": HI, "n": "1"}, "n", "integer"),
        ({"model": MODEL, "messages": HI, "n": 3, "compare": True}, "n", "compare"),
        ({"model": MODEL, "messages": HI, "store": False, "compare": True}, "store", "compare"),
        ({"model": MODEL, "messages": HI, "temperature": 2.5}, "temperature", "2"),
        ({"model": MODEL, "messages": HI, "temperature": -1}, "temperature", "0"),
        ({"model": MODEL, "messages": HI, "logit_bias": {"5": 1e9}}, "logit_bias.5", "100"),
        ({"model": MODEL, "messages": HI, "max_tokens": 0}, "max_tokens", "1"),
        ({"model": MODEL, "messages": HI, "max_tokens": 513}, "max_tokens", "512"),
        ({"model": MODEL, "messages": HI, "max_completion_tokens": 10**9}, "max_completion_tokens", "512"),
        ({"model": MODEL, "messages": HI, "top_logprobs": 3}, "top_logprobs", "logprobs"),
        ({"model": MODEL, "messages": HI, "stream_options": {"include_usage": True}}, "stream_options", "stream"),
        ({"model": MODEL, "messages": HI, "stream": "yes"}, "stream", "yes"),
        ({"model": MODEL, "messages": HI, "stop": ["a"] * 5}, "stop", "4"),
        ({"model": MODEL, "messages": HI, "metadata": {"k": "x" * 513}}, "metadata", "512"),
        ({"model": MODEL, "messages": HI, "metadata": {"k": 1}}, "metadata.k", "1"),
        ({"model": MODEL, "messages": HI, "cohorts": ["a b"]}, "cohorts.0", "a b"),
        ({"model": MODEL, "messages": HI, "user": ""}, "user", "at least 1"),
    ],
)
def test_what_is_refused(world: World, body: Any, field: str | None, told: str) -> None:
    before = len(world.events())
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    with world.client() as client:
        reply = client.post("/v1/chat/completions", content=raw)
    error = reply.json()["error"]
    assert reply.status_code == 400 and set(error) == {"message", "type", "param", "code"}
    assert told in error["message"]
    assert field is None or error["param"] == field
    assert len(world.events()) == before


def test_who_asks_comes_before_what(world: World) -> None:
    assert world.http.post("/v1/chat/completions", content=b"{").status_code == 401


def test_an_unknown_model_is_not_found(world: World) -> None:
    with world.client() as client:
        reply = client.post("/v1/chat/completions", json={"model": "gpt-9", "messages": HI})
    assert reply.status_code == 404
    assert "gpt-9" in reply.json()["error"]["message"] and MODEL in reply.json()["error"]["message"]


def test_a_long_body_is_refused_while_it_is_read(world: World) -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(10_000):
            yield b" " * 4096  # 40 MB, no Content-Length

    with world.client() as client:
        declared = client.post("/v1/chat/completions", content=b" " * (256 * 1024 + 1))
        assert declared.status_code == 413 and "262144" in declared.json()["error"]["message"]
        with contextlib.suppress(httpx2.TransportError):  # the connection may be closed on us before the reply can be read
            assert client.post("/v1/chat/completions", content=endless()).status_code == 413
        assert client.get("/livez").status_code == 200


def test_everything_that_openai_documents_is_taken() -> None:
    ask = parse(
        json.dumps(
            {
                "model": MODEL,
                "messages": [
                    {"role": "developer", "content": [{"type": "text", "text": "Be"}, {"type": "text", "text": " kind."}]},
                    {"role": "user", "content": "weather?", "name": "ann"},
                    {
                        "role": "assistant",
                        "content": None,
                        "refusal": None,
                        "annotations": [],
                        "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
                    },
                    {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
                ],
                "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
                "tool_choice": "auto",
                "parallel_tool_calls": False,
                "response_format": {"type": "json_object"},
                "stop": "\n",
                "seed": 1,
                "logprobs": True,
                "top_logprobs": 2,
                "stream": True,
                "stream_options": {"include_usage": True},
                "max_completion_tokens": 5,
                "presence_penalty": 0.1,
                "frequency_penalty": 0,
                "logit_bias": {"5": -100},
                "top_p": 1,
                "store": True,
                "service_tier": "auto",
                "prompt_cache_key": "k",
                "reasoning_effort": "low",
                "safety_identifier": "u",
            }
        ).encode()
    )
    plain = ask.plain_messages("System.")
    assert [message["role"] for message in plain] == ["developer", "user", "assistant", "tool"]
    assert "refusal" not in plain[2] and "annotations" not in plain[2]


def test_tool_calls_are_put_together_from_their_pieces() -> None:
    answer = Answer()
    for delta in (
        {"tool_calls": [{"index": 0, "id": "c1", "type": "function", "function": {"name": "sum", "arguments": ""}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '{"a":'}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": "1}"}}]},
        {"tool_calls": [{"index": 1, "id": "c2", "function": {"name": "f", "arguments": "{}"}}]},
    ):
        answer.add({"choices": [{"index": 0, "delta": delta, "finish_reason": None}]})
    answer.add({"choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls"}]})
    message = answer.choice(0, False)["message"]
    assert message["content"] is None
    assert [(call["id"], call["function"]["name"], call["function"]["arguments"]) for call in message["tool_calls"]] == [
        ("c1", "sum", '{"a":1}'),
        ("c2", "f", "{}"),
    ]


SCRIPT: dict[str, str] = {}


def from_script(name: str, messages: Sequence[Mapping[str, Any]]) -> str:
    return SCRIPT["answer"]


@pytest.fixture(scope="module")
def parrot(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with serve(tmp_path_factory.mktemp("parrot"), engine=Scripted(from_script), max_tokens=512) as running:
        yield running


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(st.characters(codec="utf-8"), min_size=1, max_size=80))
def test_the_relay_loses_and_changes_nothing(parrot: World, text: str) -> None:
    SCRIPT["answer"] = text
    streamed = sse_safe(parrot.chat("hi", stream=True).content)
    assert said(streamed) == text
    assert parrot.chat(text).json()["choices"][0]["message"]["content"] == text


def sse_safe(raw: bytes) -> list[Any]:
    """Events split on bytes: no character of a text may look like the end of an event."""
    return sse("\n\n".join(part.decode() for part in raw.split(b"\n\n")))


def test_cors_for_allowed_origins_only(world: World) -> None:
    with world.client() as client:
        for origin, allowed in (("https://app.example", "https://app.example"), ("https://evil.example", None)):
            asked = {"Origin": origin, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
            reply = client.options("/v1/feedback", headers=asked)
            assert reply.headers.get("access-control-allow-origin") == allowed


def test_the_page_gives_a_session_that_may_chat_and_speaks_for_itself(world: World) -> None:
    with httpx2.Client(verify=False, base_url=world.url) as client:
        page = client.get("/")
        cookie = page.headers["set-cookie"].lower()
        assert "httponly" in cookie and "samesite=strict" in cookie
        assert "unsafe" not in page.headers["content-security-policy"]
        body = {"model": MODEL, "messages": HI}
        assert client.post("/v1/chat/completions", json=body).status_code == 200
        client.post("/v1/chat/completions", json=body)
        one, two = world.started()[-2:]
        assert one.subject == two.subject and one.subject_kind == "session"
        refused = client.post("/v1/chat/completions", json={**body, "user": "ann"})
        assert refused.status_code == 403 and refused.json()["error"]["param"] == "user"
    with httpx2.Client(verify=False, base_url=world.url, cookies={"plaudit_session": "short"}) as client:
        assert client.post("/v1/chat/completions", json=body).status_code == 401


def test_without_auth_everybody_may_chat(tmp_path: Path) -> None:
    with serve(tmp_path, auth=False) as world, httpx2.Client(verify=False, base_url=world.url) as client:
        assert client.post("/v1/chat/completions", json={"model": MODEL, "messages": HI, "user": "ann"}).status_code == 200
        assert client.get("/v1/models", headers={"Authorization": "Bearer not-needed"}).status_code == 200
