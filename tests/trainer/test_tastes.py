"""Who prefers what, against ratings of which it is known."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from rating_world import RATERS, rated_world

from trainer.labels import Thumbs
from trainer.tastes import tastes


def test_tastes_name_what_cohorts_prefer() -> None:
    found = {(taste.cohort, taste.what): taste for taste in tastes(rated_world(9).labels)}
    longer = found["everybody", "longer answers"]
    assert longer.low > 0 and "prefers longer answers" in longer.words
    assert found["even", "longer answers"].raters == RATERS // 2


def test_correlation_of_a_taste_by_hand() -> None:
    labels = rated_world(9).labels
    # Answers of 10 and 20 tokens, so +-5 around their prompt's mean; 30 longer ones get a thumb up, 10 shorter ones a thumb down.
    answers = tuple(replace(answer, tokens=10 + 10 * (i % 2)) for i, answer in enumerate(labels.answers))
    rated = torch.tensor([1] * 30 + [0] * 10)
    thumbs = Thumbs(rated, 1 - rated, torch.arange(40) % RATERS)
    alone = replace(labels, answers=answers, thumbs=thumbs, choices=labels.choices.where(torch.zeros(len(labels.choices)).bool()))
    (taste,) = [found for found in tastes(alone) if (found.cohort, found.what) == ("everybody", "longer answers")]
    # Thumbs less their mean of 1/2: +1/2 and -3/2, root mean square sqrt((30/4 + 10·9/4) / 40) = sqrt(3/4).
    # Mean product (30·1/2 + 10·3/2) / 40 = 3/4, so the correlation is (3/4) / sqrt(3/4) = sqrt(3/4).
    assert taste.correlation == pytest.approx(math.sqrt(0.75), abs=1e-6)
