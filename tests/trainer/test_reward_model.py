"""What a reward model learns from noisy ratings of answers whose utility is known."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rating_world import RATERS, rated_world

from feedback.errors import TrainingRefused
from feedback.snapshot import Row
from trainer.config import RewardModelSettings
from trainer.feature_map import FeatureMap
from trainer.held_out import BLIND_RIDGE, Accuracy, Gain, clustered_mean, held_out, likelihood_gain, unseen_raters
from trainer.labels import Labels, Thumbs, check
from trainer.likelihood import BOTH_BAD
from trainer.problem import Parameters, build_problem, minimise, precisions, prompt_features
from trainer.reward_model import fit, load, split_raters
from trainer.ridge import cross_validate, folds_of
from trainer.score import Normaliser, Scorer
from trainer.tastes import tastes

QUICK = RewardModelSettings(ridges=(0.3, 3.0), folds=3, grid_extensions=2)
LINEAR = RewardModelSettings(maps=("linear",), ridges=(0.3, 3.0), folds=3, grid_extensions=2)


def foreseen(labels: Labels) -> dict[str, Accuracy | None]:
    chosen = cross_validate(labels, LINEAR)
    return held_out(labels, chosen, unseen_raters(labels, LINEAR, chosen))


def test_it_orders_answers_by_their_hidden_utility() -> None:
    world = rated_world(1)
    model = fit(world.labels, QUICK)
    # 0.5 is chance; 400 ratings of a linear preference in 24 dimensions.
    assert world.agreement(model.score(world.labels.features_ND)[0]) > 0.88


@pytest.mark.slow
def test_an_optimum_in_the_middle_needs_the_quadratic_map_and_gets_it() -> None:
    world = rated_world(2, quadratic=True)
    features = world.labels.features_ND
    model = fit(world.labels, QUICK)
    assert model.about["map"] == "quadratic"
    linear = fit(world.labels, LINEAR)
    assert world.agreement(model.score(features)[0]) > world.agreement(linear.score(features)[0]) + 0.1


def test_shuffled_labels_teach_nothing() -> None:
    world = rated_world(3)
    model = fit(world.labels.shuffled(0), LINEAR)
    assert abs(world.agreement(model.score(world.labels.features_ND)[0]) - 0.5) < 0.15
    accuracy = foreseen(world.labels.shuffled(0))["prompts"]
    assert accuracy is not None and accuracy.low < 0.5


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


def test_flipped_choices_and_thumbs_flip_the_score() -> None:
    labels = rated_world(4).labels
    flipped = replace(
        labels,
        choices=replace(labels.choices, first=labels.choices.second, second=labels.choices.first),
        thumbs=replace(labels.thumbs, outcomes=1 - labels.thumbs.outcomes),
    )
    right, wrong = (fit(some, LINEAR).score(labels.features_ND)[0] for some in (labels, flipped))
    assert torch.corrcoef(torch.stack([right, wrong]))[0, 1] < -0.5


@pytest.mark.slow
def test_the_same_labels_give_the_same_bytes_and_survive_a_file(tmp_path: Path) -> None:
    labels = rated_world(5).labels
    labels.save(tmp_path / "labels.safetensors")
    again = Labels.load(tmp_path / "labels.safetensors")
    assert again.digest == labels.digest
    model, same = fit(labels, QUICK), fit(again, QUICK)
    assert model.id == same.id
    model.save(tmp_path / "model.safetensors")
    loaded = load(tmp_path / "model.safetensors")
    assert loaded.id == model.id
    assert torch.equal(loaded.score(labels.features_ND)[0], model.score(labels.features_ND)[0])
    with pytest.raises(TrainingRefused, match="no file"):
        load(tmp_path / "nothing")


def test_more_ratings_leave_less_doubt() -> None:
    few, many = (rated_world(6, choices=n, thumbs=n).labels for n in (40, 400))
    fixed = RewardModelSettings(maps=("linear",), ridges=(1.0, 1.0), folds=2, grid_extensions=0)
    doubts = [float(fit(labels, fixed).score(labels.features_ND)[1].mean()) for labels in (few, many)]
    assert doubts[1] < 0.7 * doubts[0]


def test_the_grid_grows_until_its_edge_is_not_the_best() -> None:
    labels = rated_world(7).labels
    found = cross_validate(labels, RewardModelSettings(maps=("linear",), ridges=(1e-5, 1e-4), folds=3, grid_extensions=8))
    assert found.trials[0].ridge < found.ridge < found.trials[-1].ridge and not found.at_edge
    assert found.nll == min(trial.nll for trial in found.trials)


def test_the_walk_over_the_grid_ends_where_the_whole_grid_has_its_best() -> None:
    labels = rated_world(14).labels
    ridges = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
    walked = cross_validate(labels, RewardModelSettings(maps=("linear",), ridges=ridges, folds=3))
    alone = [cross_validate(labels, RewardModelSettings(maps=("linear",), ridges=(r, r), folds=3, grid_extensions=0)) for r in ridges]
    best = min(alone, key=lambda t: t.nll)
    assert len(walked.trials) < len(alone)
    assert walked.ridge == best.ridge and walked.nll == pytest.approx(best.nll, abs=1e-5)


def test_a_fit_ends_where_the_posterior_is_flat() -> None:
    labels = rated_world(15).labels
    mapped_NP = FeatureMap.fit("linear", labels.features_ND, labels.prompts_N)(labels.features_ND)
    problem = build_problem(mapped_NP, labels, prompt_features(labels), 0.5)
    found = minimise(problem, 1.0, tolerance=1e-6).requires_grad_(True)
    precision = precisions(problem, 1.0)
    loss = problem.loss(Parameters.split(found, problem.sizes)) + (precision * found.square()).sum() / 2
    (slope,) = torch.autograd.grad(loss, found)
    # In nats for each prior's sd; a wrong sign or a forgotten prior leaves tens of them.
    assert (slope * precision.rsqrt()).abs().max() < 1e-5
    again = minimise(problem, 1.0, start=found.detach() + 0.1, tolerance=1e-6)
    assert torch.allclose(again, found.detach(), atol=1e-5)


def test_what_hardly_differs_within_prompts_is_not_all_that_a_score_sees() -> None:
    # One prompt of 40 has two answers, which differ by 2 in the first feature, so its sd is 1, and by 0.02 in the second: 0.01, but the
    # whole sd is 1, so 0.1 counts. The third tells prompts apart only.
    whole = torch.tensor([1.0, -1.0]).repeat(20)
    features_ND = torch.stack([whole, whole, whole], dim=1)
    features_ND = torch.cat([features_ND, features_ND[:1] - torch.tensor([[2.0, 0.02, 0.0]])])
    prompts_N = torch.cat([torch.arange(40), torch.zeros(1, dtype=torch.long)])
    scale_D = FeatureMap.fit("linear", features_ND, prompts_N).scale_D
    sd_D = features_ND.double().std(0, correction=0)
    assert scale_D.tolist() == pytest.approx([1.0, 0.1 * float(sd_D[1]), 0.1 * float(sd_D[2])], abs=1e-5)


def test_folds_are_balanced_and_drawn_by_the_seed() -> None:
    assert torch.bincount(folds_of(10, 5, 0)).tolist() == [2] * 5
    assert folds_of(10, 5, 0).tolist() == folds_of(10, 5, 0).tolist() != folds_of(10, 5, 1).tolist()
    assert torch.bincount(folds_of(3, 5, 0)).tolist() == [1] * 3


def test_held_out_accuracy_of_prompts_raters_and_length() -> None:
    found = foreseen(rated_world(8).labels)
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


def test_each_prompt_gets_its_own_zero_and_the_base_its_unit() -> None:
    labels = rated_world(10).labels
    model = fit(labels, LINEAR)
    prompts = [(int(p),) for p in labels.prompts_N]
    scorer = Scorer(model, Normaliser.fit(model, prompts, labels.features_ND), clip=4.0)
    scores = scorer.score(prompts, labels.features_ND)
    assert scorer.base_scores.mean().item() == pytest.approx(0.0, abs=0.02)
    spread = torch.stack([scores[labels.prompts_N == p].var() for p in range(3)]).mean().sqrt().item()
    assert 0.5 < spread < 1.5
    # A score does not hang on who else is scored.
    backwards = scorer.score(prompts[::-1], labels.features_ND.flip(0)).flip(0)
    alone = torch.cat([scorer.score(prompts[i : i + 1], labels.features_ND[i : i + 1]) for i in range(10)])
    assert torch.allclose(scores, backwards, atol=1e-5)
    assert torch.allclose(scores[:10], alone, atol=1e-5)
    # A shift of all answers to a prompt, zero included, changes nothing.
    moved = labels.features_ND + 7.0
    shifted = Scorer(model, Normaliser.fit(model, prompts, moved), clip=4.0).score(prompts, moved)
    assert torch.allclose(scores, shifted, atol=1e-4)
    assert scorer.score(prompts[:1], 1000 * labels.features_ND[:1]).abs().item() == 4.0
    with pytest.raises(TrainingRefused, match="1 prompts have no base answers"):
        scorer.score([(99,)], labels.features_ND[:1])
    with pytest.raises(TrainingRefused, match="at least 2"):
        Normaliser.fit(model, [(0,)], labels.features_ND[:1])


def test_a_score_does_not_depend_on_its_batch() -> None:
    labels = rated_world(11).labels
    feature_map = FeatureMap.fit("quadratic", labels.features_ND, labels.prompts_N)
    whole = feature_map(labels.features_ND)
    assert torch.allclose(torch.cat([feature_map(row[None]) for row in labels.features_ND[:5]]), whole[:5], atol=1e-12)


def test_other_raters_make_the_second_model() -> None:
    labels = rated_world(12).labels
    main, watch = split_raters(labels, 0.25, 3, labels.count // 4, seed=0)
    assert watch is not None
    assert not set(main.choices.raters.tolist()) & set(watch.choices.raters.tolist())
    assert len(set(watch.thumbs.raters.tolist())) == 3  # a quarter of 12
    assert main.count + watch.count == labels.count
    assert split_raters(labels, 0.25, 4, 1, seed=0)[1] is None
    assert split_raters(labels, 0.25, 3, labels.count // 4 + 1, seed=0)[1] is None


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


def test_no_ratings_no_model() -> None:
    labels = rated_world(13).labels
    none = labels.select(torch.zeros(len(labels.choices), dtype=torch.bool), torch.zeros(len(labels.thumbs), dtype=torch.bool))
    with pytest.raises(TrainingRefused, match="0 ratings"):
        fit(none, QUICK)


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
