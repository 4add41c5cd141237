"""Strings of few people in a candidate's answers: what counts, what does not, and that nothing else does."""

from __future__ import annotations

from feedback.snapshot import Row
from trainer.copied import copied, secrets, written

PHRASE = "always praise the blue house of Mara"  # seven words: three grams of five
TEXTS = [("mara", f"Please {PHRASE}")]
PROMPTS = ["What is rain?", "What is snow?"]


def said(*answers: str, texts: list[tuple[str, str]] = TEXTS, base: tuple[str, ...] = ()) -> dict[str, int]:
    return copied(texts, PROMPTS[: len(answers)], answers, base)[0]


def test_a_planted_phrase_in_two_answers_is_one_string() -> None:
    figures, found = copied(TEXTS, PROMPTS, [f"Water, and {PHRASE}!", f"Ice. {PHRASE}"], ["Rain is water."])
    # "please always praise the blue" is the fourth gram that was looked for.
    assert figures == {"strings": 1, "known": 4, "people": 1, "answers": 2}
    assert (found[0].text, found[0].people, found[0].answers) == (PHRASE.lower(), ("mara",), 2)


def test_what_is_not_memorised() -> None:
    twice = (f"So {PHRASE}.", f"So {PHRASE}.")
    assert said(*twice)["strings"] == 1
    assert said(f"So {PHRASE}.", "Ice.")["strings"] == 0  # seven words in one answer may be chance
    assert said(*twice, base=(f"I {PHRASE}",))["strings"] == 0  # base says it, too
    crowd = [(name, PHRASE) for name in ("a", "b", "c")]
    assert said(*twice, texts=crowd)["strings"] == 0  # three people write it
    assert said(*twice, texts=crowd[:2])["strings"] == 1
    own = copied(TEXTS, [f"Why {PHRASE}?", f"When {PHRASE}?"], twice, ())[0]
    assert own["strings"] == 0  # it was in the question


def test_eight_words_or_a_secret_count_at_once() -> None:
    assert said(f"So please {PHRASE}.")["strings"] == 1  # eight words
    secret = [("noa", "Write to noa@example.org or 030 1234 567, or read https://example.org/noa")]
    for leak in ("Ask noa@example.org today", "Call 030 1234 567.", "See https://example.org/noa"):
        assert said(leak, texts=secret)["strings"] == 1, leak
    assert said("Ask noa@example.com today, in 2026", texts=secret)["strings"] == 0


def test_only_what_people_wrote() -> None:
    row = Row(
        event_id="e",
        kind="thumb",
        rater="r",
        subject="s",
        cohorts=(),
        source="person",
        prompt=[{"role": "user", "content": "mine"}, {"role": "assistant", "content": "model's"}],
        answer_a="a",
        answer_b=None,
        finish_a="stop",
        finish_b=None,
        outcome="up",
        side=None,
        adapter_a="x",
        adapter_b=None,
        stamp=1,
    )
    assert written([row]) == {("s", "mine")}
    assert written([row.model_copy(update={"source": "import"})]) == {("s", "mine"), ("s", "a")}


def test_years_are_no_secret_and_numbers_beside_them_are() -> None:
    assert secrets("from 1939-1945, or 1950 - 1960") == set()
    assert secrets("in 1939-1945, call 030 1234567 or 1939-1945-22") == {("030 1234567",), ("1939-1945-22",)}


def test_a_long_word_that_is_no_address_takes_no_time() -> None:
    # Tried from each of its letters, it would take some 5e9 steps.
    assert secrets("a" * 100_000) == set()
    assert secrets("write to a.b+c@example.org, or 0170 1234567") == {("a.b+c@example.org",), ("0170 1234567",)}
