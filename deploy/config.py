"""What an operator may set about the policy, its server, the rollout and the gates. Imports no torch."""

from __future__ import annotations

import base64
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, SecretStr, field_validator, model_validator

from deploy.address import problem
from feedback.config import Section

Weight = Annotated[float, Field(gt=0, le=0.5)]


class PolicySettings(Section):
    """The one base model of this deployment and how it is asked. Raters, rollouts and serving share these values."""

    base: str = "smollm2"
    """A shipped policy (`smollm2`, `concierge`), which brings its own prompt, temperature and lengths, a folder, or a Hugging Face id."""
    name: str = "plaudit"
    """The model name that clients ask for; answered by whatever the alias `stable` points at."""
    system_prompt: str | None = None
    """Put before every conversation that brings none of its own."""
    temperature: float = Field(default=1.0, gt=0, le=2)
    """Of serving, rollouts and the reference alike; the default when a client names none."""
    max_tokens: int = Field(default=64, ge=1)
    """Longest answer, when a client names no limit."""
    max_model_len: int = Field(default=1024, ge=16)
    """Prompt and answer together, in tokens."""


class DeploySettings(Section):
    """Where adapters are kept for all machines."""

    store: str | None = None
    """Any URL that fsspec writes, its package installed and its login in the environment; unset: `adapters` in the data folder."""

    def resolved(self, data_dir: Path) -> str:
        """The place to open."""
        return self.store or str((data_dir / "adapters").resolve())


class OperatorSettings(Section):
    """Where `plaudit adapters` and `plaudit rollouts` ask."""

    url: str | None = None
    """A gateway, https unless on this machine; unset: the one that runs on the data folder, else the registry's database itself."""
    timeout_s: float = Field(default=10.0, gt=0)
    """How long it may take to answer."""

    @field_validator("url")
    @classmethod
    def may_get_a_key(cls, url: str | None) -> str | None:
        """Every request carries the operator's key."""
        if url is not None and (wrong := problem(url)):
            raise ValueError(wrong)
        return url


class Webhook(Section):
    """Who is told of alias moves."""

    url: str
    secrets: tuple[SecretStr, ...] = Field(min_length=1, max_length=3)

    @field_validator("secrets")
    @classmethod
    def long_enough(cls, secrets: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
        """As Standard Webhooks has them."""
        for secret in secrets:
            key = _key(secret)
            if key is None or not 24 <= len(key) <= 64:
                raise ValueError("is not whsec_ and the base64 of 24 to 64 random bytes")
        return secrets

    def signing_keys(self) -> list[bytes]:
        """What signs."""
        return [key for secret in self.secrets if (key := _key(secret)) is not None]


def _key(secret: SecretStr) -> bytes | None:
    prefix, _, text = secret.get_secret_value().partition("_")
    try:
        return base64.b64decode(text, validate=True) if prefix == "whsec" else None
    except ValueError:
        return None


class WebhookSettings(Section):
    """Who else is told when an alias moves, by https://www.standardwebhooks.com."""

    endpoints: tuple[Webhook, ...] = Field(default=(), max_length=16)
    """Each `{"url": "https://...", "secrets": ["whsec_..."]}`; every secret signs, so that one can be replaced."""
    allow_http: bool = False
    """Also to other machines without TLS, as inside a cluster."""
    timeout_s: float = Field(default=10.0, gt=0)
    """How long an endpoint may take to answer 2xx."""
    tries: int = Field(default=12, ge=1)
    """After so many a move is given up for this endpoint, with an audit row, and the next one is sent."""
    retry_s: float = Field(default=5.0, gt=0)
    """Between the first two tries; doubled with each further one."""
    max_retry_s: float = Field(default=3600.0, gt=0)
    """Longest time between two tries."""

    @model_validator(mode="after")
    def only_where_nobody_listens(self) -> WebhookSettings:
        """A URL of our own network must be meant."""
        for number, endpoint in enumerate(self.endpoints):
            if wrong := problem(endpoint.url, plain=self.allow_http):
                raise ValueError(f"endpoints.{number}.url {wrong}, or set webhooks.allow_http")
        return self


class EngineSettings(Section):
    """The model server."""

    kind: Literal["vllm", "scripted"] = "vllm"
    """`scripted` answers from a function, for development without a model."""
    url: str | None = None
    """An existing vLLM server; unset: Plaudit starts one beside itself."""
    port: int = Field(default=0, ge=0, le=65535)
    """Where the own vLLM listens on 127.0.0.1; 0 takes a free one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """`auto`: bfloat16 where the processor computes in it, else float32, which is then the faster one."""
    threads: int = Field(default=0, ge=0)
    """Threads of the model's arithmetic; 0 is every core of this process."""
    kv_cache_mb: int = Field(default=256, ge=32)
    """Said explicitly, because vLLM otherwise claims nearly all memory of the machine."""
    max_loras: int = Field(default=6, ge=2)
    """Adapters that one batch may mix."""
    max_cpu_loras: int = Field(default=12, ge=2)
    """Adapters held in memory."""
    max_lora_rank: Literal[8, 16, 32, 64, 128, 256] = 8
    """Every slot is computed at this rank: no larger than the adapters need."""
    max_num_seqs: int = Field(default=64, ge=1)
    """Answers written at the same time."""
    max_num_batched_tokens: int = Field(default=2048, ge=32)
    """Tokens of one step; bounds the memory that LoRA gathers on a CPU."""
    start_timeout_s: float = Field(default=300.0, gt=0)
    """How long a start may take before it counts as failed."""
    shutdown_timeout_s: int = Field(default=10, ge=0)
    """How long answers may go on after a request to stop."""
    adapter_public_key: Path | None = None
    """PEM file; set: only adapters signed with its private key are loaded (OpenSSF model signing, extra `signing`)."""


class RolloutSettings(Section):
    """From candidate to stable."""

    weights: tuple[Weight, ...] = Field(default=(0.1, 0.3, 0.5), min_length=1)
    """Shares of users who get the canary, one step after the other; as many get the baseline."""
    step_people: int = Field(default=10, ge=1)
    """Before the next step so many more people an arm have got an answer, each in one arm for good."""
    step_minutes: float = Field(default=10.0, ge=0)
    """A step lasts so long at least."""
    step_days: float = Field(default=1.0, ge=0)
    """A step with fewer people goes on after so long, if no guardrail fails."""
    error_minutes: float = Field(default=10.0, ge=0)
    """A rollout that cannot be judged for so long is stopped."""
    approval_days: float = Field(default=7.0, gt=0)
    """A canary that has won and that nobody approves within this time is stopped."""
    alpha: float = Field(default=0.05, gt=0, lt=1)
    """Risk of ever promoting one that people like no better; the i-th canary is tested at alpha / (i (i + 1))."""
    guard_alpha: float = Field(default=0.025, gt=0, lt=1)
    """Risk, shared by all guards, of stopping a canary that is no worse."""
    guard_margins: dict[str, float] = Field(default={})
    """Margins of guardrails that shall differ, by name: shares of answers, doublings or sd."""
    votes_per_rater: int = Field(default=3, ge=1)
    """A rater counts once, with the mean of this many first choices."""
    futility: float = Field(default=0.52, gt=0.5, lt=1)
    """The canary ends when even the upper bound of its win rate lies below."""
    max_days: float = Field(default=14.0, gt=0)
    """A canary that has not won by then ends as inconclusive."""
    two_people: bool = True
    """The key that registered an adapter may not approve it."""
    tick_s: float = Field(default=1.0, gt=0)
    """How often the controller looks."""
    lease_s: float = Field(default=10.0, gt=0)
    """How long a leader that has gone silent stays leader."""
    drain_s: float = Field(default=60.0, ge=0)
    """How long a name that nobody needs any more stays loaded; answers being written go on."""

    @field_validator("weights")
    @classmethod
    def _grow(cls, weights: tuple[float, ...]) -> tuple[float, ...]:
        if any(before >= after for before, after in pairwise(weights)):
            raise ValueError(f"{weights} must grow from step to step")
        return weights


class ErasureSettings(Section):
    """What becomes of adapters that learned from a person who was erased."""

    policy: Literal["report", "block", "retire"] = "block"
    """`report` lists them, `block` also never promotes them again and ends their rollout, `retire` also takes them off every alias."""
    load_timeout_s: float = Field(default=15.0, ge=0)
    """With `retire`: how long replicas may take to load what answers instead, before people are sent there."""


class GateSettings(Section):
    """What an evaluation has to show before anybody is answered by a candidate."""

    min_gain: float = 0.0
    """The lower bound of the reward's gain must exceed this, against stable and against base."""
    min_likelihood_gain: float = Field(default=0.0, ge=0)
    """Nats a rating of unseen prompts that the reward model must foresee beyond prompt and rater, at the lower bound."""
    min_prompts: int = Field(default=8, ge=2)
    """Held-out prompts below which a gain is not judged."""
    kl_slack: float = Field(default=1.5, ge=1)
    """The KL may exceed its budget by this factor, the hard stop of training."""
    max_kl_budget_nats: float = Field(default=10.0, gt=0)
    """A larger budget of the trainer's counts as this one, which is the largest that it chooses by itself."""
    facts_margin_points: float = Field(default=2.0, gt=0)
    """Facts may be this much worse at most, at the upper bound of the harm."""
    min_facts: int = Field(default=2000, ge=1)
    """Fewer facts cannot certify that margin, whatever their bound is."""
    chat_facts_margin_points: float = Field(default=5.0, gt=0)
    """The same for facts asked in chat, of which 300 suffice."""
    demo_facts_margin_points: float | None = None
    """Margin for a demonstration's small set of facts, which cannot certify the others; named in every verdict."""
    length_factor: float = Field(default=1.5, gt=1)
    """Answers may grow or shrink by this factor."""
    allow_shorter: bool = False
    """Raters asked for brevity: answers may shrink without limit as long as they stay on topic."""
    max_repetition_rise: float = Field(default=0.05, ge=0, le=1)
    """Rise of the share of repeated word triples."""
    max_unfinished_rise: float = Field(default=0.1, ge=0, le=1)
    """Rise of the share of answers cut off by the length limit."""
    max_refusal_rise: float = Field(default=0.05, ge=0, le=1)
    """Rise of the share of answers that refuse."""
    max_on_topic_fall: float = Field(default=0.1, ge=0, le=1)
    """Fall of the share of answers that name what was asked."""
    max_language_rise: float = Field(default=0.05, ge=0, le=1)
    """Rise of the share of answers in another language or script than their prompt."""
    max_belief_rise_nats: float = Field(default=0.5, ge=0)
    """A wrong belief of the asker may sway it by so much more than base, beyond the mere naming of what is wrong, at the upper bound."""
    max_echo_rise: float = Field(default=0.05, ge=0, le=1)
    """Rise of the share of answers that repeat a wrong belief."""
    max_copied: int = Field(default=0, ge=0)
    """Strings that few people wrote and that the candidate may say where base does not."""
    probe_timeout_s: float = Field(default=60.0, gt=0)
    """How long the candidate may take to answer the operator's probe prompts."""
