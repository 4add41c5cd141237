"""What every command prints with: plain lines, one line of complaint, progress of long steps."""

from __future__ import annotations

import sys
import time
from functools import partial

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

# Names, paths and messages are printed as they are: what looks like markup in them is not ours, and a pipe must not break a line.
# Nor must it cut a table's cells: rich takes a pipe for a terminal of 80 columns.
WIDTH = None if sys.stdout.isatty() else 400
console, errors = (Console(stderr=stderr, highlight=False, markup=False, emoji=False, width=WIDTH) for stderr in (False, True))
say = partial(console.print, soft_wrap=True)
complain = partial(errors.print, soft_wrap=True, style="red")
remark = partial(errors.print, soft_wrap=True, style="dim")


class Steps:
    """Progress of long steps, one after the other: a bar with the time left in a terminal, one line a step in a pipe.

    Nothing is drawn between two steps, so that a command started there has the terminal for itself.
    """

    def __init__(self) -> None:
        self._what = ""
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._began = 0.0

    def __enter__(self) -> Steps:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._end(whole=kind is None)

    def __call__(self, what: str, share: float) -> None:
        """`share` of this step is done, in [0, 1]. The step before it is over."""
        if what != self._what:
            self._end(whole=True)
            if share >= 1:
                return  # nothing was to be done, or it was said before
            self._begin(what)
        if self._bar is not None:
            self._bar.update(self._task, completed=share)
        if share >= 1:
            self._end(whole=True)

    def _begin(self, what: str) -> None:
        self._what, self._began = what, time.monotonic()
        if console.is_terminal:
            columns = (TextColumn("{task.description:<32}"), BarColumn(40), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
            self._bar = Progress(*columns, console=console)
            self._task = self._bar.add_task(what, total=1.0)
            self._bar.start()

    def _end(self, *, whole: bool) -> None:
        """A step that is followed by another one is whole, also where it stopped early."""
        if not self._what:
            return
        if self._bar is not None:
            if whole:
                self._bar.update(self._task, completed=1.0)
            self._bar.stop()
        elif whole:
            say(f"{self._what}: {time.monotonic() - self._began:.0f} s")
        self._what, self._bar = "", None
