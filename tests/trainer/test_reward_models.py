"""One contract for every kind of reward model: what scores answers need not know which one it has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rating_world import RatedWorld, token_world
from tiny_policy import make_tiny_policy

from feedback.errors import TrainingRefused
from trainer.config import RewardModelSettings
from trainer.ensemble import Ensemble, heads
from trainer.labels import Labels
from trainer.policy import Policy
from trainer.reply import Reply
from trainer.reward_model import RewardModel, fit, load
from trainer.ridge import RidgeModel, cross_validate
from trainer.score import Scorer
from trainer.stages import whose_figures

# Of two words, means of frozen states leave an adapter little to add.
RIDGE = RewardModelSettings(maps=("last",), ridges=(0.3, 3.0), folds=3, grid_extensions=1)
ENSEMBLE = RIDGE.model_copy(update={"ensemble_from_choices": 1, "ensemble_members": 4, "ensemble_learning_rate": 1e-2})
SETTINGS = {"ridge": RIDGE, "ensemble": ENSEMBLE}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="module")
def world(folder: Path) -> RatedWorld:
    return token_world(Policy.load(folder), seed=2)


@pytest.fixture(scope="module", params=["ridge", "ensemble"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model(kind: str, folder: Path, world: RatedWorld) -> RewardModel:
    return fit(world.labels, SETTINGS[kind], policy=Policy.load(folder))


def scores(model: RewardModel, labels: Labels) -> torch.Tensor:
    return model.score(model.features(labels.replies, labels.features_ND))[0]


def test_it_is_the_kind_that_was_asked_for(kind: str, model: RewardModel) -> None:
    assert model.about["family"] == kind
    assert isinstance(model, {"ridge": RidgeModel, "ensemble": Ensemble}[kind])


def test_it_is_told_whose_figures_are_not_the_ensembles_own(kind: str, model: RewardModel) -> None:
    told = whose_figures(model.about)
    if kind == "ridge":
        assert told == []
    else:
        first_fold: Any = model.about["first_fold_nll"]
        assert first_fold["ensemble"] < first_fold["ridge"]
        assert f"the ensemble took {first_fold['ensemble']:.3f} nats a rating and ridge {first_fold['ridge']:.3f}" in told[0]
        assert "accuracy, calibration and likelihood on unseen ratings are ridge's on frozen features" in told[0]


def test_it_orders_answers_by_their_hidden_utility(model: RewardModel, world: RatedWorld) -> None:
    assert world.agreement(scores(model, world.labels)) > 0.65


def test_it_survives_a_file_and_reads_with_another_backbone(
    kind: str, model: RewardModel, world: RatedWorld, folder: Path, tmp_path: Path
) -> None:
    model.save(tmp_path / "model")
    again = load(tmp_path / "model", Policy.load(folder, seed=7))
    assert again.id == model.id and again.about == model.about
    assert torch.equal(scores(again, world.labels), scores(model, world.labels))
    with pytest.raises(TrainingRefused, match="no file"):
        load(tmp_path / "nothing")


@pytest.mark.slow
def test_the_same_labels_give_the_same_bytes(kind: str, model: RewardModel, world: RatedWorld, folder: Path) -> None:
    used = Policy.load(folder)
    used.add_adapter("other", rank=2, alpha=4, seed=3)
    assert fit(world.labels, SETTINGS[kind], policy=used).id == model.id


def test_the_number_of_threads_reaches_no_pass_of_a_fit(world: RatedWorld, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Threads add up in another order, in passes larger than the tests'.
    seen: set[int] = set()
    hidden = Policy.hidden

    def look(policy: Policy, replies: Sequence[Reply]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        seen.add(torch.get_num_threads())
        return hidden(policy, replies)

    threads = torch.get_num_threads()
    chosen, policy = cross_validate(world.labels, ENSEMBLE), Policy.load(folder)
    monkeypatch.setattr(Policy, "hidden", look)
    torch.set_num_threads(2)
    try:
        fit(world.labels, ENSEMBLE, chosen, policy)
        assert seen == {1} and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_differences_of_mapped_rows_are_differences_of_scores(model: RewardModel, world: RatedWorld) -> None:
    features_ND = model.features(world.labels.replies, world.labels.features_ND)
    mean_N, sd_N = model.score(features_ND)
    gaps_B, doubt_B = model.score_mapped(model.mapped(features_ND[:8]) - model.mapped(features_ND[8:16]))
    assert torch.allclose(gaps_B, mean_N[:8] - mean_N[8:16], atol=1e-9)
    assert bool((sd_N > 0).all()) and bool((doubt_B > 0).all())
    same_B, none_B = model.score_mapped(model.mapped(features_ND[:8]) - model.mapped(features_ND[:8]))
    assert same_B.abs().max() == 0.0 and none_B.max() == 0.0


def test_the_policy_is_left_as_it_was(model: RewardModel, world: RatedWorld, folder: Path) -> None:
    policy = Policy.load(folder)
    before_BT, _ = policy.logprobs(world.labels.replies[:4], 1.0)
    if isinstance(model, Ensemble):
        model = replace(model, policy=policy)
    frozen_BD = policy.features(world.labels.replies[:4])
    Scorer.fit(model, world.labels.replies[:16], world.labels.features_ND[:16], 4.0)(world.labels.replies[:4], frozen_BD)
    assert torch.equal(policy.logprobs(world.labels.replies[:4], 1.0)[0], before_BT)
    assert torch.equal(policy.features(world.labels.replies[:4]), frozen_BD)
    assert all(".default." in name for name in policy.state())


@pytest.mark.slow
def test_flipped_ratings_flip_the_score(kind: str, model: RewardModel, world: RatedWorld, folder: Path) -> None:
    labels = world.labels
    flipped = replace(labels, choices=replace(labels.choices, first=labels.choices.second, second=labels.choices.first))
    flipped = replace(flipped, thumbs=replace(labels.thumbs, outcomes=1 - labels.thumbs.outcomes))
    wrong = fit(flipped, SETTINGS[kind], policy=Policy.load(folder))
    assert world.agreement(scores(wrong, labels)) < 0.35


def test_an_ensemble_says_what_it_lacks(model: RewardModel, world: RatedWorld, folder: Path) -> None:
    if not isinstance(model, Ensemble):
        assert torch.equal(model.features((), world.labels.features_ND), world.labels.features_ND)
        return
    with pytest.raises(TrainingRefused, match="without a policy"):
        replace(model, policy=None).features(world.labels.replies, world.labels.features_ND)
    with pytest.raises(TrainingRefused, match="no tokens"):
        fit(replace(world.labels, replies=()), ENSEMBLE, policy=Policy.load(folder))


def test_the_heads_spread_is_the_posterior_of_laplace(world: RatedWorld) -> None:
    """Two ways to the same doubt: curvature at the optimum, and random priors with random weights."""
    chosen = cross_validate(world.labels, RIDGE)
    ridge = fit(world.labels, RIDGE, chosen)
    problem = replace(chosen.folds[0].problem, labels=world.labels)
    choices, thumbs = len(world.labels.choices), len(world.labels.thumbs)
    whole = replace(problem, choice_weights=torch.ones(choices, dtype=torch.float64), thumb_weights=torch.ones(thumbs, dtype=torch.float64))
    found_MF = heads(whole, chosen.ridge, 24, seed=0)
    sd_N = (problem.mapped_NP @ found_MF[:, : problem.sizes[0]].T).std(1)
    # The sd of a spread of 24 is 15 %; the mean over 192 answers in 32 dimensions comes closer.
    assert 0.8 < float((sd_N / ridge.score(world.labels.features_ND)[1]).mean()) < 1.25
