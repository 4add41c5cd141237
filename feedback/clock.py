"""A hybrid logical clock: the order of events that were committed by different processes.

Kulkarni et al., "Logical Physical Clocks" (2014): a stamp is wall-clock milliseconds << 16 | counter, it never goes back, and it is
greater than every stamp its process has seen, so an answer to what somebody saw always comes after it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from feedback.errors import InvalidInput

COUNTER_BITS = 16
MAX_DRIFT_MS = 60 * 60 * 1000
"""A stamp further ahead than this is a lie or a broken clock: following it would push everybody's stamps into the future."""


def wall_ms() -> int:
    return time.time_ns() // 1_000_000


class HybridClock:
    """Thread-safe. Stamps of one clock are strictly increasing."""

    def __init__(self, wall: Callable[[], int] = wall_ms) -> None:
        self._wall = wall
        self._last = 0
        self._lock = threading.Lock()

    def tick(self, after: int = 0) -> int:
        """A new stamp, greater than every earlier one and than `after`."""
        with self._lock:
            self._last = max(self._wall() << COUNTER_BITS, self._last + 1, after + 1)
            return self._last

    def observe(self, stamp: int) -> None:
        """Never give a stamp at or below this one, which is stored already."""
        with self._lock:
            self._last = max(self._last, stamp)

    def admit(self, stamp: int) -> None:
        """Check a stamp that came from outside. Raises InvalidInput when it is negative or more than an hour ahead."""
        limit = max(self._wall() + MAX_DRIFT_MS, self._last >> COUNTER_BITS)
        if stamp < 0 or stamp >> COUNTER_BITS > limit:
            raise InvalidInput(f"version {stamp} is not one that this service gave: it lies more than an hour ahead", field="version")


def stamp_ms(stamp: int) -> int:
    """The wall-clock part: Unix milliseconds."""
    return stamp >> COUNTER_BITS
