"""Servers that Plaudit starts beside itself: their ports, and their pid files, by which the next start ends what a killed one left."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import time
from pathlib import Path

import structlog

log = structlog.get_logger()

GRACE_S = 10.0


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def port_taken(port: int) -> str | None:
    """Why nobody can listen on this port of 127.0.0.1; None where it is free."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as exc:
            return str(exc.strerror)
    return None


def remember(pid_file: Path, pid: int) -> None:
    """Note which process it is; with its start time the pid names one process for as long as the machine runs."""
    pid_file.write_text(json.dumps([pid, _started_at(pid)]))


def end_left_over(pid_file: Path, what: str) -> None:
    """End the process group of the file, if it is still that one: it would hold port, memory and files."""
    try:
        pid, started = json.loads(pid_file.read_text())
    except (OSError, ValueError):
        return
    if started and _started_at(pid) == started:
        log.warning(f"ending the {what} of a run that was killed", pid=pid)
        signal_group(pid, signal.SIGTERM)
        deadline = time.monotonic() + GRACE_S
        while _started_at(pid) == started and time.monotonic() < deadline:
            time.sleep(0.1)
        signal_group(pid, signal.SIGKILL)
    pid_file.unlink(missing_ok=True)


def signal_group(pid: int, number: signal.Signals) -> None:
    """Signal everything that the process started in its group too."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, number)


def _started_at(pid: int) -> str:
    """In the kernel's ticks; empty where there is no such process."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if state[0] == "Z" else state[19]
