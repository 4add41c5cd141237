"""PPO for a LoRA adapter, from top to bottom in the papers' names (Schulman et al. 2017, Ziegler et al. 2019).

One iteration: sample replies; one adapter-off pass for the reference's log-probabilities and the reward's features;
one adapter-on pass for the old log-probabilities and the critic's states; scores; rewards with a KL penalty; GAE;
a few epochs of clipped updates. The KL controller steers towards a budget, and the adapter that is released is one
whose KL was measured within it.

Shapes: B replies of an iteration, T tokens of the longest, D the backbone's width.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from feedback.errors import TrainingRefused
from trainer.advantages import gae, token_rewards
from trainer.budget import Result, Run, Step
from trainer.config import PPOSettings
from trainer.critic import Critic
from trainer.losses import explained_variance, importance_weights, k1, masked_whiten, policy_loss, value_loss
from trainer.policy import GROUP_TOKENS, Policy
from trainer.reply import Reply, by_tokens
from trainer.rollouts import LocalRollouts, Rollouts

WARMUP_REPLIES = 64
"""Replies that the critic starts from: more would cost a big policy half a minute."""

Score = Callable[[list[Reply], Tensor], Tensor]
"""(replies, features_BD) -> scores_B. A reward model reads the features, a known preference decodes the replies."""


@dataclass(frozen=True)
class Warmup:
    """Scored replies of the reference, from which the critic starts."""

    replies: list[Reply]
    scores_B: Tensor


@dataclass(frozen=True)
class Options:
    """What a run may also have."""

    rollouts: Rollouts | None = None
    """Default: in this process."""
    stop_score: Score | None = None
    """The reward model of other raters: it may only stop earlier."""
    warmup: Warmup | None = None
    on_step: Callable[[Step], None] | None = None
    checkpoint: Path | None = None
    """Written after every iteration."""


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

    Raises TrainingRefused on a loss that is not finite (naming the step; the last checkpoint is kept) and on no prompts.
    """
    options = options or Options()
    if not prompts:
        raise TrainingRefused("PPO: 0 prompts, at least 1 is needed", field="prompts")
    rollouts = options.rollouts or LocalRollouts(policy)
    critic = Critic(policy.hidden_size)
    optimiser = torch.optim.AdamW(
        [{"params": policy.parameters, "lr": settings.learning_rate}, {"params": critic.parameters(), "lr": settings.critic_learning_rate}],
        eps=1e-5,
        weight_decay=0.0,
    )
    # A digest, because a checkpoint must not hold what people wrote.
    run = Run(settings, hashlib.sha256(repr((list(prompts), max_tokens, temperature, seed)).encode()).hexdigest())
    resumed = run.resume(options.checkpoint, policy, critic, optimiser)
    if not resumed and options.warmup is not None:
        _warm_up(critic, policy, options.warmup)

    for step in range(run.next_step, settings.iterations + 1):
        # --- rollouts -------------------------------------------------------------------------------------------------
        started = time.perf_counter()
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        drawn = torch.randperm(len(prompts) * (1 + settings.rollouts // len(prompts)), generator=generator)[: settings.rollouts]
        batch = [prompts[int(i) % len(prompts)] for i in drawn]
        sampled = rollouts.sample(batch, max_tokens=max_tokens, temperature=temperature, seed=seed * 1_000_003 + step)
        replies = sampled.replies
        generated = time.perf_counter()

        # --- reference, reward and values -----------------------------------------------------------------------------
        # All of them go through the model in the first epoch's groups: its first ratio is then exactly 1, and a fresh adapter's KL 0.
        first_epoch = _minibatches(torch.arange(len(replies)), replies, settings)
        groups = [micro for minibatch in first_epoch for micro in minibatch]
        reference_BT, mask_BT, features_BD = policy.reference_pass(replies, temperature, groups)
        old_BT, _, values_BT, _ = policy.passes(replies, temperature, groups, lambda some, states_BTD: critic(states_BTD))
        finished_B = torch.tensor([float(reply.finished) for reply in replies])
        scores_B = score(replies, features_BD).float() - settings.unfinished_penalty * (1 - finished_B)
        if not torch.isfinite(scores_B).all():
            raise TrainingRefused(f"PPO: a score is not finite in step {step}; the last checkpoint is kept", field="score")
        stop_score = float(options.stop_score(replies, features_BD).mean()) if options.stop_score else None
        kl_B = (k1(old_BT, reference_BT) * mask_BT).sum(1)
        scored = time.perf_counter()
        measured = Step(
            step=step,
            score=float(scores_B.mean()),
            stop_score=stop_score,
            kl_nats=float(kl_B.mean()),
            beta=run.beta_for(float(mask_BT.sum(1).mean())),
            reply_tokens=float(mask_BT.sum(1).mean()),
            finished=float(finished_B.mean()),
            generate_s=generated - started,
            score_s=scored - generated,
        )
        if run.judge(measured, policy):
            if options.on_step:
                options.on_step(measured)
            break

        # --- advantages -----------------------------------------------------------------------------------------------
        rewards_BT = token_rewards(scores_B, k1(old_BT, reference_BT), mask_BT, measured.beta)
        advantages_BT, returns_BT = gae(rewards_BT, values_BT, mask_BT, 1.0, settings.gae_lambda)
        advantages_BT = masked_whiten(advantages_BT, mask_BT)
        weights_BT = None
        if sampled.behaviour_BT is not None:
            weights_BT = importance_weights(old_BT, sampled.behaviour_BT, settings.importance_cap)

        # --- epochs of clipped updates --------------------------------------------------------------------------------
        logged: list[dict[str, float]] = []
        for epoch in range(settings.epochs):
            order = torch.randperm(len(replies), generator=generator)
            for minibatch in first_epoch if epoch == 0 else _minibatches(order, replies, settings):
                tokens = mask_BT[[i for micro in minibatch for i in micro]].sum()
                for micro in minibatch:
                    some = [replies[i] for i in micro]
                    states, mask, _ = policy.hidden(some)
                    width = mask.shape[1]
                    logprobs = policy.token_logprobs(states, mask, some, temperature)
                    weights = None if weights_BT is None else weights_BT[micro, :width]
                    pi = policy_loss(logprobs, old_BT[micro, :width], advantages_BT[micro, :width], mask, settings.clip, weights)
                    v = value_loss(critic(states), values_BT[micro, :width], returns_BT[micro, :width], mask, settings.clip)
                    loss = (pi.loss + v) * mask.sum() / tokens
                    if not torch.isfinite(loss):
                        raise TrainingRefused(f"PPO: the loss is {loss.item()} in step {step}; the last checkpoint is kept", field="loss")
                    loss.backward()  # type: ignore[no-untyped-call]
                    logged.append({name: float(value.detach()) for name, value in pi._asdict().items()} | {"value_loss": float(v.detach())})
                torch.nn.utils.clip_grad_norm_(policy.parameters, 1.0)
                optimiser.step()
                optimiser.zero_grad()

        # --- what to look at, and the controller ----------------------------------------------------------------------
        done = Step(
            **asdict(measured)
            | {name: sum(row[name] for row in logged) / len(logged) for name in ("ratio", "clipfrac", "approx_kl", "value_loss")}
            | {
                "first_ratio_deviation": logged[0]["ratio_deviation"],
                "explained_variance": float(explained_variance(values_BT, returns_BT, mask_BT)),
                "train_s": time.perf_counter() - scored,
            }
        )
        run.finish(done)
        run.save(options.checkpoint, policy, critic, optimiser)
        if options.on_step:
            options.on_step(done)
    return run.result(policy)


def _minibatches(order: Tensor, replies: Sequence[Reply], settings: PPOSettings) -> list[list[list[int]]]:
    """Minibatches in this order, each cut into groups of similar length whose activations exist at once."""
    parts = [order[start : start + settings.minibatch].tolist() for start in range(0, len(order), settings.minibatch)]
    return [[[part[i] for i in group] for group in by_tokens([replies[i] for i in part], settings.microbatch_tokens)] for part in parts]


@torch.no_grad()
def _warm_up(critic: Critic, policy: Policy, warmup: Warmup) -> None:
    """Start the critic where the reference's score is expected, at every token of its replies."""
    states, returns = [], []
    for group in by_tokens(warmup.replies[:WARMUP_REPLIES], GROUP_TOKENS):
        states_BTD, mask_BT, _ = policy.hidden([warmup.replies[i] for i in group])
        states.append(states_BTD[mask_BT.bool()])
        returns.append(warmup.scores_B[group].float().repeat_interleave(mask_BT.sum(1).long()))
    critic.fit(torch.cat(states), torch.cat(returns))
