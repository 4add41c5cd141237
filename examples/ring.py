"""The whole ring once, as an operator and two dozen simulated people would turn it: everything over HTTP and the command line.

chat and ratings -> `plaudit train` -> gates -> canary, rated by the same people -> approval by a second key -> report.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp

from deploy.broker import Broker
from deploy.records import RolloutRecord
from deploy.registry import Registry
from examples import load
from examples.people import SIMULATED, People, Visit
from feedback.config import FeedbackSettings, Settings
from feedback.database import open_database
from feedback.errors import EngineUnavailable, PlauditError
from feedback.limits import UNLIMITED
from feedback.stores import open_stores
from trainer.facts import write_facts

COMPARISONS = {"concierge": 180, "smollm2": 150}
"""Each is one choice and up to two thumbs."""
PPO: dict[str, dict[str, object]] = {
    "concierge": {"iterations": 16, "rollouts": 128, "minibatch": 32, "learning_rate": 1e-3},
    "smollm2": {"iterations": 8},
}
"""The small policy needs larger steps, and its rollouts cost nothing."""
SEEDS = {"concierge": 2, "smollm2": 1}
"""On SmolLM2 a second run of PPO would cost six minutes on two cores, and the whole ring should take less than 25."""
GATES: dict[str, object] = {"demo_facts_margin_points": 10.0, "length_factor": 3.0, "allow_shorter": True}
"""A demonstration's few facts cannot certify the usual margin, and its raters ask for brevity."""
CANARY_ROUND = 24
"""Comparisons, one by each rater."""
VOTES_PER_RATER = 6
"""So few raters must be asked more often than many: a rater's mean of 3 votes is mostly noise."""
MAX_CANARY_ROUNDS = VOTES_PER_RATER + 1
START_S = 400.0


class Ring:
    """One turn in a folder of its own below `root`."""

    def __init__(
        self,
        policy: str,
        root: Path,
        progress: Callable[[str, float], None],
        say: Callable[[str], None],
        seed: int = 0,
        *,
        kafka: bool = False,
    ) -> None:
        self.example = load(policy, seed)
        self.root = root
        self.data_dir = root / "demo" / f"{policy}-{time.strftime('%Y%m%d-%H%M%S')}"
        self.progress, self.say, self.seed = progress, say, seed
        self.seconds: dict[str, float] = {}
        self.broker = Broker(self.data_dir / "kafka") if kafka else None
        """With it every event goes through Kafka, and feedback is acknowledged once Kafka has it."""
        self.process: subprocess.Popen[bytes] | None = None
        self.url = ""
        self.keys: dict[str, str] = {}
        self.registry: Registry | None = None

    async def turn(self) -> bool:
        """Whether the ring closed: an adapter that the ratings trained answers people. Says why, where it did not."""
        self.data_dir.mkdir(parents=True)
        try:
            if self.broker is not None:
                await self._timed("Kafka ready", asyncio.to_thread(self.broker.start, self.progress))
            await self._timed("model ready", asyncio.to_thread(self._prepare))
            await self._timed("service ready", asyncio.to_thread(self.start))
            people = People(self.example, self.url, self.keys["app"], seed=self.seed)
            await self._timed("first answer", self.first_answer(people))
            await self._timed("ratings", self._rate(people, COMPARISONS[self.example.name]))
            await self._timed("training", self._command("train"))
            rollout = await self._timed("canary", self._canary(people))
            if rollout.state != "awaiting":
                self.say(f"The ring did not close: rollout {rollout.id} is {rollout.state}: {rollout.reason}")
                return False
            await self._timed("approval", self._command("adapters", "promote", rollout.adapter, "--key", self.keys["operator"]))
            await self._timed("promoted answer", self._promoted(people, rollout.adapter))
            await self._timed("report", self._command("report", rollout.adapter))
        finally:
            (self.data_dir / "ring.json").write_text(json.dumps({"policy": self.example.name, "seconds": self.seconds}, indent=1))
        self.say(f"The ring closed: {rollout.adapter[:16]} answers at {self.url}.")
        self.say(" · ".join(f"{name} {seconds:.0f} s" for name, seconds in self.seconds.items()))
        return True

    def wait(self) -> None:
        """Until Ctrl-C."""
        try:
            assert self.process is not None
            self.process.wait()
        except KeyboardInterrupt:
            self.say("Stopping.")

    def stop(self) -> None:
        """End the service and, with it, the model server; then Kafka, which got everything by then."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
        if self.broker is not None:
            self.broker.stop()

    async def _timed(self, what: str, work: Any) -> Any:
        started = time.monotonic()
        try:
            return await work
        finally:
            self.seconds[what] = round(time.monotonic() - started, 1)

    def _prepare(self) -> None:
        """Folder, settings, prompts, facts, three keys: an application's, and a person's who did not train it."""
        policy = self.example.policy_dir(self.root)
        files = {"held_out": self.data_dir / "held_out.txt", "probes": self.data_dir / "probes.txt", "facts": self.data_dir / "facts.jsonl"}
        files["held_out"].write_text("\n".join(self.example.held_out) + "\n")
        files["probes"].write_text("\n".join(self.example.probes) + "\n")
        write_facts(files["facts"], self.example.facts)
        example = self.example
        sections: dict[str, dict[str, object]] = {
            "feedback": {"data_dir": str(self.data_dir.resolve()), "ack": "local" if self.broker is None else "broker"},
            **({} if self.broker is None else {"kafka": {"bootstrap": self.broker.bootstrap}}),
            "server": {"port": 0},
            "limits": UNLIMITED.model_dump(),  # two dozen simulated people ask faster than real ones, all with one key
            "policy": {
                "base": str(policy.resolve()),
                "name": example.name,
                "temperature": example.temperature,
                "max_tokens": example.max_tokens,
                "max_model_len": example.max_model_len,
                **({"system_prompt": example.system_prompt} if example.system_prompt else {}),
            },
            "rollout": {"weights": [0.5], "tick_s": 0.5, "votes_per_rater": VOTES_PER_RATER},
            "gates": GATES,
            "ppo": PPO[example.name],
            "cycle": {"seeds": SEEDS[example.name], **{name: str(path.resolve()) for name, path in files.items()}},
        }
        lines = [
            f"[{name}]\n" + "\n".join(f"{key} = {json.dumps(value)}" for key, value in keys.items()) for name, keys in sections.items()
        ]
        (self.data_dir / "plaudit.toml").write_text("\n\n".join(lines) + "\n")
        stores = open_stores(Settings(feedback=FeedbackSettings(data_dir=self.data_dir.resolve())), "operator")
        try:
            make = partial(stores.api_keys.create, by="plaudit demo")
            _, self.keys["app"] = make("demo application", ("chat", "feedback"))
            _, self.keys["operator"] = make("demo operator", ("adapters:promote", "audit"), person=True)
        finally:
            stores.close()

    def start(self) -> None:
        """`plaudit up` in a process group of its own, until it says where it answers. What it says goes to `service.log`."""
        path, self.url = self.data_dir / "service.log", ""
        with path.open("wb") as output:
            # A file, because nobody reads on: a full pipe would stop the service.
            self.process = subprocess.Popen(self.argv("up"), stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        started = time.monotonic()
        while not self.url:
            self.progress("model server starts", min(0.95, (time.monotonic() - started) / 60))
            ended = self.process.poll() is not None
            said = path.read_text(errors="replace")
            if found := re.search(r"answers at (http://\S+)", said):
                self.url = found[1]
            elif ended:
                raise EngineUnavailable("the service ended before it answered: " + " ".join(said.splitlines()[-5:]))
            else:
                time.sleep(0.2)
        self.progress("model server starts", 1.0)
        settings = Settings(feedback=FeedbackSettings(data_dir=self.data_dir.resolve()))
        self.registry = Registry(open_database(settings.registry.resolved(settings.feedback.data_dir)))
        self.say(f"Chat at {self.url} while this runs.")

    def argv(self, *words: str) -> list[str]:
        return [sys.executable, "-m", "plaudit", *words, "--config", str(self.data_dir / "plaudit.toml")]

    async def first_answer(self, people: People) -> None:
        async with aiohttp.ClientSession() as session:
            reply: Any = await people.ask(
                session, {"messages": [{"role": "user", "content": self.example.probes[0]}], "cohorts": [SIMULATED]}
            )
        self.say(f"  {self.example.probes[0]}\n  > {reply['choices'][0]['message']['content'].strip()}")

    async def _rate(self, people: People, count: int) -> list[Visit]:
        done = 0

        def on_visit(_: Visit) -> None:
            nonlocal done
            done += 1
            self.progress("people chat and rate", done / count)

        visits = await people.visits(count, on_visit=on_visit)
        self.say(f"{sum(visit.ratings for visit in visits)} ratings by {len(self.example.raters)} simulated people")
        return visits

    async def _command(self, *words: str) -> None:
        """One command of the command line; what it prints is shown."""
        process = await asyncio.create_subprocess_exec(*self.argv(*words))
        if await process.wait() != 0:
            raise PlauditError(f"plaudit {words[0]} ended with {process.returncode}")

    async def _canary(self, people: People) -> RolloutRecord:
        """The same people go on chatting and comparing until the canary has won, lost or they are tired."""
        rollout = await self._until("gates")
        for turn in range(MAX_CANARY_ROUNDS):
            if rollout.state != "canary":
                break
            await people.visits(CANARY_ROUND, thumbs=False)
            self.progress("canary", (turn + 1) / MAX_CANARY_ROUNDS)
            await asyncio.sleep(2.0)  # the archive and the controller look every half second
            rollout = self._latest() or rollout
        self.progress("canary", 1.0)
        return rollout

    async def _until(self, left: str) -> RolloutRecord:
        """The newest rollout once it has left this state."""
        end = time.monotonic() + START_S
        while time.monotonic() < end:
            rollout = self._latest()
            if rollout is not None and rollout.state != left:
                return rollout
            await asyncio.sleep(0.2)
        raise EngineUnavailable(f"no rollout has left '{left}' within {START_S:g} s")

    def _latest(self) -> RolloutRecord | None:
        assert self.registry is not None
        return next(reversed(self.registry.rollouts()), None)

    async def _promoted(self, people: People, adapter: str) -> None:
        """Ask once more; the alias must point at the adapter that the ratings trained."""
        assert self.registry is not None
        if self.registry.alias("stable") != adapter:
            raise PlauditError(f"stable is {self.registry.alias('stable')}, not {adapter}")
        await asyncio.sleep(0.5)  # gateways read the routing table every 200 ms
        await self.first_answer(people)
