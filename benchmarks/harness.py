"""What every benchmark shares: cells that survive an interruption, checks, a control that must be caught, one JSON object.

A benchmark is `python -m benchmarks.NAME`. It ends with `report.finish`, which prints the object as the last line and
writes it to `build/bench/NAME.json`; the exit code is 0 only if every check holds and the control was caught.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from deploy.config import GateSettings
from deploy.gates import Evaluation, judge
from examples.ring import GATES

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "bench"
ROOMS = ("feedback", "deploy", "serving", "trainer", "examples")
PACKAGES = ("plaudit", "torch", "transformers", "peft", "vllm")


def quick() -> bool:
    """Whether `QUICK=1` asks for a run of at most a minute."""
    return os.environ.get("QUICK", "") not in ("", "0")


def code_digest(name: str, *rooms: str) -> str:
    """Of the benchmark's own source, of the Python source in these rooms and of the weights in them: a changed line makes cells stale.

    A room may be a single file.
    """
    sha = hashlib.sha256()
    for path in (ROOT / "benchmarks").glob(f"{name}.py"):
        sha.update(path.read_bytes())
    for room in rooms:
        for path in sorted((ROOT / room).rglob("*")) or [ROOT / room]:
            if path.suffix in (".py", ".safetensors"):
                sha.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return sha.hexdigest()[:16]


def versions() -> dict[str, str]:
    """Of Python and of the packages that figures depend on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def refusals(evaluation: Mapping[str, Any]) -> list[str]:
    """What the demonstration's gates have against a candidate.

    The gate that knows about shuffled labels is told nothing: a control is caught only by what the others measure.
    """
    found = Evaluation.model_validate({**evaluation, "shuffled": False})
    return [f"{each.name}: {each.reason}" for each in judge(found, GateSettings.model_validate(GATES)) if each.verdict != "pass"]


class Cells:
    """Results of finished parts, one JSON line each, found again by their key and the code that made them."""

    def __init__(self, path: Path, code: str) -> None:
        self.path, self.code = path, code
        self.found: dict[str, Any] = {}
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    row = json.loads(line)
                    self.found[row["key"]] = row["value"]
                except (ValueError, KeyError):
                    continue  # a line cut short by a kill is computed again

    def get(self, key: Mapping[str, object], compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The stored value of this key, or the computed one, stored durably, with its `seconds`."""
        name = json.dumps({**key, "code": self.code}, sort_keys=True)
        if name not in self.found:
            started = time.perf_counter()
            value = compute()
            value = {**value, "seconds": round(time.perf_counter() - started, 2)}
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                # A leading newline keeps this line whole behind one that a kill cut short.
                file.write("\n" + json.dumps({"key": name, "value": value}))
                file.flush()
                os.fsync(file.fileno())
            self.found[name] = value
        result: dict[str, Any] = self.found[name]
        return result


class Report:
    """Checks and a control, collected while a benchmark runs."""

    def __init__(self, name: str, *, seed: int, rooms: tuple[str, ...] = ROOMS, folder: Path = FOLDER) -> None:
        self.name, self.seed, self.folder = name, seed, folder
        self.checks: list[dict[str, object]] = []
        self.what_control: dict[str, object] | None = None
        self.cells = Cells(folder / f"{name}.cells.jsonl", code_digest(name.partition("-")[0], *rooms))

    def say(self, text: str) -> None:
        """One line for whoever watches."""
        print(text, flush=True)

    def check(self, what: str, value: float | None, *, at_least: float | None = None, at_most: float | None = None) -> None:
        """A figure and its bound. None, a figure that could not be measured, fails."""
        bound = at_least if at_least is not None else at_most
        if bound is None or (at_least is not None and at_most is not None):
            raise ValueError(f"check {what!r}: give one of at_least and at_most")
        ok = value is not None and (value >= bound if at_least is not None else value <= bound)
        self.checks.append({"what": what, "value": value, "bound": f"{'>=' if at_least is not None else '<='} {bound:g}", "ok": ok})

    def control(self, what: str, *, caught: bool) -> None:
        """The broken variant that the benchmark must tell from the real thing."""
        self.what_control = {"what": what, "caught": caught}

    def skip(self, why: str) -> int:
        """Nothing could be measured here. Fails, so that nobody takes it for a result."""
        print(json.dumps({"name": self.name, "ok": False, "skipped": why}))
        return 1

    def finish(self, figures: Mapping[str, object]) -> int:
        """Write and print the object; the exit code."""
        control = self.what_control or {"what": "none was run", "caught": False}
        ok = bool(self.checks) and all(bool(check["ok"]) for check in self.checks) and bool(control["caught"])
        result = {
            "name": self.name,
            "ok": ok,
            "quick": quick(),
            "checks": self.checks,
            "control": control,
            "figures": dict(figures),
            "seed": self.seed,
            "versions": versions(),
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.folder / f"{self.name}.json.tmp"
        temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        temporary.replace(self.folder / f"{self.name}.json")
        print(json.dumps(result))
        return 0 if ok else 1
