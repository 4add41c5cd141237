"""What is read of an answer, by hand."""

from __future__ import annotations

import pytest

from deploy.answers import Answer, empty, error, foreign, latency, length, malformed, pace, refusal, repetition

SAID = Answer("stop", tokens=64, first_token_ms=256.0, total_ms=256.0 + 63 * 32, question="How is the weather?", text="It is warm.")
BROKEN = Answer("error", tokens=3, first_token_ms=128.0, total_ms=500.0, text="It is")


def test_figures_of_the_event_by_hand() -> None:
    # 256 ms = 2^8; 63 further tokens of 32 ms = 2^5; 64 tokens = 2^6.
    assert (error(SAID), empty(SAID), latency(SAID), pace(SAID), length(SAID)) == pytest.approx((0.0, 0.0, 8.0, 5.0, 6.0))
    assert (error(BROKEN), empty(BROKEN), latency(BROKEN), pace(BROKEN), length(BROKEN)) == (1.0, None, 7.0, None, None)
    left = Answer("client_closed", tokens=3, text="It")
    assert (error(left), empty(left), length(left), refusal(left)) == (0.0, None, None, None)


def test_an_empty_answer_says_nothing_else() -> None:
    silent, blank = Answer("stop", tokens=0), Answer("stop", tokens=2, text=" \n")
    assert (empty(silent), empty(blank), empty(Answer("stop"))) == (1.0, 1.0, None)
    assert (length(silent), refusal(blank), repetition(blank)) == (None, None, None)
    assert empty(Answer("tool_calls", tokens=9, text="", calls_tools=True)) == 0.0


def test_text_by_hand() -> None:
    assert refusal(SAID) == 0.0
    assert refusal(Answer("stop", tokens=5, text="I'm sorry, no.")) == 1.0
    # a b c, b c a, c a b, a b c: one of four triples is a repeat.
    assert repetition(Answer("stop", tokens=6, text="a b c a b c")) == 0.25
    assert refusal(Answer("stop", tokens=5)) is None, "not recorded"


def test_another_language_than_was_asked_in() -> None:
    asked = "How is the weather, and what should I wear?"
    for text, value in (
        ("It is warm and you can wear what you like.", 0.0),
        ("Es ist warm und Sie sind nicht allein.", 1.0),
        ("Warm.", None),
    ):
        assert foreign(Answer("stop", tokens=9, question=asked, text=text)) == value
    assert foreign(Answer("stop", tokens=9, text="It is warm and you can wear what you like.")) is None


def test_json_only_where_it_was_asked_for() -> None:
    assert malformed(Answer("stop", tokens=9, text="no")) is None
    assert malformed(Answer("stop", tokens=9, wants_json=True, text='{"a": 1}')) == 0.0
    assert malformed(Answer("length", tokens=9, wants_json=True, text='{"a": [1, ')) == 1.0
    assert malformed(Answer("tool_calls", tokens=9, wants_json=True, calls_tools=True, text="x")) is None
