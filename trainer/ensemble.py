"""A reward model with an adapter of its own and an ensemble of heads: for some 2,000 choices and more.

Three steps. Ridge on frozen features gives scores and thresholds to begin with. The adapter, which begins as nothing
(B = 0), learns for one epoch what ridge left over, by the same likelihood; a second epoch overfits (Ouyang et al. 2022,
InstructGPT). Then heads are fitted to convergence on the adapter's features, each around a random prior of its own
(Osband, Aslanides, Cassirer 2018) and with its own random weights of the ratings (Newton, Raftery 1994), so that their
spread is what the ratings leave open.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from feedback.errors import TrainingRefused
from trainer.config import RewardModelSettings
from trainer.feature_map import FeatureMap
from trainer.labels import Labels
from trainer.model_file import ModelFile
from trainer.policy import GROUP_TOKENS, Policy
from trainer.problem import Parameters, Problem, build_problem, minimise, one_thread, prompt_features
from trainer.reply import Reply, by_tokens
from trainer.ridge import CrossFit, described

BATCH = 32
"""Ratings of one step of the adapter."""
MICROBATCH = 4
"""Ratings whose answers' activations exist at once."""


@dataclass(frozen=True)
class Ensemble(ModelFile):
    """Scores answers by their features under its own adapter. Made by `fit_ensemble`."""

    feature_map: FeatureMap
    heads_PM: Tensor
    """Weights of each member."""
    adapter: dict[str, Tensor]
    """Weights by their names without the adapter's."""
    about: dict[str, object]
    policy: Policy | None = None
    """The backbone that the adapter is put on."""

    def features(self, replies: Sequence[Reply], frozen_BD: Tensor) -> Tensor:
        """A pass over the replies with the adapter on. Raises TrainingRefused where no policy came with the file."""
        if self.policy is None:
            raise TrainingRefused("reward model: an ensemble reads answers itself and was loaded without a policy", field="policy")
        name = f"reward_{self.id[:16]}"
        if name not in self.policy.model.peft_config:
            rank = int(str(self.about["rank"]))
            self.policy.add_adapter(name, rank=rank, alpha=2 * rank, seed=0)
            self.policy.restore({full: self.adapter[full.replace(f".{name}.", ".")] for full in self.policy.state(name)})
        return _read(self.policy, name, replies)

    def mapped(self, features_BD: Tensor) -> Tensor:
        """The members' scores, B x M."""
        return self.feature_map(features_BD) @ self.heads_PM

    def score_mapped(self, mapped_BM: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and sd over the members, both of shape B."""
        return mapped_BM.mean(1), self.spread(mapped_BM).norm(dim=1)

    def spread(self, mapped_BM: Tensor) -> Tensor:
        """Members' scores from their mean, so that the squared length is their variance."""
        members = mapped_BM.shape[1]
        away_BM: Tensor = (mapped_BM - mapped_BM.mean(1, keepdim=True)) / (members - 1) ** 0.5
        return away_BM

    def tensors(self) -> dict[str, Tensor]:
        """Map, heads and adapter."""
        adapter = {f"adapter.{name}": value for name, value in self.adapter.items()}
        return {"heads": self.heads_PM, **self.feature_map.tensors(), **adapter}

    @classmethod
    def from_tensors(cls, about: dict[str, object], tensors: dict[str, Tensor], policy: Policy | None) -> Ensemble:
        """What was in a file of `save`."""
        adapter = {name.removeprefix("adapter."): value for name, value in tensors.items() if name.startswith("adapter.")}
        return cls(FeatureMap.from_tensors(str(about["map"]), tensors), tensors["heads"], adapter, about, policy)


@one_thread()
def fit_ensemble(labels: Labels, settings: RewardModelSettings, chosen: CrossFit, policy: Policy) -> Ensemble | None:
    """The ensemble of these ratings, or None where ridge on frozen features foresees the first fold of prompts better.

    Map and ridge are those of `chosen`. Trains twice: without the first fold of prompts, to compare, and with all. On one thread of a
    CPU, because more of them add up in another order, and the same ratings shall give the same bytes.
    Raises TrainingRefused where the labels hold no tokens.
    """
    if len(labels.replies) != len(labels.answers) or not labels.replies:
        raise TrainingRefused("reward model: the labels hold no tokens, an ensemble reads answers itself", field="labels")
    outside = labels.where_prompt(chosen.fold_of_Q == 0)
    inside = labels.where_prompt(chosen.fold_of_Q != 0)
    if outside.count == 0 or inside.count == 0:
        return None
    trial = _fit(inside, settings, chosen, policy)
    nll = {
        "ridge": float(trial.start.loss(Parameters.split(trial.begun, trial.start.sizes), outside, weighted=False)) / outside.count,
        "ensemble": float(trial.problem.loss(trial.parameters, outside, weighted=False)) / outside.count,
    }
    if nll["ensemble"] >= nll["ridge"]:
        return None
    made = _fit(labels, settings, chosen, policy)
    about: dict[str, object] = {
        "family": "ensemble",
        **described(made.problem, made.parameters, chosen),
        "members": settings.ensemble_members,
        "rank": settings.ensemble_rank,
        "first_fold_nll": nll,
        "seed": settings.seed,
    }
    heads_PM = made.found_MF[:, : made.problem.sizes[0]].T.contiguous()
    return Ensemble(made.feature_map, heads_PM, made.adapter, about, policy)


@torch.no_grad()
def _read(policy: Policy, name: str, replies: Sequence[Reply]) -> Tensor:
    """What `hidden` gives of each reply with this adapter on; B x F."""
    features_BF = torch.zeros(len(replies), policy.feature_size)
    with policy.using(name):
        for group in by_tokens(replies, GROUP_TOKENS):
            features_BF[torch.tensor(group)] = policy.hidden([replies[i] for i in group])[2].cpu()
    return features_BF


@dataclass(frozen=True)
class _Fitted:
    start: Problem
    """On frozen features."""
    begun: Tensor
    adapter: dict[str, Tensor]
    feature_map: FeatureMap
    problem: Problem
    """On the adapter's features."""
    found_MF: Tensor
    """Each member's parameters, flat."""

    @property
    def parameters(self) -> Parameters:
        """The members' mean: likelihoods are of mean scores, which are linear in them."""
        return Parameters.split(self.found_MF.mean(0), self.problem.sizes)


def _fit(labels: Labels, settings: RewardModelSettings, chosen: CrossFit, policy: Policy) -> _Fitted:
    prompts_QZ = prompt_features(labels)
    frozen_map = FeatureMap.fit(chosen.map, labels.features_ND, labels.prompts_N)
    start = build_problem(frozen_map(labels.features_ND), labels, prompts_QZ, settings.max_rater_share)
    begun = minimise(start, chosen.ridge)
    name = "reward_in_training"
    policy.drop_adapter(name)
    policy.add_adapter(name, rank=settings.ensemble_rank, alpha=2 * settings.ensemble_rank, seed=settings.seed)
    try:
        _one_epoch(policy, name, start, frozen_map, begun, settings)
        adapter = {full.replace(f".{name}.", "."): value.cpu() for full, value in policy.state(name).items()}
        features_ND = _read(policy, name, labels.replies)
    finally:
        policy.drop_adapter(name)
    feature_map = FeatureMap.fit(chosen.map, features_ND, labels.prompts_N)
    problem = build_problem(feature_map(features_ND), labels, prompts_QZ, settings.max_rater_share)
    return _Fitted(start, begun, adapter, feature_map, problem, heads(problem, chosen.ridge, settings.ensemble_members, settings.seed))


@one_thread()
def heads(problem: Problem, ridge: float, members: int, seed: int) -> Tensor:
    """Parameters of each member, M x F: modes around priors drawn N(0, prior), ratings weighted by draws of Exp(1).

    Where all is Gaussian, the first alone gives the spread S·P·S of a posterior with covariance S and prior precision P, the second
    gives S·I·S for information I, and S·(P + I)·S = S.
    """
    generator = torch.Generator().manual_seed(seed)
    found: list[Tensor] = []
    for _ in range(members):
        anchor = torch.randn(sum(problem.sizes), generator=generator, dtype=torch.float64)
        by_choice, by_thumb = (
            torch.empty_like(w).exponential_(generator=generator) for w in (problem.choice_weights, problem.thumb_weights)
        )
        member = replace(problem, choice_weights=problem.choice_weights * by_choice, thumb_weights=problem.thumb_weights * by_thumb)
        found.append(minimise(member, ridge, found[-1] if found else None, anchor=anchor))
    return torch.stack(found)


def _one_epoch(policy: Policy, name: str, problem: Problem, feature_map: FeatureMap, begun: Tensor, settings: RewardModelSettings) -> None:
    """Train the adapter on every rating once, heads and thresholds held where ridge left them."""
    parameters = Parameters.split(begun, problem.sizes)
    weights = policy.parameters_of(name)
    optimiser = torch.optim.AdamW(weights, lr=settings.ensemble_learning_rate, weight_decay=0.0)
    batches = list(_batches(problem, settings.seed))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - 0.9 * step / len(batches))
    for parts in batches:
        ratings = sum(part.labels.count for part in parts)
        for part in parts:
            choices, thumbs = part.labels.choices, part.labels.thumbs
            used = sorted({*choices.first.tolist(), *choices.second.tolist(), *thumbs.answers.tolist()})
            with policy.using(name):
                features_BF = policy.hidden([problem.labels.replies[i] for i in used])[2].cpu()
            scores_N = torch.zeros(len(problem.mapped_NP), dtype=torch.float64)
            scores_N = scores_N.index_put((torch.tensor(used),), feature_map(features_BF) @ parameters.weights_P)
            loss = part.loss(parameters, scores_N=scores_N) / ratings
            loss.backward()  # type: ignore[no-untyped-call]
        if not all(bool(torch.isfinite(weight.grad).all()) for weight in weights if weight.grad is not None):
            raise TrainingRefused("reward model: a gradient of its adapter is not finite", field="ensemble_learning_rate")
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        schedule.step()


def _batches(problem: Problem, seed: int) -> Iterator[list[Problem]]:
    """The ratings in batches, each in parts that fit into memory; those of one prompt lie together, prompts in random order."""
    labels = problem.labels
    prompt_R = torch.cat([labels.prompts_N[labels.choices.first], labels.prompts_N[labels.thumbs.answers]])
    rank_Q = torch.randperm(int(labels.prompts_N.max()) + 1, generator=torch.Generator().manual_seed(seed))
    order_R = torch.argsort(rank_Q[prompt_R], stable=True)
    for batch in torch.split(order_R, BATCH):
        yield [_only(problem, rows) for rows in torch.split(batch, MICROBATCH)]


def _only(problem: Problem, rows: Tensor) -> Problem:
    """These ratings, choices first and then thumbs, with their weights."""
    choices = len(problem.labels.choices)
    chosen, thumbs = rows[rows < choices], rows[rows >= choices] - choices
    return replace(
        problem,
        labels=problem.labels.select(chosen, thumbs),
        choice_weights=problem.choice_weights[chosen],
        thumb_weights=problem.thumb_weights[thumbs],
    )
