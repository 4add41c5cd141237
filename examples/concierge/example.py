"""The concierge as an `Example`: its prompts, the raters of one world, its facts."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from examples.base import Example
from examples.concierge.town import facts, questions
from examples.concierge.world import POLICY, World

PROMPTS = 48
HELD_OUT = 32
PROBES = 6


def example(seed: int = 0) -> Example:
    """World `seed`. The prompts are the same in every world."""
    asked = [str(text) for text in np.random.default_rng(20_241).permutation(sorted(questions()))]

    def policy_dir(_: Path) -> Path:
        return POLICY

    return Example(
        name="concierge",
        policy_dir=policy_dir,
        system_prompt=None,
        temperature=1.0,
        max_tokens=48,
        max_model_len=256,
        prompts=asked[:PROMPTS],
        held_out=asked[PROMPTS : PROMPTS + HELD_OUT],
        probes=asked[PROMPTS + HELD_OUT : PROMPTS + HELD_OUT + PROBES],
        raters=list(World(seed).raters),
        facts=facts(),
    )
