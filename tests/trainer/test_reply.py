"""Which sequences go through a model together."""

from __future__ import annotations

from trainer.reply import Reply, by_tokens, shared_prefix

SYSTEM = tuple(range(100, 110))
"""Ten tokens that every prompt begins with."""


def reply(own_prompt: int, tokens: int, system: tuple[int, ...] = SYSTEM) -> Reply:
    return Reply((*system, *range(own_prompt)), tuple(range(tokens)), False)


def test_a_common_beginning() -> None:
    assert shared_prefix([(*SYSTEM, 1, 2), (*SYSTEM, 1, 3), (*SYSTEM, 4)]) == 10
    assert shared_prefix([SYSTEM, SYSTEM]) == 9, "one token of each prompt is left: its state predicts the first of the reply"
    assert shared_prefix([SYSTEM]) == 0
    assert shared_prefix([(1, 2, 3), (1, 2, 4)]) == 0, "too short to be worth a pass"
    assert shared_prefix([(), SYSTEM]) == 0


def test_groups_stay_below_the_budget_padding_counted_and_the_common_beginning_once() -> None:
    # Behind the ten common tokens: 1+4 = 5, 2+7 = 9, 1+1 = 2, 3+6 = 9, 1+3 = 4.
    replies = [reply(1, 4), reply(2, 7), reply(1, 1), reply(3, 6), reply(1, 3)]
    # 28 - 10 = 18 holds two of 9; then 3 of 5, with the two shorter ones padded to it.
    assert by_tokens(replies, 28) == [[1, 3], [0, 4, 2]]
    assert by_tokens(replies, 27) == [[1], [3], [0, 4, 2]]
    assert by_tokens(replies, 10_000) == [[1, 3, 0, 4, 2]]
    assert by_tokens(replies, 1) == [[1], [3], [0], [4], [2]], "what is longer than the budget goes alone"
    assert by_tokens([], 10) == []
