"""A run's KL budget: the controller of beta, which adapter is released, and the checkpoint from which a killed run goes on."""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from feedback import files
from feedback.errors import TrainingRefused
from trainer import distributed
from trainer.config import PPOSettings
from trainer.critic import CRITIC, Critic
from trainer.policy import Policy


@dataclass(frozen=True)
class Step:
    """What one iteration measured, before its update."""

    step: int
    score: float
    stop_score: float | None
    kl_nats: float
    beta: float
    reply_tokens: float
    finished: float
    ratio: float = 1.0
    first_ratio_deviation: float = 0.0
    clipfrac: float = 0.0
    approx_kl: float = 0.0
    """Nats a token, or with RLOO a reply."""
    explained_variance: float = 0.0
    value_loss: float = 0.0
    generate_s: float = 0.0
    score_s: float = 0.0
    train_s: float = 0.0
    alarms: tuple[str, ...] = ()
    """What is wrong with replies that another engine sampled; see `rollouts.alarms`."""


@dataclass(frozen=True)
class Watched:
    """What the reward model of other raters makes of an iteration's replies."""

    score: float
    """Mean, in sd of the base's answers."""
    place_S: Tensor
    """Where the policy stands, in coordinates in which the length of a difference is the sd of the difference of scores."""


@dataclass(frozen=True)
class Result:
    """How training ended; the policy holds the adapter of `released`."""

    steps: list[Step]
    released: int
    """The step whose measurement is the released adapter's."""
    stopped_because: str
    kl_target_nats: float


def kl_budget(settings: PPOSettings, reply_tokens: float) -> float:
    """Target of the controller in nats a reply: as set, else min(10, 0.1 x base's mean reply tokens)."""
    return settings.kl_target_nats or min(10.0, 0.1 * reply_tokens)


class Run:
    """The controller's state: beta, the best adapter so far, and why it ended."""

    def __init__(self, settings: PPOSettings, identity: str = "") -> None:
        self.settings = settings
        self.identity = settings.model_dump_json() + identity
        """What a checkpoint must agree with: the settings and whatever else decides the run."""
        self.steps: list[Step] = []
        self.beta: float | None = None
        self.target = 0.0
        self.good: tuple[int, dict[str, Tensor]] | None = None
        self.recent: list[Watched] = []
        """The last `patience` iterations by the reward model of other raters."""
        self.best_stop: tuple[Watched, int, dict[str, Tensor]] | None = None
        self.reason = "all iterations were done"

    @property
    def next_step(self) -> int:
        return len(self.steps)

    def beta_for(self, reply_tokens: float) -> float:
        """The first rollouts are the reference's own, so they set the budget: beta_0 = 1 / sqrt(2·target)."""
        if self.beta is None:
            self.target = kl_budget(self.settings, reply_tokens)
            self.beta = (2 * self.target) ** -0.5
        return self.beta

    def judge(self, measured: Step, policy: Policy, watched: Watched | None = None) -> bool:
        """Whether to end here. Keeps the adapter that was just measured, if it is within the target.

        Between target and hard stop training goes on, because the controller may lead it back, but nothing is kept: 32 replies
        measure KL with noise, and what is released must hold on other prompts.
        """
        if measured.kl_nats > self.settings.hard_stop * self.target:
            self.reason = f"KL {measured.kl_nats:.1f} > {self.settings.hard_stop:g} x {self.target:.1f} nats in step {measured.step}"
            self.steps.append(measured)
            return True
        if measured.kl_nats <= self.target:
            self.good = (measured.step, policy.state())
        if watched is not None and self._fallen(watched):
            self.steps.append(measured)
            return True
        if measured.step == self.settings.iterations:
            self.steps.append(measured)
            return True
        return False

    def _fallen(self, watched: Watched) -> bool:
        """Whether the other raters' reward model has fallen from its best beyond doubt, both as means of `patience` steps.

        Then the adapter that was good at its best is released; one beyond the target never is, however well it did. There are two
        doubts. Scores have unit sd, so the difference of two means of k·n replies has a variance of 2 / (k·n); and few raters leave
        open what they would think of the change, which is the variance of the model's own posterior. Three sd, because every step looks:
        with two, one run in two that had stopped rising would have ended within 20 steps.
        """
        k = self.settings.patience
        self.recent = [*self.recent, watched][-k:]
        if len(self.recent) < k:
            return False
        now = Watched(sum(each.score for each in self.recent) / k, torch.stack([each.place_S for each in self.recent]).mean(0))
        assert self.good is not None
        if self.best_stop is None or now.score > self.best_stop[0].score:
            self.best_stop = (now, *self.good)
            return False
        best, step, adapter = self.best_stop
        doubt = 3 * (2 / (k * self.settings.rollouts) + float((now.place_S - best.place_S).square().sum())) ** 0.5
        if now.score > best.score - doubt:
            return False
        self.good = (step, adapter)
        self.reason = (
            f"other raters' reward model fell from {best.score:.2f} at step {step} to {now.score:.2f}, beyond its doubt of {doubt:.2f}"
        )
        return True

    def finish(self, done: Step) -> None:
        """beta x= 1 + 0.2·clip(KL / target - 1, -1, 1)."""
        self.steps.append(done)
        assert self.beta is not None
        self.beta *= 1 + 0.2 * max(-1.0, min(1.0, done.kl_nats / self.target - 1))

    def result(self, policy: Policy) -> Result:
        assert self.good is not None, "the first measurement is the reference's, whose KL is 0"
        policy.restore(self.good[1])
        return Result(self.steps, self.good[0], self.reason, self.target)

    def save(self, path: Path | None, policy: Policy, critic: Critic | None, optimiser: torch.optim.Optimizer) -> None:
        if path is None or distributed.rank() > 0:
            return
        recent = [(each.score, each.place_S) for each in self.recent]
        best = self.best_stop and ((self.best_stop[0].score, self.best_stop[0].place_S), *self.best_stop[1:])
        mine = {"identity": self.identity, "beta": self.beta, "target": self.target, "good": self.good, "recent": recent, "best_stop": best}
        adapters = policy.state() | policy.state(CRITIC)
        head = None if critic is None else critic.state_dict()
        state = {"adapters": adapters, "critic": head, "optimiser": optimiser.state_dict(), **mine}
        buffer = io.BytesIO()
        torch.save(state | {"steps": [asdict(step) for step in self.steps]}, buffer)
        files.replace(path, buffer.getvalue())

    def resume(self, path: Path | None, policy: Policy, critic: Critic | None, optimiser: torch.optim.Optimizer) -> bool:
        kept = distributed.from_first(path.read_bytes() if path is not None and path.is_file() else None)
        if path is None or kept is None:
            return False
        state: dict[str, Any] = torch.load(io.BytesIO(kept), weights_only=True, map_location="cpu")
        if state["identity"] != self.identity:
            raise TrainingRefused(
                f"checkpoint {path.name}: it belongs to another run (settings, seed or prompts differ); remove it", field="checkpoint"
            )
        policy.restore(state["adapters"])
        if critic is not None:
            critic.load_state_dict(state["critic"])
        optimiser.load_state_dict(state["optimiser"])
        self.beta, self.target, self.good = (state[name] for name in ("beta", "target", "good"))
        self.recent = [Watched(*each) for each in state["recent"]]
        self.best_stop = state["best_stop"] and (Watched(*state["best_stop"][0]), *state["best_stop"][1:])
        self.steps = [Step(**step) for step in state["steps"]]
        return True
