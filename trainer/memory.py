"""How much memory training takes, worked out from a base's config.json before anything is loaded. Imports no torch.

The arithmetic is docs/training.md's; figures are bytes of one process, above the 0.7 GB that importing torch takes on a CPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from feedback.errors import InvalidInput
from trainer.config import PPOSettings

LOGITS_ROWS, SAMPLE_BATCH = 256, 64
"""As in `losses` and in `Policy.sample`, which import torch: rows of logits in a pass with gradients, replies sampled at once."""


@dataclass(frozen=True)
class Shape:
    """A Llama-like decoder: gated MLP, two norms a layer, keys and values for some of the heads. Biases and head norms are left out."""

    width: int
    layers: int
    attention: int
    """Heads x their size."""
    keys: int
    """Heads of keys x their size."""
    inner: int
    vocabulary: int
    tied: bool
    """Whether embeddings and head are one matrix."""

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Shape:
        """From config.json. Raises InvalidInput where a figure is missing."""
        needed = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
        missing = [name for name in needed if not isinstance(config.get(name), int)]
        if missing:
            told = f"policy.base: config.json has no {missing[0]!r}; the plan knows Llama-like models only, training may take others"
            raise InvalidInput(told, field="policy.base")
        width, layers, heads, inner, vocabulary = (int(config[name]) for name in needed)
        size = int(config.get("head_dim") or width // heads)
        keys = int(config.get("num_key_value_heads") or heads) * size
        return cls(width, layers, heads * size, keys, inner, vocabulary, bool(config.get("tie_word_embeddings", False)))

    @property
    def layer(self) -> int:
        """Parameters of one layer: q, k, v, o, gate, up, down, two norms."""
        return self.width * (2 * self.attention + 2 * self.keys + 3 * self.inner + 2)

    @property
    def whole(self) -> int:
        """Parameters that are never sharded: embeddings, head and the last norm."""
        return self.width * (self.vocabulary * (1 if self.tied else 2) + 1)

    def adapter(self, rank: int) -> int:
        """Parameters of LoRA on all linear layers: rank x (inputs + outputs) of each."""
        ends = 2 * (self.width + self.attention) + 2 * (self.width + self.keys) + 3 * (self.width + self.inner)
        return self.layers * rank * ends

    def saved(self, rank: int, number: int) -> int:
        """Bytes of one token that one layer keeps for the backward pass; `number` is bytes a number of the backbone, 2 or 4.

        Frozen products keep nothing; what is kept are the norms' inputs, what attention and the gate multiply, and the inputs of
        the adapter. The adapter computes in float32: beside a bfloat16 backbone each of its seven inputs is a copy of its own.
        """
        D, H, F = self.width, self.attention, self.inner
        if number == 4:
            return 4 * (4 * D + 4 * H + 4 * F + 7 * rank)
        norms, attention, gate, inputs = 4 * 2 * D, 2 * 4 * H, 2 * 3 * F, 4 * (5 * D + H + F)
        return norms + attention + gate + inputs + 4 * 7 * rank


@dataclass(frozen=True)
class Where:
    """What decides the memory beside the base and PPO's settings."""

    max_model_len: int
    number: int = 2
    """Bytes a number of the backbone: 2 for bfloat16, 4 for float32."""
    processes: int = 1
    sharded: bool = False
    local: bool = True
    """Whether replies are sampled in the trainer."""


@dataclass(frozen=True)
class Row:
    """One line of the plan."""

    what: str
    size_bytes: int


def plan(config: Mapping[str, Any], ppo: PPOSettings, where: Where) -> list[Row]:
    """What one process holds at its peak; the last row is the sum. Sampling and training come one after the other, so the larger counts.

    Lengths are the longest that may occur, so the usual peak is lower. Raises InvalidInput as `Shape.of`.
    """
    shape = Shape.of(config)
    adapter, number = shape.adapter(ppo.rank), where.number
    # A critic's adapter has a gradient and Adam's two, but no copies.
    copies = 6 + 4 * (ppo.algorithm == "ppo" and ppo.critic == "adapter")
    layers = shape.layers * shape.layer
    held = -(-layers // where.processes) + 2 * shape.layer if where.sharded else layers
    rows = min(SAMPLE_BATCH, -(-ppo.rollouts // where.processes))
    cache = rows * where.max_model_len * 2 * shape.layers * shape.keys * number
    # Sampling adds the adapter into a float32 copy of the weights; see Policy._merged.
    merged = layers * 4 if number == 4 and not where.sharded else 0
    # A step's logits, its probabilities and their float64 sum.
    sampling = (merged + cache + rows * shape.vocabulary * (number + 4 + 8)) * where.local
    tokens = max(ppo.microbatch_tokens, where.max_model_len)
    # Once more than there are layers: backwards, one layer's gradients stand beside what is kept. Three states a token for the head.
    activations = tokens * ((shape.layers + 1) * shape.saved(ppo.rank, number) + 3 * 4 * shape.width)
    logits = LOGITS_ROWS * shape.vocabulary * (8 if number == 4 else 12)
    kept = 5 * ppo.rollouts * where.max_model_len * 4 + ppo.rollouts * shape.width * 4
    parts = [
        Row("backbone", (held + shape.whole) * number),
        Row("adapter, its gradient, Adam and two copies of the best", adapter * 4 * copies),
        Row("training: activations and logits", activations + logits),
        Row("sampling: keys, values and logits", sampling),
        Row("figures of the replies", kept),
    ]
    peak = parts[0].size_bytes + parts[1].size_bytes + max(activations + logits, sampling) + kept
    return [*parts, Row("peak", peak)]
