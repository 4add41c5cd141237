"""Settings of learning. Importing this never imports torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from deploy.config import EngineSettings
from feedback.config import Section
from feedback.errors import ConfigError

MAX_SEED = 2**32 - 1
"""A date is one. Streams of random numbers are drawn with this one times 10^6 and more, in 63 bits."""


class RewardModelSettings(Section):
    """How what people said becomes a score."""

    maps: tuple[Literal["last", "linear", "quadratic"], ...] = Field(default=("last", "linear", "quadratic"), min_length=1)
    """Feature maps that are compared by held-out likelihood."""
    ridges: tuple[Annotated[float, Field(gt=0)], ...] = Field(default=(0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0), min_length=2)
    """Ascending variances of the score under the prior that are compared; the grid grows by itself while its edge is the best."""
    grid_extensions: int = Field(default=4, ge=0, le=20)
    """How many values the grid may grow by; if the edge is still the best then, the evidence warns."""
    folds: int = Field(default=5, ge=2, le=20)
    """Folds of the cross-validation; a prompt is never in two of them."""
    max_rater_share: float = Field(default=0.01, gt=0, le=1)
    """Largest share of the total weight that one rater may have; 2 / raters where that is more."""
    clip: float = Field(default=4.0, gt=0)
    """Normalised scores are clipped to plus and minus this many sd."""
    base_samples: int = Field(default=4, ge=2, le=64)
    """Answers of the base policy to each prompt, whose mean score is the prompt's zero."""
    watch_share: float = Field(default=0.25, ge=0, lt=1)
    """Share of the raters kept for a second reward model that may stop PPO early; 0 uses all raters for the first."""
    watch_min_raters: int = Field(default=8, ge=2)
    """With fewer raters in that share there is no second reward model."""
    watch_min_labels: int = Field(default=150, ge=1)
    """With fewer ratings in that share there is no second reward model."""
    min_likelihood_gain: float = Field(default=0.0, ge=0)
    """Nats a rating of unseen prompts that it must foresee, less one standard error, before PPO optimises it; the gates ask for more."""
    ensemble_from_choices: int = Field(default=2000, ge=1)
    """From so many choices on, an adapter of its own with an ensemble of heads is tried beside ridge on frozen features."""
    ensemble_members: int = Field(default=8, ge=2, le=64)
    """Heads, each with a random prior of its own; their spread is the score's uncertainty."""
    ensemble_rank: int = Field(default=8, ge=1)
    """Of the reward model's adapter, which nobody serves."""
    ensemble_learning_rate: float = Field(default=3e-4, gt=0)
    """Of the reward model's adapter, in its one epoch."""
    discount_unreliable: bool = False
    """Ratings count for less by raters with 20 votes who contradicted themselves on 3 repeated questions, more often than others do."""
    allow_single_rater: bool = False
    """Train although all ratings are one rater's; the adapter then serves that rater only, and its evidence says so."""
    seed: int = Field(default=0, ge=0, le=MAX_SEED)
    """Draws the folds, the split of raters and the shuffled control."""

    @model_validator(mode="after")
    def _ascending(self) -> Self:
        if list(self.ridges) != sorted(self.ridges):
            raise ValueError(f"reward_model.ridges is {list(self.ridges)}, which does not ascend; sort it")
        return self


class PPOSettings(Section):
    """PPO for a LoRA adapter of some ten iterations."""

    algorithm: Literal["ppo", "rloo"] = "ppo"
    """`ppo` judges every token by a critic, `rloo` a whole reply by the other samples of its prompt, without a critic."""
    critic: Literal["head", "adapter"] = "head"
    """`head` reads the policy's states; `adapter` has a LoRA adapter of its own for replies beyond 200 tokens, at a pass more each."""
    rloo_samples: int = Field(default=4, ge=2)
    """Samples of each prompt with `rloo`; `rollouts` must be a multiple."""
    rank: int = Field(default=8, ge=1)
    """Of the adapter."""
    alpha: int = Field(default=16, ge=1)
    """Of the adapter; its change is scaled by alpha / rank."""
    iterations: int = Field(default=10, ge=1)
    """Rounds of rollouts and updates at most; the KL budget may end them earlier."""
    rollouts: int = Field(default=32, ge=2)
    """Replies sampled in an iteration."""
    epochs: int = Field(default=2, ge=1)
    """Passes over the rollouts."""
    minibatch: int = Field(default=16, ge=1)
    """Replies of one optimiser step."""
    microbatch_tokens: int = Field(default=512, ge=1)
    """Tokens whose activations exist at once, a shared beginning counted once; gradients of a minibatch are accumulated over them."""
    learning_rate: float = Field(default=3e-4, gt=0)
    """Of the adapter."""
    critic_learning_rate: float = Field(default=1e-3, gt=0)
    """Of the value head and the critic's adapter."""
    clip: float = Field(default=0.2, gt=0)
    """Of the ratio and of the value."""
    gae_lambda: float = Field(default=0.95, ge=0, le=1)
    """Of generalised advantage estimation; rewards are not discounted."""
    kl_target_nats: float | None = Field(default=None, gt=0)
    """Of the controller, summed over a reply; unset: min(10, 0.1 x base's mean reply tokens)."""
    hard_stop: float = Field(default=1.5, ge=1)
    """Training ends when the KL exceeds the target by this factor; what is released was measured within the target itself."""
    patience: int = Field(default=3, ge=1)
    """Iterations whose mean score by the other raters' reward model is compared with the best such mean; a fall beyond noise stops."""
    unfinished_penalty: float = Field(default=0.0, ge=0)
    """Subtracted from the score of a reply that was cut off, not put in its place; above 0 also moves the control with shuffled labels."""
    importance_cap: float = Field(default=2.0, ge=1)
    """Cap of the importance weights where another engine sampled."""

    @model_validator(mode="after")
    def _whole_prompts(self) -> Self:
        if self.algorithm == "rloo" and self.rollouts % self.rloo_samples:
            raise ValueError(f"ppo.rollouts is {self.rollouts}, with rloo it must be a multiple of ppo.rloo_samples ({self.rloo_samples})")
        return self


class CycleSettings(Section):
    """One turn of the trainer: when it starts and how it evaluates."""

    min_new_ratings: int = Field(default=100, ge=1)
    """`plaudit trainer` starts a cycle once so many ratings came in since the last one."""
    max_prompts: int = Field(default=64, ge=1)
    """Rollouts answer at most so many of the prompts that people asked, drawn by the seed; each costs `base_samples` answers first."""
    evaluation_samples: int = Field(default=4, ge=2, le=64)
    """Answers of base, stable and candidate to each held-out prompt."""
    held_out: Path | None = None
    """Prompts for evaluation that nobody rates, one a line."""
    probes: Path | None = None
    """The operator's own questions, shown side by side in every report, one a line."""
    facts: Path | None = None
    """Facts that must not get worse: JSON lines with prompt, answer, distractors and entity."""
    facts_margin_points: float = Field(default=2.0, gt=0)
    """Accuracy on facts may fall by so many points at most."""
    niceness: int = Field(default=10, ge=0, le=19)
    """Added to the process's niceness, so that serving stays usable beside training."""
    threads: int = Field(default=0, ge=0)
    """Threads of torch; 0 is one for a policy below 64 MB, which loses far more to others beside it than it gains, and else torch's own."""
    metrics_port: int = Field(default=0, ge=0, le=65535)
    """`plaudit trainer` answers Prometheus' `GET /metrics` on this port; 0 does not."""
    metrics_host: str = "127.0.0.1"
    """Address for that; the figures need no key, so another one than loopback shows them to everybody who can reach it."""
    shuffle_labels: bool = False
    """The control: ratings are shuffled, so that the candidate must not gain and must not be promoted."""
    seeds: int = Field(default=2, ge=1, le=8)
    """How often PPO runs, each time with other random numbers. The first is the candidate; the others show how much was luck."""
    seed: int = Field(default=0, ge=0, le=MAX_SEED)
    """Draws rollouts and evaluation samples."""


class RolloutsSettings(Section):
    """Where PPO's replies are sampled."""

    urls: tuple[str, ...] = ()
    """vLLM servers that serve no people and see the trainer's data folder; none samples in the trainer itself."""
    timeout_s: float = Field(default=600.0, gt=0)
    """How long one of them may take to answer a prompt before the others take over."""

    @field_validator("urls")
    @classmethod
    def _addresses(cls, urls: tuple[str, ...]) -> tuple[str, ...]:
        for url in urls:
            try:
                parts = urlsplit(url)
                whole = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
            except ValueError:  # brackets or a port that are none
                whole = False
            if not whole:
                raise ValueError(f"rollouts.urls names {url!r}, which is no address of a server; write http://host:port")
        if len({url.rstrip("/") for url in urls}) < len(urls):
            raise ValueError("rollouts.urls names a server twice; name each once")
        return urls


Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["auto", "float32", "bfloat16"]


class HardwareSettings(Section):
    """What the trainer computes on."""

    device: Device = "auto"
    """`auto` is the GPU where there is one."""
    dtype: Dtype = "auto"
    """Of the backbone; `auto` is bfloat16 on a GPU and float32 on a CPU, where it is reproducible. Adapters are float32."""
    shard: bool = False
    """Under torchrun each process holds only its part of the backbone (FSDP), for one that does not fit; off: each holds all of it."""


def refuse_serving(rollouts: RolloutsSettings, engine: EngineSettings) -> None:
    """Raises ConfigError where one of `rollouts.urls` is the server that people are answered from."""
    serving = engine.url or (f"http://127.0.0.1:{engine.port}" if engine.port else None)
    for url in rollouts.urls:
        if serving and _address(url) == _address(serving):
            told = f"rollouts.urls names {url}, which is engine.{'url' if engine.url else 'port'}: people are served from there"
            raise ConfigError(f"{told}; give replicas that serve nobody, or none to sample in the trainer", field="rollouts.urls")


def refuse_rank(ppo: PPOSettings, engine: EngineSettings) -> None:
    """Raises ConfigError where the adapter would be larger than what replicas load."""
    if ppo.rank > engine.max_lora_rank:
        told = f"ppo.rank is {ppo.rank}, engine.max_lora_rank is {engine.max_lora_rank}: no replica would load the adapter"
        raise ConfigError(f"{told}; raise engine.max_lora_rank where people are served, or lower ppo.rank", field="ppo.rank")


def _address(url: str) -> tuple[str, int]:
    parts = urlsplit(url if "//" in url else f"//{url}")
    host = parts.hostname or ""
    return "127.0.0.1" if host in ("localhost", "::1") else host, parts.port or (443 if parts.scheme == "https" else 80)
