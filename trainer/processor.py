"""How much of the processor learning takes from whatever else runs, above all from serving."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

import torch

AUTOGROUP = Path("/proc/self/autogroup")
SMALL_POLICY_BYTES = 64_000_000


@contextlib.contextmanager
def giving_way(niceness: int) -> Iterator[None]:
    """Inside, serving goes first: this process is nice, and so is its session where Linux shares the processor among sessions.

    With autogroups (sched(7), usual on desktops and servers) niceness counts within a session only. A trainer of another session
    than the model server's would take half of every core, and a server whose threads wait for each other would stand nearly still.
    """
    os.nice(max(0, niceness - os.nice(0)))
    before: int | None = None
    with contextlib.suppress(OSError):  # no Linux, no autogroups, or not allowed: niceness alone has to do
        found = re.search(r"nice (-?\d+)", AUTOGROUP.read_text())
        if found and int(found[1]) < niceness:
            AUTOGROUP.write_text(str(niceness))
            before = int(found[1])
    try:
        yield
    finally:
        if before is not None:
            with contextlib.suppress(OSError):  # only root may take niceness back
                AUTOGROUP.write_text(str(before))


def use_threads(policy: Path, threads: int) -> None:
    """As many threads of torch as `cycle.threads` asks for."""
    if threads := threads or int(_is_small(policy)):
        torch.set_num_threads(threads)


def _is_small(policy: Path) -> bool:
    """Whether one thread is safer: on an idle machine two are 1.4 times as fast, beside other work they took ten times as long."""
    return 0 < sum(path.stat().st_size for path in policy.glob("*.safetensors")) < SMALL_POLICY_BYTES
