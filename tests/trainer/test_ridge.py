"""What ridge learns from noisy ratings of answers whose utility is known."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rating_world import LINEAR, QUICK, rated_world

from feedback.errors import TrainingRefused
from trainer.config import RewardModelSettings
from trainer.feature_map import FeatureMap
from trainer.held_out import held_out
from trainer.labels import Labels
from trainer.problem import Parameters, build_problem, minimise, precisions, prompt_features
from trainer.reward_model import fit, load
from trainer.ridge import cross_validate, folds_of


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
    shuffled = world.labels.shuffled(0)
    accuracy = held_out(shuffled, cross_validate(shuffled, LINEAR), None)["prompts"]
    assert accuracy is not None and accuracy.low < 0.5


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


def test_no_ratings_no_model() -> None:
    labels = rated_world(13).labels
    none = labels.select(torch.zeros(len(labels.choices), dtype=torch.bool), torch.zeros(len(labels.thumbs), dtype=torch.bool))
    with pytest.raises(TrainingRefused, match="0 ratings"):
        fit(none, QUICK)


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


def test_a_score_does_not_depend_on_its_batch() -> None:
    labels = rated_world(11).labels
    feature_map = FeatureMap.fit("quadratic", labels.features_ND, labels.prompts_N)
    whole = feature_map(labels.features_ND)
    assert torch.allclose(torch.cat([feature_map(row[None]) for row in labels.features_ND[:5]]), whole[:5], atol=1e-12)


def test_folds_are_balanced_and_drawn_by_the_seed() -> None:
    assert torch.bincount(folds_of(10, 5, 0)).tolist() == [2] * 5
    assert folds_of(10, 5, 0).tolist() == folds_of(10, 5, 0).tolist() != folds_of(10, 5, 1).tolist()
    assert torch.bincount(folds_of(3, 5, 0)).tolist() == [1] * 3
