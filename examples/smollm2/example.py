"""SmolLM2 as an `Example`: everyday questions, two cohorts of raters, facts of common knowledge."""

from __future__ import annotations

from examples.base import Example
from examples.smollm2.convert import policy_dir
from examples.smollm2.facts import facts
from examples.smollm2.prompts import HELD_OUT_TOPICS, PROBES, SYSTEM_PROMPT, TOPICS, asked
from examples.smollm2.raters import raters


def example(seed: int = 0) -> Example:
    """The raters of this seed; the prompts and facts are the same for every seed."""
    return Example(
        name="smollm2",
        policy_dir=policy_dir,
        system_prompt=SYSTEM_PROMPT,
        temperature=0.7,
        max_tokens=64,
        max_model_len=512,
        prompts=asked(TOPICS),
        held_out=asked(HELD_OUT_TOPICS),
        probes=list(PROBES),
        raters=raters(seed),
        facts=facts(),
        hub_name="HuggingFaceTB/SmolLM2-135M-Instruct",
    )
