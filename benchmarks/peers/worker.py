"""A peer's process that trains many jobs, for peers whose imports take longer than a job."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from benchmarks.peers import VENVS, PeerFailed, trl


class Worker:
    """`trl_preference.py` in TRL's environment; it starts with the first job and ends with its standard input."""

    def __init__(self, version: str) -> None:
        self.version = version
        self.process: subprocess.Popen[str] | None = None
        self.log = VENVS / f"preference-{os.getpid()}.log"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.process is not None:
            self.process.communicate()  # closes its input
            self.log.unlink()

    def train(self, job: dict[str, Any]) -> dict[str, Any]:
        """Its answer to a job. Raises PeerFailed, with what TRL said last."""
        if self.process is None:
            self.process = self._start()
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(job, default=str) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise PeerFailed(f"TRL ended with {self.process.wait()}: {self.log.read_text(encoding='utf-8')[-2000:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _start(self) -> subprocess.Popen[str]:
        env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        program = Path(__file__).with_name("trl_preference.py")
        command = [str(trl(self.version)), "-I", str(program)]  # isolated: nothing of this repository shadows what it imports
        with self.log.open("w") as log:
            return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=env)
