"""Contestants of the comparisons with TRL, each a process of its own that reads a JSON object and writes one.

TRL's run in environments of their own under `build/peers/`, with the torch, transformers and peft of `requirements.lock`.
Nothing here but `trl_*.py` imports TRL, and nothing here imports more than the standard library before a meter is started.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
VENVS = ROOT / "build" / "peers"
SHARED = ("torch", "transformers", "peft", "accelerate", "datasets", "numpy")
"""Packages that a peer gets in our own versions."""
TIMEOUT_S = 4 * 3600


class PeerFailed(Exception):
    """A contestant ended without a result; its last words are the message."""


def trl(version: str) -> Path:
    """The python of an environment with this TRL, made by the first call: 4.9 GB, seconds where uv has the wheels, else minutes."""
    folder = VENVS / f"trl-{version}"
    python = folder / "bin" / "python"
    marker = folder / ".installed"
    if not marker.exists():
        lock = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
        ours = [line for line in lock if line.partition("==")[0] in SHARED]
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
        uv = str(Path(sys.executable).parent / "uv")
        subprocess.run([uv, "pip", "install", "--quiet", "--python", str(python), f"trl=={version}", *ours], check=True)
        marker.touch()
    return python


def run(python: Path, module: str, spec: Mapping[str, Any], threads: int) -> dict[str, Any]:
    """What `python -m benchmarks.peers.MODULE` made of the spec. Raises PeerFailed."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "spec.json").write_text(json.dumps({**spec, "threads": threads, "folder": name}), encoding="utf-8")
        environment = os.environ | {
            "OMP_NUM_THREADS": str(threads),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONPATH": str(ROOT),
        }
        done = subprocess.run(
            [str(python), "-m", f"benchmarks.peers.{module}", str(folder / "spec.json"), str(folder / "result.json")],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
        if done.returncode != 0:
            raise PeerFailed(f"{module} ended with {done.returncode}: {done.stderr[-2000:]}")
        result: dict[str, Any] = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        return result
