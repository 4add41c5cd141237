"""OpenAI's chat API as we speak it: what a request may say, what goes to the engine, how replies and chunks look.

The request is an allow-list: a field that is not here is refused by name. Replies are built field by field, so nothing that an
engine adds (fingerprints, token ids, its own model name) reaches the client by accident.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, StringConstraints, ValidationError, field_validator, model_validator

from feedback.errors import InvalidInput

MAX_MESSAGES = 256
Tag = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.:-]{0,63}$")]


class Strict(BaseModel):
    """Unknown fields are refused, and `true` is no number."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class TextPart(Strict):
    type: Literal["text"]
    text: str


class Message(Strict):
    """One message. `refusal`, `annotations`, `audio` and `function_call` are what clients send back of a reply; they are dropped."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = Field(default=None, max_length=64)
    tool_calls: list[dict[str, JsonValue]] | None = None
    tool_call_id: str | None = None
    refusal: None = None
    annotations: list[JsonValue] | None = None
    audio: None = None
    function_call: None = None

    @model_validator(mode="after")
    def says_something(self) -> Message:
        """Only an assistant's message may be without content, and only beside tool calls."""
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise ValueError("content is missing")
        return self


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: bool | None = None


class ChatRequest(Strict):
    """The body of `POST /v1/chat/completions`: OpenAI's documented fields, and `compare` and `cohorts`."""

    model: str
    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    n: int | None = Field(default=1, ge=1, le=4)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    seed: int | None = None
    stop: str | list[str] | None = None
    tools: list[dict[str, JsonValue]] | None = Field(default=None, max_length=128)
    tool_choice: str | dict[str, JsonValue] | None = None
    parallel_tool_calls: bool | None = None
    response_format: dict[str, JsonValue] | None = None
    reasoning_effort: str | None = None
    # What we keep and never forward.
    user: str | None = Field(default=None, min_length=1, max_length=256)
    safety_identifier: str | None = Field(default=None, min_length=1, max_length=256)
    store: bool | None = None
    metadata: dict[str, str] | None = Field(default=None, max_length=16)
    service_tier: str | None = None
    prompt_cache_key: str | None = None
    # What OpenAI's API does not have; the `openai` client sends it with `extra_body`.
    compare: bool = False
    cohorts: list[Tag] = Field(default=[], max_length=16)

    @field_validator("stop")
    @classmethod
    def at_most_four(cls, value: str | list[str] | None) -> str | list[str] | None:
        if isinstance(value, list) and len(value) > 4:
            raise ValueError(f"{len(value)} stop sequences, at most 4")
        return value

    @field_validator("metadata")
    @classmethod
    def short(cls, value: dict[str, str] | None) -> dict[str, str] | None:
        for key, text in (value or {}).items():
            if len(key) > 64 or len(text) > 512:
                raise ValueError(f"key of {len(key)} and value of {len(text)} characters, at most 64 and 512")
        return value

    @property
    def choices(self) -> int:
        """How many answers this request asks for."""
        return 2 if self.compare else self.n or 1

    def plain_messages(self, system_prompt: str | None) -> list[dict[str, JsonValue]]:
        """The messages as they are recorded and forwarded; the policy's system prompt comes first where the client sent none."""
        dropped = {"refusal", "annotations", "audio", "function_call"}
        plain: list[dict[str, JsonValue]] = [m.model_dump(mode="json", exclude_none=True, exclude=dropped) for m in self.messages]
        if system_prompt and not any(m["role"] in ("system", "developer") for m in plain):
            plain.insert(0, {"role": "system", "content": system_prompt})
        return plain


SAMPLING = (
    "max_tokens",
    "max_completion_tokens",
    "temperature",
    "top_p",
    "frequency_penalty",
    "presence_penalty",
    "logit_bias",
    "seed",
    "stop",
    "tool_choice",
    "parallel_tool_calls",
    "response_format",
    "reasoning_effort",
)


def parse(body: bytes) -> ChatRequest:
    """The request in the body. Raises InvalidInput naming the first field that is wrong, its value and the limit."""
    try:
        ask = ChatRequest.model_validate_json(body)
    except ValidationError as exc:
        raise refusal(exc) from exc
    if ask.compare and (ask.n or 1) not in (1, 2):
        raise InvalidInput(f"n: {ask.n} cannot be combined with compare, which gives two answers.", field="n")
    if ask.compare and ask.store is False:
        raise InvalidInput("store: false cannot be combined with compare: a choice between unrecorded answers is lost.", field="store")
    if ask.top_logprobs is not None and not ask.logprobs:
        raise InvalidInput("top_logprobs needs logprobs: true.", field="top_logprobs")
    if ask.stream_options is not None and not ask.stream:
        raise InvalidInput("stream_options needs stream: true.", field="stream_options")
    return ask


def refusal(exc: ValidationError) -> InvalidInput:
    """A pydantic error as ours: the first wrong field, what it was and what was expected."""
    first = exc.errors(include_url=False, include_context=False)[0]
    wrong = first["msg"].removeprefix("Invalid JSON: ").removeprefix("Value error, ")
    if first["type"] == "json_invalid":
        return InvalidInput(f"The body is not JSON: {wrong}.")
    # Union branches appear in `loc` as names of types; a client knows only its own fields and indices.
    path = [str(part) for part in first["loc"] if part != "str" and "[" not in str(part)]
    field = ".".join(path)[:100] or None
    if first["type"] == "extra_forbidden":
        return InvalidInput(f"{field}: this field is not supported.", field=field)
    given = "" if first["type"] == "missing" else f", got {shown(first['input'])}"
    return InvalidInput(f"{field or 'body'}: {wrong}{given}.", field=field)


def shown(value: object) -> str:
    """A value as an error message shows it: short, on one line."""
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."


def engine_body(ask: ChatRequest, messages: list[dict[str, JsonValue]], sampling: dict[str, Any], record_tokens: bool) -> dict[str, Any]:
    """What the engine is asked, less the adapter's name: always one streamed answer with its usage."""
    body: dict[str, Any] = {"messages": messages, **sampling, "n": 1, "stream": True, "stream_options": {"include_usage": True}}
    if ask.tools:
        body["tools"] = ask.tools
    if ask.logprobs or record_tokens:
        body["logprobs"] = True
        body["top_logprobs"] = ask.top_logprobs or 0
    if record_tokens:
        body["return_token_ids"] = True
    return body


class Answer:
    """One choice, gathered from its chunks."""

    def __init__(self) -> None:
        self.text = ""
        self.reasoning = ""
        self.tool_calls: list[dict[str, Any]] = []
        self.logprobs: list[dict[str, Any]] = []
        self.token_ids: list[int] = []
        self.finish_reason: str | None = None
        self.usage: dict[str, int] = {}

    def add(self, chunk: dict[str, Any]) -> dict[str, Any] | None:
        """Take a chunk in; returns its only choice, or None where it holds none (the usage)."""
        if usage := chunk.get("usage"):
            self.usage = {key: usage[key] for key in ("prompt_tokens", "completion_tokens", "total_tokens") if key in usage}
        if not chunk.get("choices"):
            return None
        choice: dict[str, Any] = chunk["choices"][0]
        delta = choice.get("delta") or {}
        self.text += delta.get("content") or ""
        for call in delta.get("tool_calls") or []:
            self._add_call(call)
        self.logprobs += (choice.get("logprobs") or {}).get("content") or []
        self.token_ids += choice.get("token_ids") or []
        self.finish_reason = choice.get("finish_reason") or self.finish_reason
        return choice

    def _add_call(self, part: dict[str, Any]) -> None:
        """Tool calls come in pieces: id and name first, then the arguments bit by bit."""
        while len(self.tool_calls) <= part.get("index", 0):
            self.tool_calls.append({"id": "", "type": "function", "function": {"name": "", "arguments": ""}})
        call = self.tool_calls[part.get("index", 0)]
        call["id"] = part.get("id") or call["id"]
        for key, value in (part.get("function") or {}).items():
            call["function"][key] = call["function"].get(key, "") + (value or "")

    def choice(self, index: int, logprobs: bool) -> dict[str, Any]:
        """The whole choice, as a reply that is not streamed shows it."""
        message: dict[str, Any] = {"role": "assistant", "content": self.text, "refusal": None}
        if self.tool_calls:
            message |= {"content": self.text or None, "tool_calls": self.tool_calls}
        shown_logprobs = {"content": self.logprobs} if logprobs else None
        return {"index": index, "message": message, "finish_reason": self.finish_reason, "logprobs": shown_logprobs}


def delta_choice(choice: dict[str, Any], index: int, logprobs: bool) -> dict[str, Any]:
    """An engine's choice as the client sees it."""
    delta = {key: value for key, value in (choice.get("delta") or {}).items() if key in ("role", "content", "tool_calls", "refusal")}
    return {
        "index": index,
        "delta": delta,
        "finish_reason": choice.get("finish_reason"),
        "logprobs": choice.get("logprobs") if logprobs else None,
    }


def envelope(kind: str, reply_id: str, created: int, model: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
    """What a reply (`chat.completion`) and a chunk (`chat.completion.chunk`) share."""
    return {"id": reply_id, "object": kind, "created": created, "model": model, "choices": choices}


def total_usage(answers: Sequence[Answer]) -> dict[str, int]:
    """Tokens of all choices together; the prompt is counted once, as OpenAI does for n > 1."""
    prompt = max((a.usage.get("prompt_tokens", 0) for a in answers), default=0)
    completion = sum(a.usage.get("completion_tokens", 0) for a in answers)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def sse(data: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"
