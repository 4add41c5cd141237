"""What the guardrails read of one answer: functions of an `Answer`, a figure or None where it says nothing."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

from deploy import texts

COMPLETE = frozenset({"stop", "length", "tool_calls"})
"""How an answer ends that nobody broke off. One that was broken off is an error or says nothing."""
JSON_FORMATS = frozenset({"json_object", "json_schema"})


@dataclass(frozen=True)
class Answer:
    """One ended answer of a canary or of its baseline."""

    finish_reason: str
    tokens: int | None = None
    first_token_ms: float | None = None
    total_ms: float | None = None
    wants_json: bool = False
    """The client asked for `response_format` json_object or json_schema."""
    calls_tools: bool = False
    question: str | None = None
    """The last message of the person; None where it cannot be read: not recorded, or nobody here has the key."""
    text: str | None = None

    @property
    def spoken(self) -> str | None:
        """The text of a whole answer that says something; None otherwise."""
        return self.text if self.finish_reason in COMPLETE and self.text and self.text.strip() else None


def error(answer: Answer) -> float:
    """1 where it broke off. A person who left before saw no error."""
    return float(answer.finish_reason == "error")


def empty(answer: Answer) -> float | None:
    """1 where a whole answer says nothing."""
    if answer.finish_reason not in COMPLETE or (answer.tokens is None and answer.text is None):
        return None
    silent = answer.tokens == 0 or (answer.text is not None and not answer.text.strip())
    return float(silent and not answer.calls_tools)


def latency(answer: Answer) -> float | None:
    """log2 of the milliseconds to the first token: doublings, so that one very slow answer is not the mean."""
    return math.log2(max(answer.first_token_ms, 1.0)) if answer.first_token_ms is not None else None


def pace(answer: Answer) -> float | None:
    """log2 of the milliseconds of each further token."""
    if answer.tokens is None or answer.tokens < 8 or answer.total_ms is None or answer.first_token_ms is None:
        return None
    return math.log2(max((answer.total_ms - answer.first_token_ms) / (answer.tokens - 1), 0.01))


def length(answer: Answer) -> float | None:
    """log2 of the tokens of an answer that says something."""
    return math.log2(answer.tokens) if answer.tokens and answer.finish_reason in COMPLETE else None


def refusal(answer: Answer) -> float | None:
    """1 where it says that it cannot."""
    return None if answer.spoken is None else float(texts.refuses(answer.spoken))


def repetition(answer: Answer) -> float | None:
    """Share of word triples that occurred before in it, in [0, 1]."""
    return None if answer.spoken is None else texts.repetition(answer.spoken)


def foreign(answer: Answer) -> float | None:
    """1 where it is in another language than what the person wrote; None where that cannot be told."""
    if answer.question is None or answer.spoken is None:
        return None
    found = texts.other_language(answer.question, answer.spoken)
    return None if found is None else float(found)


def malformed(answer: Answer) -> float | None:
    """1 where JSON was asked for and the answer is none; cut off by the length limit, it is none either."""
    if not answer.wants_json or answer.spoken is None or answer.calls_tools:
        return None
    try:
        json.loads(answer.spoken)
    except ValueError:
        return 1.0
    return 0.0
