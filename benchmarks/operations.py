"""What clients did, written down as it happened: each operation when it is invoked and when its outcome is known.

The outcome is `ok`, `fail` (it certainly did not happen) or `info` (it may have happened, or may still happen). A process that dies leaves
an invocation without an end, which is `info` too.

    chat      {subject}                                      ok/info {interactions: {id: text or null}, comparison}
    rate, clear, choose   {key, target, rater, slot, value}  ok {event_id, version}; value null is a clearing
    erase, withdraw       {subject}                          ok {}
    snapshot  {}                                             ok {rows: [{event_id, rater, subject, answers}]}
    route     {gateway}                                      ok {stable}
"""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Kind = Literal["chat", "rate", "clear", "choose", "erase", "withdraw", "snapshot", "route"]
Outcome = Literal["ok", "fail", "info"]
SAYING = ("rate", "clear", "choose")
Cell = tuple[str, str, str]
"""Target, rater, slot."""


@dataclass(frozen=True)
class Op:
    """One operation of one process. Of an `info` nobody knows when it took effect, so it never ends."""

    process: str
    kind: Kind
    value: Mapping[str, Any]
    invoked: float
    outcome: Outcome = "info"
    result: Mapping[str, Any] = field(default_factory=dict)
    ended: float = math.inf

    @property
    def cell(self) -> Cell:
        return (self.value["target"], self.value["rater"], self.value["slot"])

    def before(self, other: Op) -> bool:
        """Whether it was over when the other began."""
        return self.ended < other.invoked


class History:
    """Writes operations down, one JSON line for each beginning and each end. Thread-safe."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8")
        self._lock = threading.Lock()
        self._count = 0

    def invoke(self, process: str, kind: Kind, **value: Any) -> int:
        """The number by which `end` names it."""
        with self._lock:
            self._count += 1
            self._write({"op": self._count, "process": process, "kind": kind, "value": value})
            return self._count

    def end(self, number: int, outcome: Outcome, **result: Any) -> None:
        with self._lock:
            self._write({"op": number, "outcome": outcome, "result": result})

    def close(self) -> None:
        self._file.close()

    def _write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps({**line, "at": time.monotonic()}) + "\n")
        self._file.flush()


def read(path: Path) -> list[Op]:
    """The operations of a history, in the order in which they were invoked."""
    ops: dict[int, Op] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        said = json.loads(line)
        if "kind" in said:
            ops[said["op"]] = Op(said["process"], said["kind"], said["value"], said["at"])
            continue
        begun, outcome = ops[said["op"]], said["outcome"]
        ended = math.inf if outcome == "info" else said["at"]
        ops[said["op"]] = Op(begun.process, begun.kind, begun.value, begun.invoked, outcome, said["result"], ended)
    return list(ops.values())
