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
    explained_variance: float = 0.0
    value_loss: float = 0.0
    generate_s: float = 0.0
    score_s: float = 0.0
    train_s: float = 0.0
    alarms: tuple[str, ...] = ()
    """What is wrong with replies that another engine sampled; see `rollouts.alarms`."""


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
        self.best_stop: tuple[float, int, dict[str, Tensor]] | None = None
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

    def judge(self, measured: Step, policy: Policy) -> bool:
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
        if measured.stop_score is not None and self._fallen(measured):
            self.steps.append(measured)
            return True
        if measured.step == self.settings.iterations:
            self.steps.append(measured)
            return True
        return False

    def _fallen(self, measured: Step) -> bool:
        """Whether the other raters' reward model has fallen from its best by more than its noise, both as means of `patience` steps.

        Then the adapter that was good at its best is released; one beyond the target never is, however well it did.
        Scores have unit sd, so the difference of two means of k·n replies has a standard error of sqrt(2 / (k·n)).
        """
        scores = [step.stop_score for step in (*self.steps, measured) if step.stop_score is not None]
        k = self.settings.patience
        if len(scores) < k:
            return False
        mean = sum(scores[-k:]) / k
        assert self.good is not None
        if self.best_stop is None or mean > self.best_stop[0]:
            self.best_stop = (mean, *self.good)
            return False
        noise = 2 * (2 / (k * self.settings.rollouts)) ** 0.5
        if mean > self.best_stop[0] - noise:
            return False
        self.good = self.best_stop[1:]
        self.reason = f"other raters' reward model fell from {self.best_stop[0]:.2f} at step {self.good[0]} to {mean:.2f}"
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
        mine = {"identity": self.identity, "beta": self.beta, "target": self.target, "good": self.good, "best_stop": self.best_stop}
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
        self.beta, self.target, self.good, self.best_stop = (state[name] for name in ("beta", "target", "good", "best_stop"))
        self.steps = [Step(**step) for step in state["steps"]]
        return True
