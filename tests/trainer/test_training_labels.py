"""Ratings before they train: what teaches nothing, what is doubtful, the shuffled control, and whose train the second model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from rating_world import LINEAR, rated_world

from feedback.errors import TrainingRefused
from feedback.snapshot import Row
from trainer.labels import check
from trainer.likelihood import BOTH_BAD
from trainer.reward_model import fit, split_raters


def row(**changes: Any) -> Row:
    plain = {
        "event_id": "e",
        "kind": "thumb",
        "rater": "r0",
        "subject": "s",
        "cohorts": (),
        "source": "person",
        "prompt": [{"role": "user", "content": "how?"}],
        "answer_a": "so",
        "answer_b": None,
        "finish_a": "stop",
        "finish_b": None,
        "outcome": "up",
        "side": None,
        "adapter_a": "",
        "adapter_b": None,
        "stamp": 0,
    }
    return Row.model_validate(plain | changes)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "0 ratings, 0 of them can train"),
        ([row(answer_a=" ")], "1 ratings, 0 of them can train"),
        ([row(), row(rater="r1")], "one-sided, all say the same \\(2 up\\)"),
        ([row(), row(outcome="down")], "all ratings are one rater's"),
    ],
)
def test_what_teaches_nothing_is_refused(rows: list[Row], message: str) -> None:
    with pytest.raises(TrainingRefused, match=message):
        check(rows, allow_single_rater=False)


def test_doubtful_ratings_are_named() -> None:
    rows = [row(), row(outcome="down"), row(answer_a="")]
    warnings = check(rows, allow_single_rater=True)
    assert warnings == [
        "1 of 3 ratings dropped: an answer is empty",
        "all ratings are one rater's: this adapter serves that rater only",
        "1 of 1 judgements are contradicted by the same rater",
    ]


def test_shuffling_permutes_and_keeps_counts() -> None:
    labels = rated_world(3).labels
    shuffled = labels.shuffled(0)
    assert shuffled.thumbs.outcomes.bincount().tolist() == labels.thumbs.outcomes.bincount().tolist()
    assert (shuffled.choices.outcomes == BOTH_BAD).sum() == (labels.choices.outcomes == BOTH_BAD).sum()
    assert not torch.equal(shuffled.thumbs.outcomes, labels.thumbs.outcomes)
    assert shuffled.digest == labels.shuffled(0).digest != labels.shuffled(1).digest


def test_shuffling_puts_both_bad_only_where_it_was_offered() -> None:
    labels = rated_world(3).labels
    offered = (torch.arange(len(labels.choices)) % 2 == 0) | (labels.choices.outcomes == BOTH_BAD)
    mixed = replace(labels, choices=replace(labels.choices, rejectable=offered))
    shuffled = mixed.shuffled(0)
    assert bool(offered[shuffled.choices.outcomes == BOTH_BAD].all())
    assert not torch.equal(shuffled.choices.outcomes, mixed.choices.outcomes)
    # Ratings that cannot have been given leave nothing to fit, and that is said.
    broken = replace(mixed, choices=replace(mixed.choices, rejectable=torch.zeros_like(offered)))
    with pytest.raises(TrainingRefused, match="not finite"):
        fit(broken, LINEAR)


def test_other_raters_make_the_second_model() -> None:
    labels = rated_world(12).labels
    main, watch = split_raters(labels, 0.25, 3, labels.count // 4, seed=0)
    assert watch is not None
    assert not set(main.choices.raters.tolist()) & set(watch.choices.raters.tolist())
    assert len(set(watch.thumbs.raters.tolist())) == 3  # a quarter of 12
    assert main.count + watch.count == labels.count
    assert split_raters(labels, 0.25, 4, 1, seed=0)[1] is None
    assert split_raters(labels, 0.25, 3, labels.count // 4 + 1, seed=0)[1] is None
