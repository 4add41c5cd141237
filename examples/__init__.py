"""Policies to try Plaudit with, and the simulated people who rate them."""

from __future__ import annotations

from examples.base import Example
from feedback.errors import InvalidInput

NAMES = ("concierge", "smollm2")


def load(name: str, seed: int = 0) -> Example:
    """A shipped policy by name. Raises InvalidInput."""
    if name == "concierge":
        from examples.concierge.example import example as concierge

        return concierge(seed)
    if name == "smollm2":
        from examples.smollm2.example import example as smollm2

        return smollm2(seed)
    raise InvalidInput(f"policy: '{name[:40]}' is not shipped; there are {', '.join(NAMES)}", field="policy")
