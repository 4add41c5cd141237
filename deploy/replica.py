"""One model server and the adapters that it holds: started, watched, restarted, and given only what was checked.

`VllmServer` is the process, `ReplicaAgent` the loop beside it. The agent also works beside a server that somebody else
started, and beside the scripted engine: then there is no process to watch.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import aiohttp
import structlog

from deploy import process
from deploy.config import EngineSettings
from deploy.engine import Engine
from deploy.loading import Intake
from deploy.manifest import base_config, vllm_name
from feedback.errors import ConfigError, Conflict, EngineError, EngineUnavailable, PlauditError

Progress = Callable[[str, float], None]
"""(what is going on, share done in [0, 1])"""

PHASES = (
    ("Waiting for application startup", "opening its port", 0.95),
    ("init engine", "warming up", 0.9),
    ("# GPU blocks|# CPU blocks|KV cache size", "reserving its cache", 0.85),
    ("Loading weights took|Model loading took", "loading the model", 0.8),
    ("Starting to load model|Loading .*checkpoint", "loading the model", 0.7),
    ("world_size=|distributed_init_method", "starting the worker", 0.6),
    ("Initializing a V1 LLM engine|EngineCore", "starting the engine", 0.4),
    ("Resolved architecture|non-default args|vLLM API server version", "reading its settings", 0.2),
)
"""What vLLM's log says in which phase of a start, the latest phase first; the shares are of a start's usual time."""
LAST_LINES = 12
BACKOFF_S = (1.0, 2.0, 5.0, 10.0, 30.0)
SETTLED_S = 60.0
"""A server that lived so long starts again at once when it dies."""
SILENT_S = 60.0
"""A process that is there and says nothing for so long counts as dead."""

log = structlog.get_logger()


def fast_dtype(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """bfloat16 where the processor multiplies in it, else float32: emulated bfloat16 is slower and less exact."""
    try:
        flags = set(re.findall(r"\S+", cpuinfo.read_text()))
    except OSError:
        return "float32"
    return "bfloat16" if flags & {"avx512_bf16", "amx_bf16", "bf16"} else "float32"


class VllmServer:
    """vLLM's OpenAI server as a process group of its own on 127.0.0.1."""

    def __init__(self, policy: Path, name: str, settings: EngineSettings, folder: Path, *, max_model_len: int = 1024) -> None:
        """`name` is what it calls the bare base model, which nobody may ask; `folder` takes its log and its pid."""
        self.policy = policy.resolve()
        self.name = name
        self.settings = settings
        self.folder = folder
        self.max_model_len = max_model_len
        self.port = settings.port or process.free_port()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log_path(self) -> Path:
        return self.folder / "vllm.log"

    @property
    def pid(self) -> int | None:
        """Of the process that leads the group; None before the first start."""
        return self._process.pid if self._process else None

    async def start(self, on_progress: Progress | None = None) -> None:
        """Returns once it answers. Raises InvalidInput where the policy is no model, ConfigError where the port is taken,
        EngineUnavailable with the last lines of its log where it ends or takes longer than `start_timeout_s`."""
        if self.alive():
            return
        base_config(self.policy)
        self.folder.mkdir(parents=True, exist_ok=True)
        await self.stop()
        await asyncio.to_thread(process.end_left_over, self.folder / "vllm.pid", "model server")
        if (taken := process.port_taken(self.port)) is not None:
            told = f"engine.port is {self.port}, which is taken on 127.0.0.1 ({taken}); choose another one, or 0 for a free one"
            raise ConfigError(told, field="engine.port")
        if self.log_path.exists():
            self.log_path.replace(self.log_path.with_suffix(".log.1"))
        with self.log_path.open("wb") as output:
            # A group of its own: a Ctrl-C at the terminal reaches Plaudit alone, which ends the server when its answers are done.
            self._process = subprocess.Popen(
                self.command(),
                env=self.environment(),
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        process.remember(self.folder / "vllm.pid", self._process.pid)
        try:
            await self._until_it_answers(on_progress or (lambda what, share: None))
        except BaseException:
            await self.stop(grace_s=0)
            raise

    def alive(self) -> bool:
        """Whether the process is there; not whether it answers."""
        return self._process is not None and self._process.poll() is None

    async def stop(self, grace_s: float | None = None) -> None:
        """End the whole group: answers may go on for `shutdown_timeout_s`, then it is killed."""
        server, self._process = self._process, None
        if server is None:
            return
        grace_s = self.settings.shutdown_timeout_s + 5 if grace_s is None else grace_s
        if server.poll() is None and grace_s > 0:
            server.terminate()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(grace_s):
                    while server.poll() is None:
                        await asyncio.sleep(0.05)
        # Also after its own end: kill -9 of the server leaves its engine and worker behind, which hold the memory.
        process.signal_group(server.pid, signal.SIGKILL)
        await asyncio.to_thread(server.wait)
        (self.folder / "vllm.pid").unlink(missing_ok=True)

    def command(self) -> list[str]:
        """The command line of the server; every flag keeps a default of vLLM from hurting here."""
        settings = self.settings
        flags = {
            "model": self.policy,
            "served-model-name": self.name,
            "host": "127.0.0.1",
            "port": self.port,
            "dtype": fast_dtype() if settings.dtype == "auto" else settings.dtype,
            "max-model-len": self.max_model_len,
            "max-num-seqs": settings.max_num_seqs,
            "max-num-batched-tokens": max(settings.max_num_batched_tokens, settings.max_num_seqs),
            "max-loras": settings.max_loras,
            "max-cpu-loras": max(settings.max_cpu_loras, settings.max_loras),
            "max-lora-rank": settings.max_lora_rank,
            "kv-cache-memory-bytes": settings.kv_cache_mb * 2**20,
            # 128 by default on a CPU, so that shorter prompts would never be found in the cache.
            "block-size": 32,
            # Otherwise the model's own generation_config.json changes top_p and penalties behind everybody's back.
            "generation-config": "vllm",
            "logprobs-mode": "processed_logprobs",
            "shutdown-timeout": settings.shutdown_timeout_s,
        }
        told = [part for flag, value in flags.items() for part in (f"--{flag}", str(value))]
        # Looks several times a second would fill the disk with lines about themselves.
        quiet = "--disable-uvicorn-access-log"
        return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--enable-lora", "--enable-request-id-headers", quiet, *told]

    def environment(self) -> dict[str, str]:
        threads = self.settings.threads or len(os.sched_getaffinity(0))
        return {
            **os.environ,
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
            # Compiles nothing of a model with LoRA, and delays the first answer by 15 s for two functions of the sampler.
            "TORCH_COMPILE_DISABLE": "1",
            # By itself vLLM binds to one core of two, and two servers bind to the same one.
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": str(threads),
            "VLLM_HOST_IP": "127.0.0.1",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }

    async def _until_it_answers(self, on_progress: Progress) -> None:
        deadline = time.monotonic() + self.settings.start_timeout_s
        on_progress("starting", 0.0)
        told = "starting"
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5)) as http:
            while not await self._answers(http):
                if not self.alive():
                    code = self._process.returncode if self._process else None
                    raise EngineUnavailable(self._said(f"the model server ended with {code} while it started"))
                if time.monotonic() > deadline:
                    limit = f"engine.start_timeout_s is {self.settings.start_timeout_s:g}"
                    raise EngineUnavailable(self._said(f"the model server did not answer in time ({limit})"))
                phase = _phase(self._tail())
                if phase and phase[0] != told:
                    told = phase[0]
                    on_progress(*phase)
                await asyncio.sleep(0.2)
        on_progress("ready", 1.0)

    async def _answers(self, http: aiohttp.ClientSession) -> bool:
        try:
            async with http.get(f"{self.url}/health") as reply:
                return reply.status == 200
        except (aiohttp.ClientError, TimeoutError, OSError):
            return False

    def _tail(self) -> str:
        with self.log_path.open("rb") as file:
            file.seek(max(0, self.log_path.stat().st_size - 65536))
            return file.read().decode(errors="replace")

    def _said(self, what: str) -> str:
        lines = [line for line in self._tail().splitlines() if line.strip()]
        last = "\n  ".join(lines[-LAST_LINES:]) or "(it said nothing)"
        return f"{what}; its log is {self.log_path} and ends with:\n  {last}"


def _phase(said: str) -> tuple[str, float] | None:
    return next(((what, share) for pattern, what, share in PHASES if re.search(pattern, said)), None)


class ReplicaAgent:
    """Keeps one model server holding what the routing table needs. One agent for each server; only `run` may change names."""

    def __init__(
        self,
        engine: Engine,
        server: VllmServer | None,
        wanted: Callable[[], dict[str, Path]],
        held: Callable[[set[str]], None],
        drain_s: float,
        intake: Intake,
        *,
        tick_s: float = 0.2,
        report_s: float = 2.0,
    ) -> None:
        """`wanted` says which names should be loaded from which folders, `held` hears which are: at every change and every
        `report_s`. Both may wait for a database; they run in a thread. The server is only ever told folders of `intake`."""
        self._engine, self._server, self._wanted, self._report, self._intake = engine, server, wanted, held, intake
        self._drain_s, self._tick_s, self._report_s = drain_s, tick_s, report_s
        self.problems: dict[str, str] = {}
        """Why a wanted name is not held, in words."""
        self._verified: dict[str, Path] = {}
        """Names that may be asked for, and the private folder of each."""
        self._unused: dict[Path, float] = {}
        self._unwanted: dict[str, float] = {}
        self._retry: dict[str, float] = {}
        self._told: tuple[set[str], float] = (set(), float("-inf"))
        self._heard = time.monotonic()
        self._deaths = 0
        self._said = ""

    async def run(self, on_progress: Progress | None = None) -> None:
        """Until it is cancelled; then the server ends. Raises what the first start raises; later ones are tried again."""
        try:
            if self._server is not None:
                await self._server.start(on_progress)
            started = self._heard = time.monotonic()
            while True:
                if self._server is not None and (not self._server.alive() or time.monotonic() - self._heard > SILENT_S):
                    started = await self._restart(self._server, started, on_progress)
                try:
                    await self.step()
                    self._said = ""
                except Exception as exc:  # noqa: BLE001  the loop's edge: whoever reads the log notices, the next look tries again
                    self._complain(exc)
                await asyncio.sleep(self._tick_s)
        finally:
            if self._server is not None:
                await self._server.stop()

    async def step(self) -> None:
        """One look: load what is wanted, forget what nobody has wanted for `drain_s`, report what is held."""
        try:
            loaded = await self._engine.models()
        except EngineError:
            await self._tell(set())
            raise
        self._heard = time.monotonic()
        wanted = await asyncio.to_thread(self._wanted)
        # The server reads a folder again whenever it made room for others: one that was touched is not held any more.
        self._verified = {
            name: folder for name, folder in self._verified.items() if loaded.get(name) == folder and self._intake.unchanged(folder)
        }
        for name, source in wanted.items():
            self._unwanted.pop(name, None)
            if name not in self._verified and time.monotonic() >= self._retry.get(name, 0.0):
                await self._take(name, source, loaded)
                await self._tell(set(self._verified))
        await self._forget(loaded, wanted)
        self.problems = {name: problem for name, problem in self.problems.items() if name in wanted}
        await self._tell(set(self._verified))

    async def _take(self, name: str, source: Path, loaded: dict[str, Path]) -> None:
        """Check an adapter, load exactly what was checked, and look again: a name that was loaded from elsewhere is loaded anew."""
        try:
            own = vllm_name(source.name)
            if name != own and not name.startswith(f"{own}-b"):
                raise Conflict(f"{name} is wanted from the folder of adapter {source.name[:16]}, whose name is {own}")
            folder = await asyncio.to_thread(self._intake.take, source)
            if name in loaded and loaded[name] != folder:
                await self._engine.unload(name)
            await self._engine.load(name, folder)
            if not self._intake.unchanged(folder):
                await self._engine.unload(name)
                raise Conflict(f"adapter {source.name[:16]}: {folder} was changed while the server loaded it; it is taken again")
        except (PlauditError, OSError) as exc:
            self._verified.pop(name, None)
            self._retry[name] = time.monotonic() + 5.0
            if self.problems.get(name) != str(exc):
                log.error("adapter not loaded", name=name, problem=str(exc))
            self.problems[name] = str(exc)
        else:
            self._verified[name] = folder
            self.problems.pop(name, None)
            self._retry.pop(name, None)

    async def _forget(self, loaded: dict[str, Path], wanted: dict[str, Path]) -> None:
        """Unload what nobody has wanted for `drain_s` and nobody has in flight; delete its folder as long again after that."""
        now = time.monotonic()
        leaving = loaded.keys() - wanted.keys()
        self._unwanted = {name: self._unwanted.get(name, now) for name in leaving}
        kept = await asyncio.to_thread(self._intake.kept)
        unused = set(kept) - set(loaded.values()) - set(self._verified.values())
        self._unused = {folder: self._unused.get(folder, now) for folder in unused}
        due = [name for name, since in self._unwanted.items() if now - since >= self._drain_s]
        over = [folder for folder, since in self._unused.items() if now - since >= self._drain_s]
        if not due and not over:
            return
        writing = await self._engine.in_flight() or set()
        for name in set(due) - writing:
            # Told first, so that nobody is sent to a name that is about to go. Answers being written go on.
            self._verified.pop(name, None)
            await self._tell(set(self._verified))
            await self._engine.unload(name)
            del self._unwanted[name]
        # The server may read the folder of an answer that is still being written, and ends where it is gone.
        busy = {name.split("-")[1] for name in writing if name.startswith("a-")}
        for folder in over:
            if folder.name[:16] not in busy:
                await asyncio.to_thread(self._intake.drop, folder)
                del self._unused[folder]

    async def _tell(self, names: set[str]) -> None:
        told, when = self._told
        if names == told and time.monotonic() - when < self._report_s:
            return
        await asyncio.to_thread(self._report, names)
        self._told = (names, time.monotonic())

    def _complain(self, exc: Exception) -> None:
        if (problem := str(exc)) != self._said:  # a failure that lasts is told once: at every look it would fill the disk
            log.warning("replica", problem=problem)
            self._said = problem

    async def _restart(self, server: VllmServer, started: float, on_progress: Progress | None) -> float:
        """Start again, later after every death in a row. Names are verified and loaded again by the next look."""
        self._verified.clear()
        self._deaths = 1 if time.monotonic() - started > SETTLED_S else self._deaths + 1
        wait_s = BACKOFF_S[min(self._deaths, len(BACKOFF_S)) - 1]
        log.error("the model server is gone; starting it again", wait_s=wait_s, deaths=self._deaths)
        try:
            await self._tell(set())
        except Exception as exc:  # noqa: BLE001  the loop's edge: the server starts again although the registry is away
            self._complain(exc)
        try:
            await asyncio.sleep(wait_s)
            await server.stop(grace_s=0)
            await server.start(on_progress)
        except Exception as exc:  # noqa: BLE001  the loop's edge: a start that fails is logged and tried again, later each time
            log.error("the model server did not start", problem=str(exc))
        self._heard = time.monotonic()
        return time.monotonic()
