"""Figures about held-out ratings, worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from rating_world import LINEAR, RATERS, rated_world

from trainer.config import RewardModelSettings
from trainer.held_out import (
    BLIND_RIDGE,
    Gain,
    calibration,
    centred_correlation,
    choice_accuracy,
    clustered_mean,
    ends,
    held_out,
    length_share,
    likelihood_gain,
    side_bias,
    unseen_prompts,
    unseen_raters,
)
from trainer.labels import Labels, Thumbs
from trainer.likelihood import A, B
from trainer.ridge import cross_validate
from trainer.score import Normaliser, Scorer

SETTINGS = RewardModelSettings(maps=("linear",), ridges=(1.0, 1.0), folds=3, grid_extensions=0)


def logits(*chances: float) -> torch.Tensor:
    return torch.tensor([math.log(p / (1 - p)) for p in chances], dtype=torch.float64)


def test_calibration_error_by_hand() -> None:
    # Bin 0.7-0.8: foretold 0.75 four times, chosen twice: 4/6·|0.75 - 0.5| = 1/6. Bin 0.2-0.3: foretold 0.25 twice, chosen once: 2/6·1/4.
    found = calibration(logits(0.75, 0.75, 0.75, 0.75, 0.25, 0.25), torch.tensor([A, A, B, B, A, B]))
    assert found is not None
    assert found.error == pytest.approx(1 / 6 + 1 / 12)
    # sqrt(2/pi)/6 · (sqrt(4·3/16) + sqrt(2·3/16))
    assert found.by_chance == pytest.approx(math.sqrt(2 / math.pi) / 6 * (math.sqrt(0.75) + math.sqrt(0.375)))
    assert torch.allclose(torch.tensor(found.curve), torch.tensor([[0.25, 0.5, 2.0], [0.75, 0.5, 4.0]]))
    assert "off by 25.0 points" in found.words
    # Sides told apart the wrong way round: the same chances, all choices the other way.
    assert calibration(torch.zeros(0), torch.zeros(0)) is None
    right, wrong = (calibration(logits(0.9, 0.9), torch.tensor([outcome] * 2)) for outcome in (A, B))
    assert right is not None and wrong is not None and right.error == pytest.approx(0.1) and wrong.error == pytest.approx(0.9)


def test_side_bias_by_hand() -> None:
    # Equal answers, side a chosen 6 of 8 times: b = ln 3. Raters 0 and 1 chose it 3 of 4 times each: residuals sum to 0, so no doubt.
    outcomes = torch.tensor([A, A, A, B, A, A, A, B])
    found = side_bias(torch.zeros(8, dtype=torch.float64), outcomes, torch.tensor([0] * 4 + [1] * 4))
    assert found is not None and found.value == pytest.approx(math.log(3)) and found.low == pytest.approx(found.value)
    assert found.alarm and "people choose a side" in found.words
    # Now rater 0 chose it always and rater 1 in 2 of 4: residual sums 1 and -1, information 8·3/16: sd sqrt(2·2)/1.5.
    found = side_bias(torch.zeros(8, dtype=torch.float64), torch.tensor([A] * 4 + [A, A, B, B]), torch.tensor([0] * 4 + [1] * 4))
    assert found is not None and found.high is not None
    assert found.high - found.value == pytest.approx(12.706205 * 2 / 1.5) and not found.alarm
    alone = side_bias(torch.zeros(2, dtype=torch.float64), torch.tensor([A, B]), torch.tensor([0, 0]))
    assert alone is not None and alone.low is None and not alone.alarm and alone.value == pytest.approx(0.0)
    always = side_bias(torch.zeros(2, dtype=torch.float64), torch.tensor([B, B]), torch.tensor([0, 1]))
    assert always is not None and always.value == pytest.approx(-10.0)
    assert side_bias(torch.zeros(0), torch.zeros(0), torch.zeros(0)) is None


def test_the_share_that_length_explains_by_hand() -> None:
    labels = rated_world(0).labels
    # Within each prompt tokens go 0..7; scores are tokens plus a level of the prompt, or tokens against alternating signs.
    answers = tuple(replace(answer, tokens=i % 8) for i, answer in enumerate(labels.answers))
    own = torch.arange(len(answers)) % 8
    known = replace(labels, answers=answers)
    assert length_share(known, own + 100.0 * labels.prompts_N) == pytest.approx(1.0)
    assert length_share(known, -own.double()) == pytest.approx(1.0)
    # Signs -1, 1, -1, 1 ...: product with tokens less 3.5 is 4, squared sums 42 and 8: 16 / 336.
    assert length_share(known, 2.0 * (own % 2) - 1) == pytest.approx(16 / 336)
    assert length_share(known, torch.ones(len(answers))) == 0.0


def test_answers_of_equal_length_are_judged_apart() -> None:
    labels = rated_world(2).labels
    choices = labels.choices
    # All answers to one prompt have 100 tokens but its first one, which has 200.
    answers = tuple(replace(answer, tokens=200 if i % 8 == 0 else 100) for i, answer in enumerate(labels.answers))
    known = replace(labels, answers=answers)
    chosen = cross_validate(known, SETTINGS)
    found = held_out(known, chosen, None)
    decided = (choices.outcomes == A) | (choices.outcomes == B)
    equal = decided & (choices.first % 8 != 0) & (choices.second % 8 != 0)
    matched, prompts = found["length_matched"], found["prompts"]
    assert matched is not None and prompts is not None and matched.n == int(equal.sum()) < prompts.n == int(decided.sum())
    alone = choice_accuracy(known.select(equal, torch.ones(len(labels.thumbs), dtype=torch.bool)), unseen_prompts(known, chosen))
    assert matched == alone and found["raters"] is None


def test_without_choices_there_is_no_accuracy() -> None:
    labels = rated_world(2).labels
    thumbs = labels.select(torch.zeros(len(labels.choices), dtype=torch.bool), torch.ones(len(labels.thumbs), dtype=torch.bool))
    assert set(held_out(thumbs, cross_validate(thumbs, SETTINGS), None).values()) == {None}


def test_thumbs_that_all_say_the_same_teach_no_order() -> None:
    """The check of labels refuses them; a fit of what is left says that it knows nothing."""
    labels = rated_world(2).labels
    up = replace(labels, thumbs=Thumbs(labels.thumbs.answers, torch.zeros_like(labels.thumbs.outcomes), labels.thumbs.raters))
    only = up.select(torch.zeros(len(labels.choices), dtype=torch.bool), torch.ones(len(labels.thumbs), dtype=torch.bool))
    nll = [trial.nll for trial in cross_validate(only, SETTINGS.model_copy(update={"ridges": (0.01, 1.0)})).trials]
    assert nll[0] < 0.2  # it foresees "up", whatever the answer


class Shift:
    """A model whose score is the one feature and whose doubt is its size."""

    def mapped(self, features_BD: torch.Tensor) -> torch.Tensor:
        return features_BD.double()

    def score_mapped(self, mapped_BP: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return mapped_BP[:, 0], mapped_BP[:, 0].abs()


def test_a_base_answer_is_scored_as_if_it_were_not_in_its_centre() -> None:
    # Two answers to each prompt at +-1 of the centre, so their variance is 2 (one degree of freedom of two): unit sqrt(2). A third would
    # differ from their mean by a variance of 2·3/2 = 3, sd sqrt(3), and so stretched are +-1: mean +-sqrt(3), doubt sqrt(3).
    # Penalised +-sqrt(3) - sqrt(3)/2, so the zero is -sqrt(3)/2 and base scores are +-sqrt(3)/sqrt(2).
    features = torch.tensor([[4.0], [6.0], [-1.0], [1.0]])
    prompts = [(0,), (0,), (1,), (1,)]
    normaliser = Normaliser.fit(Shift(), prompts, features)  # type: ignore[arg-type]
    assert normaliser.unit == pytest.approx(math.sqrt(2)) and normaliser.zero == pytest.approx(-math.sqrt(3) / 2)
    scorer = Scorer(Shift(), normaliser, clip=4.0)  # type: ignore[arg-type]
    assert scorer.base_scores.tolist() == pytest.approx([-math.sqrt(1.5), math.sqrt(1.5)] * 2)
    # A fresh answer at the very centre has no doubt and lies above the base's mean by it.
    assert scorer.score([(0,)], torch.tensor([[5.0]])).item() == pytest.approx(math.sqrt(3) / 2 / math.sqrt(2))


def test_fresh_base_answers_score_zero_on_average() -> None:
    """Without the correction they would lie below, the more the fewer answers make a centre."""
    g = torch.Generator().manual_seed(0)
    prompts = [(i,) for i in range(3000) for _ in range(2)]
    normaliser = Normaliser.fit(Shift(), prompts, torch.randn(6000, 1, generator=g))  # type: ignore[arg-type]
    fresh = Scorer(Shift(), normaliser, clip=9.0).score(prompts[::2], torch.randn(3000, 1, generator=g))  # type: ignore[arg-type]
    assert abs(fresh.mean().item()) < 0.06  # 3 standard errors; uncorrected 0.5·(0.98 - 0.56) = 0.2 below


def test_ends_of_an_interval_and_a_correlation_by_hand() -> None:
    assert ends(-0.1, 0.4, 0.0, 1.0) == (0.0, 0.4) and ends(-0.1, 0.4) == (-0.1, 0.4)
    assert ends(-math.inf, math.inf, 0.0, 1.0) == (None, None)
    # (-1, 0, 1)·(-2, 1, 1) = 3; 3 / sqrt(2·6) = sqrt(3)/2.
    x, y = torch.tensor([-1.0, 0.0, 1.0]), torch.tensor([-2.0, 1.0, 1.0])
    assert centred_correlation(x, y) == pytest.approx(math.sqrt(3) / 2, abs=1e-6)
    assert centred_correlation(x, -y) == pytest.approx(-math.sqrt(3) / 2, abs=1e-6)
    assert centred_correlation(x, torch.zeros(3)) is None


def test_held_out_accuracy_of_prompts_raters_and_length() -> None:
    labels = rated_world(8).labels
    chosen = cross_validate(labels, LINEAR)
    found = held_out(labels, chosen, unseen_raters(labels, LINEAR, chosen))
    prompts, raters, length = found["prompts"], found["raters"], found["length"]
    assert prompts is not None and raters is not None and length is not None
    assert prompts.low > 0.5 and raters.low > 0.5
    assert raters.clusters <= RATERS
    assert 0.5 < length.value < prompts.value


def test_clustered_interval_by_hand() -> None:
    # Clusters (1, 1), (0, 0): mean 1/2; residual sums 1 and -1; variance 2/1·2/4² = 1/4, so sd 1/2; t's quantile
    # with one degree of freedom is tan(0.475·pi) = 12.706205.
    mean, low, high = clustered_mean(torch.tensor([1.0, 1.0, 0.0, 0.0]), torch.tensor([5, 5, 9, 9]))
    assert (mean, high - mean, mean - low) == pytest.approx((0.5, 6.3531024, 6.3531024))
    assert clustered_mean(torch.tensor([1.0, 0.0]), torch.tensor([0, 0]))[1] == -math.inf


def test_the_likelihood_gain_tells_ratings_from_noise() -> None:
    def gain(some: Labels, settings: RewardModelSettings = LINEAR) -> Gain:
        return likelihood_gain(some, cross_validate(some, settings))

    labels = rated_world(3).labels
    real, noise = gain(labels), gain(labels.shuffled(0))
    assert real.n == noise.n == labels.count
    assert real.low is not None and real.low > 0
    assert noise.low is not None and noise.low < 0
    # Without a score there is nothing to gain.
    blind = RewardModelSettings(maps=("linear",), ridges=(BLIND_RIDGE, BLIND_RIDGE), folds=3, grid_extensions=0)
    assert gain(labels, blind).mean == pytest.approx(0.0, abs=1e-6)
    one = labels.where_prompt(torch.arange(int(labels.prompts_N.max()) + 1) == 0)
    assert gain(one).low is None
