"""PPO for a LoRA adapter, from top to bottom in the papers' names (Schulman et al. 2017, Ziegler et al. 2019).

One iteration: sample replies; one adapter-off pass for the reference's log-probabilities and the reward's features;
one adapter-on pass for the old log-probabilities and the critic's values; scores; rewards with a KL penalty; advantages;
a few epochs of clipped updates. The KL controller steers towards a budget, and the adapter that is released is one
whose KL was measured within it.

RLOO (Ahmadian et al. 2024) is the same path with one action a reply instead of one a token, and the other samples of its
prompt instead of a critic.

Shapes: B replies of an iteration, T tokens of the longest, A actions (T, or 1 with RLOO), D the backbone's width; G replies of a group
that go through the model together, where T and A end with its own longest.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from feedback.errors import TrainingRefused
from trainer import distributed
from trainer.advantages import gae, leave_one_out, token_rewards
from trainer.budget import Result, Run, Step, Watched
from trainer.config import PPOSettings
from trainer.critic import Critic, Warmup
from trainer.losses import explained_variance, importance_weights, k1, masked_whiten, policy_loss, value_loss
from trainer.policy import Policy
from trainer.reply import Reply, by_tokens
from trainer.rollouts import LocalRollouts, Rollouts, alarms

Score = Callable[[list[Reply], Tensor], Tensor]
"""(replies, features_BD) -> scores_B. A reward model reads the features, a known preference decodes the replies."""
Watch = Callable[[list[Reply], Tensor], Watched]
"""The same for the reward model of other raters, about all replies together."""


@dataclass(frozen=True)
class Options:
    """What a run may also have."""

    rollouts: Rollouts | None = None
    """Default: in this process."""
    watch: Watch | None = None
    """The reward model of other raters: it may only stop earlier."""
    warmup: Warmup | None = None
    on_step: Callable[[Step], None] | None = None
    checkpoint: Path | None = None
    """Written after every iteration."""


@dataclass(frozen=True)
class Batch:
    """What the epochs of an iteration learn from; `values_BT` and `returns_BT` are the critic's."""

    replies: list[Reply]
    old_BA: Tensor
    advantages_BA: Tensor
    actions_BA: Tensor
    """1 on real actions."""
    weights_BA: Tensor | None
    """Truncated importance weights where another engine sampled."""
    mask_BT: Tensor
    values_BT: Tensor
    returns_BT: Tensor


def train(
    policy: Policy,
    prompts: Sequence[tuple[int, ...]],
    score: Score,
    settings: PPOSettings,
    *,
    max_tokens: int,
    temperature: float,
    seed: int = 0,
    options: Options | None = None,
) -> Result:
    """Improve the policy's adapter in place. Resumes from `options.checkpoint` where it exists, bit-equal on a CPU.

    Raises TrainingRefused on no prompts, and on a score, loss or gradient that is not finite (naming step and minibatch; the last
    checkpoint is kept).
    """
    options = options or Options()
    if not prompts:
        raise TrainingRefused("PPO: 0 prompts, at least 1 is needed", field="prompts")
    rollouts = options.rollouts or LocalRollouts(policy)
    rloo = settings.algorithm == "rloo"
    samples = settings.rloo_samples if rloo else 1
    rank = settings.rank if settings.critic == "adapter" else 0
    critic = None if rloo else Critic(policy, rank=rank, alpha=settings.alpha, seed=seed + 1)
    groups = [{"params": policy.parameters, "lr": settings.learning_rate}]
    if critic is not None:
        groups.append({"params": critic.trained, "lr": settings.critic_learning_rate})
    optimiser = torch.optim.AdamW(groups, eps=1e-5, weight_decay=0.0)
    # A digest, because a checkpoint must not hold what people wrote.
    run = Run(settings, hashlib.sha256(repr((list(prompts), max_tokens, temperature, seed)).encode()).hexdigest())
    resumed = run.resume(options.checkpoint, policy, critic, optimiser)
    if not resumed and critic is not None and options.warmup is not None:
        known = options.warmup
        less_B = _penalised(known.scores_B.float(), known.replies, settings)
        critic.warm_up(Warmup(known.replies, less_B), optimiser, settings.minibatch, settings.microbatch_tokens)

    for step in range(run.next_step, settings.iterations + 1):
        # --- rollouts -------------------------------------------------------------------------------------------------
        started = time.perf_counter()
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        count = settings.rollouts // samples
        drawn = torch.randperm(len(prompts) * (1 + count // len(prompts)), generator=generator)[:count]
        batch = [prompts[int(i) % len(prompts)] for i in drawn for _ in range(samples)]
        sampled = rollouts.sample(batch, max_tokens=max_tokens, temperature=temperature, seed=seed * 1_000_003 + step)
        replies = sampled.replies
        generated = time.perf_counter()

        # --- reference, reward and values -----------------------------------------------------------------------------
        # All of them go through the model in the first epoch's groups: its first ratio is then exactly 1, and a fresh adapter's KL 0.
        minibatches = _minibatches(torch.arange(len(replies)), replies, settings)
        first_groups = [group for minibatch in minibatches for group in minibatch]
        reference_BT, mask_BT, features_BD = policy.reference_pass(replies, temperature, first_groups)
        old_BT, _, values_BT, _ = policy.passes(replies, temperature, first_groups, critic)
        finished_B = torch.tensor([float(reply.finished) for reply in replies])
        given_B = distributed.from_first(score(replies, features_BD))
        scores_B = _penalised(given_B.float(), replies, settings).to(policy.device)
        if not torch.isfinite(scores_B).all():
            raise TrainingRefused(f"PPO: a score is not finite in step {step}; the last checkpoint is kept", field="score")
        watched = distributed.from_first(options.watch(replies, features_BD)) if options.watch else None
        kl_BT = k1(old_BT, reference_BT) * mask_BT
        scored = time.perf_counter()
        measured = Step(
            step=step,
            score=float(scores_B.mean()),
            stop_score=watched.score if watched else None,
            kl_nats=float(kl_BT.sum(1).mean()),
            beta=run.beta_for(float(mask_BT.sum(1).mean())),
            reply_tokens=float(mask_BT.sum(1).mean()),
            finished=float(finished_B.mean()),
            generate_s=generated - started,
            score_s=scored - generated,
            alarms=() if sampled.behaviour_BT is None else alarms(old_BT, sampled.behaviour_BT, mask_BT, whole_replies=rloo),
        )
        if run.judge(measured, policy, watched):
            if options.on_step:
                options.on_step(measured)
            break

        # --- advantages -----------------------------------------------------------------------------------------------
        rewards_BT = token_rewards(scores_B, kl_BT, mask_BT, measured.beta)
        if rloo:
            actions_BA, old_BA, returns_BT = torch.ones_like(old_BT[:, :1]), old_BT.sum(1, keepdim=True), rewards_BT
            advantages_BA = leave_one_out(rewards_BT.sum(1), samples)[:, None]
        else:
            actions_BA, old_BA = mask_BT, old_BT
            advantages_BA, returns_BT = gae(rewards_BT, values_BT, mask_BT, 1.0, settings.gae_lambda)
        weights_BA = None
        if sampled.behaviour_BT is not None:
            behaviour_BA = sampled.behaviour_BT.sum(1, keepdim=True) if rloo else sampled.behaviour_BT
            weights_BA = importance_weights(old_BA, behaviour_BA, settings.importance_cap)
        whitened_BA = masked_whiten(advantages_BA, actions_BA)
        learnt = Batch(replies, old_BA, whitened_BA, actions_BA, weights_BA, mask_BT, values_BT, returns_BT)

        # --- epochs of clipped updates --------------------------------------------------------------------------------
        logged: list[dict[str, float]] = []
        for epoch in range(settings.epochs):
            order = torch.randperm(len(replies), generator=generator)
            for i, minibatch in enumerate(minibatches if epoch == 0 else _minibatches(order, replies, settings)):
                where = f"step {step}, epoch {epoch}, minibatch {i}"
                logged.append(_update(policy, critic, learnt, minibatch, temperature, settings.clip, where))
                optimiser.step()
                optimiser.zero_grad()

        # --- what to look at, and the controller ----------------------------------------------------------------------
        means = {name: sum(row[name] for row in logged) / len(logged) for name in logged[0]}
        done = replace(
            measured,
            ratio=means["ratio"],
            clipfrac=means["clipfrac"],
            approx_kl=means["approx_kl"],
            value_loss=means["value_loss"],
            first_ratio_deviation=logged[0]["ratio_deviation"],
            explained_variance=0.0 if rloo else float(explained_variance(values_BT, returns_BT, mask_BT)),
            train_s=time.perf_counter() - scored,
        )
        run.finish(done)
        run.save(options.checkpoint, policy, critic, optimiser)
        if options.on_step:
            options.on_step(done)
    return run.result(policy)


def _update(
    policy: Policy, critic: Critic | None, batch: Batch, minibatch: list[list[int]], temperature: float, clip: float, where: str
) -> dict[str, float]:
    """Gradients of one minibatch, clipped, and what to look at.

    Each group's loss is a mean over its own actions; times its share of the minibatch's actions it adds up to the minibatch's mean. So
    neither the cut into groups nor the process that takes one changes the gradient: processes that share the groups out add up here.
    """
    rows = [i for group in minibatch for i in group]
    actions, tokens = batch.actions_BA[rows].sum(), batch.mask_BT[rows].sum()
    seen = dict.fromkeys(("ratio", "clipfrac", "approx_kl", "value_loss", "ratio_deviation"), 0.0)
    for group, counts in distributed.turns(minibatch):
        replies = [batch.replies[i] for i in group]
        states_GTD, mask_GT, _ = policy.hidden(replies)
        width = mask_GT.shape[1]
        logprobs_GA = policy.token_logprobs(states_GTD, mask_GT, replies, temperature)
        if batch.old_BA.shape[1] < batch.mask_BT.shape[1]:  # a reply is one action
            logprobs_GA = logprobs_GA.sum(1, keepdim=True)
        old_GA, advantages_GA, actions_GA = (x_BA[group, :width] for x_BA in (batch.old_BA, batch.advantages_BA, batch.actions_BA))
        weights_GA = None if batch.weights_BA is None else batch.weights_BA[group, :width]
        pi = policy_loss(logprobs_GA, old_GA, advantages_GA, actions_GA, clip, weights_GA)
        share = counts * actions_GA.sum() / actions
        _backward(pi.loss * share, where)
        for name in ("ratio", "clipfrac", "approx_kl"):
            seen[name] += float(getattr(pi, name).detach() * share)
        seen["ratio_deviation"] = max(seen["ratio_deviation"], float(pi.ratio_deviation))
        if critic is not None:  # after the policy's, so that only one pass's activations exist
            values_GT, old_GT, returns_GT = critic(replies, states_GTD), batch.values_BT[group, :width], batch.returns_BT[group, :width]
            v = value_loss(values_GT, old_GT, returns_GT, mask_GT, clip)
            share = counts * mask_GT.sum() / tokens
            _backward(v * share, where)
            seen["value_loss"] += float(v.detach() * share)
    distributed.total_gradients([*policy.parameters, *([] if critic is None else critic.trained)])
    for parameters in (policy.parameters, [] if critic is None else critic.adapter):
        if not torch.isfinite(torch.nn.utils.clip_grad_norm_(parameters, 1.0)):
            raise TrainingRefused(f"PPO: a gradient is not finite in {where}; the last checkpoint is kept", field="loss")
    everywhere = distributed.gather([seen])
    return {name: (max if name == "ratio_deviation" else sum)(part[name] for part in everywhere) for name in seen}


def _backward(loss: Tensor, where: str) -> None:
    if not distributed.all_agree(bool(torch.isfinite(loss))):
        raise TrainingRefused(f"PPO: the loss is {loss.item()} in {where}; the last checkpoint is kept", field="loss")
    loss.backward()  # type: ignore[no-untyped-call]


def _penalised(scores_B: Tensor, replies: Sequence[Reply], settings: PPOSettings) -> Tensor:
    """Less for replies that were cut off."""
    return scores_B - settings.unfinished_penalty * torch.tensor([float(not reply.finished) for reply in replies]).to(scores_B)


def _minibatches(order: Tensor, replies: Sequence[Reply], settings: PPOSettings) -> list[list[list[int]]]:
    """Minibatches in this order, each cut into groups of similar length whose activations exist at once."""
    parts = [order[start : start + settings.minibatch].tolist() for start in range(0, len(order), settings.minibatch)]
    return [[[part[i] for i in group] for group in by_tokens([replies[i] for i in part], settings.microbatch_tokens)] for part in parts]
