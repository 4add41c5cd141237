"""One reward for all contestants, a function of the reply's tokens that needs no torch. Its mean over an iteration's replies is the score.

Without a world: 1 for an end within the limit, less 1/20 for each token away from 30. With one: the concierge's hidden preference in that
world, with the mean of the prompt's base answers as its zero and their pooled sd as its unit, clipped at 4.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from examples.concierge.world import World

Decode = Callable[[Sequence[int]], str]
LIKED_TOKENS = 30
CLIP = 4.0


class Reward:
    """Scores replies to the prompts of a spec."""

    def __init__(self, spec: Mapping[str, Any], decode: Decode, end: int) -> None:
        self.decode, self.end = decode, end
        self.asked: dict[tuple[int, ...], str] = {tuple(ids): text for ids, text in zip(spec["prompts"], spec["asked"], strict=True)}
        self.lengths = sorted({len(ids) for ids in self.asked})
        self.world = None if spec["world"] is None else World(spec["world"])
        self.shuffle = np.random.default_rng(spec["seed"]) if spec.get("shuffle_reward") else None
        if self.world is not None:
            base = {prompt: np.array([self.world.utility(prompt, *one) for one in some]) for prompt, some in spec["base_answers"].items()}
            self.zeros = {prompt: float(found.mean()) for prompt, found in base.items()}
            self.unit = float(np.mean([found.var(ddof=1) for found in base.values()]) ** 0.5)

    def split(self, ids: Sequence[int]) -> tuple[tuple[int, ...], list[int]]:
        """A sequence without padding as (prompt, reply)."""
        for length in self.lengths:
            if tuple(ids[:length]) in self.asked:
                return tuple(ids[:length]), list(ids[length:])
        raise KeyError("a sequence begins with none of the prompts")

    def one(self, prompt: Sequence[int], reply: Sequence[int]) -> float:
        """The reward of one reply, which ends with the end-of-text id if it ends by itself."""
        finished = bool(reply) and reply[-1] == self.end
        if self.world is None:
            return float(finished) - abs(len(reply) - LIKED_TOKENS) / 20
        asked = self.asked[tuple(prompt)]
        found = (self.world.utility(asked, self.decode(reply), finished) - self.zeros[asked]) / self.unit
        return max(-CLIP, min(CLIP, found))

    def given(self, scores: Sequence[float]) -> list[float]:
        """What training sees: the scores, or, for the control, the scores of other replies."""
        return list(scores) if self.shuffle is None else [float(s) for s in self.shuffle.permutation(np.array(scores))]
