"""What a contestant measures about itself: seconds of each stage of an iteration, and memory above what its imports took.

Only the standard library, so that a meter can be started where nothing else is loaded.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

KB = 1024
WINDOW = 2
"""Iterations whose mean score is compared with a target: one of them is noisy."""


class Reached(Exception):
    """The target was reached; training may end."""


def _status_mb(field: str) -> float:
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / KB
    raise KeyError(field)


class Meter:
    """Made once after the imports and before anything is loaded."""

    def __init__(self, target: float | None = None) -> None:
        # "5" makes the kernel forget the peak so far, which an import may have set.
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
        self.after_imports_mb = _status_mb("VmRSS")
        self.target = target
        self.iterations: list[dict[str, float]] = []
        self.updates = 0
        self._open: dict[str, float] = {}
        self._began = self._last = time.perf_counter()

    def start(self) -> None:
        """The first iteration begins; what was before is setup."""
        self._open = {}
        self._began = self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        """The time since the last lap belongs to this stage."""
        now = time.perf_counter()
        self._open[f"{stage}_s"] = self._open.get(f"{stage}_s", 0.0) + now - self._last
        self._last = now

    def updated(self, *_: object) -> None:
        """The optimiser took a step; for torch's `register_optimizer_step_post_hook`."""
        self.updates += 1

    def note(self, name: str, values: Sequence[float]) -> None:
        """A mean over the replies of the iteration under way."""
        self._open[name] = fmean(values)

    def check(self) -> None:
        """Raises Reached where the mean score of the last iterations is at the target. The replies of this one are scored."""
        scores = [row["score"] for row in [*self.iterations, self._open]][-WINDOW:]
        if self.target is not None and len(scores) == WINDOW and fmean(scores) >= self.target:
            self.close()
            raise Reached

    def close(self) -> None:
        """The iteration under way is over, and the next one begins."""
        now = time.perf_counter()
        self.iterations.append(self._open | {"seconds": now - self._began})
        self._open = {}
        self._began = self._last = now

    @property
    def reached(self) -> bool:
        scores = [row["score"] for row in self.iterations][-WINDOW:]
        return self.target is not None and len(scores) == WINDOW and fmean(scores) >= self.target

    def result(self, **about: object) -> dict[str, object]:
        """For the JSON file: the iterations, peak memory above the imports in MB, and what else is known."""
        return {
            "iterations": self.iterations,
            "work_s": sum(row["seconds"] for row in self.iterations),
            "reached": self.reached,
            "updates": self.updates,
            "memory_mb": _status_mb("VmHWM") - self.after_imports_mb,
            "imports_mb": self.after_imports_mb,
            **about,
        }
