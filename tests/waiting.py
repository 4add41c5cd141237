"""Waiting for a state instead of sleeping; for tests of every room."""

from __future__ import annotations

import time
from collections.abc import Callable


def until(true: Callable[[], object], within_s: float = 30.0) -> None:
    """Raises AssertionError where it does not come to that in time."""
    deadline = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < deadline, "the awaited state did not come"
        time.sleep(0.01)
