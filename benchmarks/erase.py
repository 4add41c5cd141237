"""After half of the people were erased, is anything of them left, in any file and any form? And are the adapters that used them known?

    make bench-erase             50 people, 25 of them erased; a whole learning cycle and one that was interrupted
    QUICK=1 make bench-erase     the same without the whole cycle

A real gateway over the scripted engine; everybody has unique strings in questions, answers, comments, corrections and metadata. The
gateway is killed once, so that a write-ahead log is left behind. People are erased over HTTP, by the page's session and on the command
line. Searched is all that `canaries.py` describes. That the search finds what is there is shown on the people who stayed, on everybody
before, and on planted encodings; the control is the same erasure with one step left out, for each step whose absence leaves something.
"""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import aiohttp
import torch

from benchmarks.canaries import Person, Search, invent, planted
from benchmarks.harness import ROOT, Report, quick
from deploy import lineage
from deploy.config import ErasureSettings
from deploy.manifest import ManifestFields, base_digests, read_manifest, write_adapter
from deploy.registry import Registry
from examples import load
from feedback import erasure, snapshot
from feedback.config import FeedbackSettings, Settings
from feedback.limits import UNLIMITED
from feedback.stores import Stores, open_stores
from feedback.subjects import Subjects
from trainer.config import CycleSettings, PPOSettings, RewardModelSettings
from trainer.cycle import run_cycle
from trainer.policy import Policy
from trainer.report import report_of
from trainer.schedule import Job, LearningSettings

PEOPLE = 50
CONTROLS = 5
"""So many are erased with a step left out."""
VISITORS = 5
"""Every fifth comes by the chat page."""
LEARNING = LearningSettings(
    reward_model=RewardModelSettings(maps=("linear",), ridges=(0.3, 3.0), folds=2, grid_extensions=0, base_samples=2),
    ppo=PPOSettings(iterations=1, rollouts=8, minibatch=8, microbatch=8, kl_target_nats=3.0),
    cycle=CycleSettings(evaluation_samples=2),
)
GATEWAY = """
import sys, plaudit, serving.service
from benchmarks.canaries import told
serving.service.echo = told
sys.argv = ["plaudit", "up", "--config", sys.argv[1]]
plaudit.main()
"""
MUST_HOLD = [f"{folder}/{part}" for folder in ("data", "restored") for part in ("log", "archive", "snapshots")]
"""Where everybody who stayed must be found; else the search would prove nothing about those who went."""
LEFT_OUT: dict[str, tuple[Any, str, Callable[..., object]]] = {
    "keys are not destroyed": (Subjects, "erase", lambda *_, **__: 0),
    "the write-ahead log of the keys is not emptied": (Subjects, "scrub", lambda *_: None),
    "snapshots are not redacted": (erasure, "_clean_snapshots", lambda *_: (0, True)),
    "cycles' files are not deleted": (lineage, "forget_cycles", lambda *_: None),
}


@dataclass
class Place:
    """Folders, settings and keys of one run, and what people hold of it."""

    root: Path
    keys: dict[str, str] = field(default_factory=dict)
    url: str = ""
    process: subprocess.Popen[bytes] | None = None
    tokens: dict[str, str] = field(default_factory=dict)
    """A feedback token of each person."""
    cookies: dict[str, str] = field(default_factory=dict)

    @property
    def data(self) -> Path:
        return self.root / "data"

    @property
    def settings(self) -> Path:
        return self.root / "plaudit.toml"

    def prepare(self) -> None:
        sections: dict[str, dict[str, object]] = {
            "feedback": {"data_dir": str(self.data)},
            "server": {"port": 0},
            "engine": {"kind": "scripted"},
            "policy": {"base": "concierge"},
            "limits": UNLIMITED.model_dump(),
        }
        lines = [
            f"[{name}]\n" + "\n".join(f"{key} = {json.dumps(value)}" for key, value in keys.items()) for name, keys in sections.items()
        ]
        self.settings.write_text("\n".join(lines))
        with stores_in(self.data) as stores:
            self.keys["app"] = stores.api_keys.create("application", ("chat", "feedback"))[1]
            self.keys["desk"] = stores.api_keys.create("support desk", ("erase",), person=True)[1]

    def start(self) -> None:
        """The gateway, until it answers; what it says goes to `logs/`."""
        log = self.root / "logs" / f"gateway-{time.time_ns()}.log"
        log.parent.mkdir(exist_ok=True)
        with log.open("wb") as output:
            words = [sys.executable, "-c", GATEWAY, str(self.settings)]
            self.process = subprocess.Popen(words, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
        while not (found := re.search(r"answers at (http://\S+)", log.read_text())):
            if self.process.poll() is not None:
                raise RuntimeError(f"the gateway ended: {log.read_text()[-500:]}")
            time.sleep(0.05)
        self.url = found[1]

    def end(self, number: int = signal.SIGTERM) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(number)
            self.process.wait(30)

    def command(self, *words: str) -> str:
        """One command of the command line."""
        whole = [sys.executable, "-m", "plaudit", *words, "--config", str(self.settings)]
        return subprocess.run(whole, cwd=ROOT, capture_output=True, text=True, check=True).stdout


@contextmanager
def stores_in(data: Path, process: str = "benchmark") -> Iterator[Stores]:
    stores = open_stores(Settings(feedback=FeedbackSettings(data_dir=data)), process)
    try:
        yield stores
    finally:
        stores.close()


async def talk(place: Place, people: Sequence[Person]) -> int:
    """Everybody asks, compares, rates, comments and corrects. How many requests."""
    done = 0

    async def one(session: aiohttp.ClientSession, person: Person) -> None:
        nonlocal done
        visitor = int(person.name.rpartition("-")[2]) % VISITORS == 0
        headers = (
            {"Cookie": f"plaudit_session={await _cookie(session, place)}"} if visitor else {"Authorization": f"Bearer {place.keys['app']}"}
        )
        if visitor:
            place.cookies[person.name] = headers["Cookie"]
        body: dict[str, Any] = {"model": "plaudit", "messages": [{"role": "user", "content": person.text("question")}], "max_tokens": 100}
        body |= {} if visitor else {"user": person.name, "metadata": {"note": person.text("metadata")}, "cohorts": ["simulated"]}
        for compare in (False, True):
            reply = await _post(session, f"{place.url}/v1/chat/completions", body | {"compare": compare}, headers)
            told = reply["plaudit"]
            place.tokens[person.name] = told["token"]
            said: list[dict[str, Any]] = [{"kind": "choice", "value": "a", "comment": person.text("reason")}]
            if not compare:
                said = [{"kind": "rating", "value": "up", "comment": person.text("comment")}]
                said.append({"kind": "correction", "correction": person.text("correction")})
            for each in said:
                await _post(session, f"{place.url}/v1/feedback", each, {"Authorization": f"Feedback {told['token']}"})
            for side in told.get("interactions", []):
                down = {"kind": "rating", "value": "down"}
                await _post(session, f"{place.url}/v1/feedback", down, {"Authorization": f"Feedback {side['token']}"})
            done += 1 + len(said) + len(told.get("interactions", []))

    jar = aiohttp.DummyCookieJar()  # each visitor brings their own
    async with aiohttp.ClientSession(cookie_jar=jar) as session, asyncio.TaskGroup() as group:
        for person in people:
            group.create_task(one(session, person))
    return done


async def _cookie(session: aiohttp.ClientSession, place: Place) -> str:
    async with session.get(place.url) as reply:
        return reply.cookies["plaudit_session"].value


async def _post(session: aiohttp.ClientSession, url: str, body: Mapping[str, Any], headers: Mapping[str, str]) -> dict[str, Any]:
    async with session.post(url, json=body, headers=headers) as reply:
        told: dict[str, Any] = await reply.json()
        if reply.status >= 400:
            raise RuntimeError(f"{url} answered {reply.status}: {told}")
        return told


def learn(stores: Stores, registry: Registry, digests: Sequence[str]) -> None:
    """Adapters that say which snapshot they learned from, a cycle that was interrupted, and, unless quick, a whole one with its report."""
    example, data = load("concierge"), stores.settings.feedback.data_dir
    policy = example.policy_dir(data)
    base = registry.adapter(registry.alias("stable") or "")
    for seed, digest in enumerate([*digests, *digests]):
        fields = ManifestFields(
            kind="trained",
            base_model="concierge",
            base=base_digests(policy),
            temperature=1.0,
            snapshot=digest,
            reward_model=f"r{seed}",
            seed=seed,
        )
        adapter, path = write_adapter(base.path, data / "adapters", fields)
        registry.register(adapter, path, "trainer")
    job = Job(
        policy=policy,
        policy_name=example.name,
        snapshot=data / "snapshots" / digests[-1],
        system_prompt=None,
        temperature=1.0,
        max_tokens=24,
        max_model_len=example.max_model_len,
        held_out=example.held_out[:4],
        probes=example.probes[:2],
        facts=example.facts[:8],
    )

    def interrupted(stage: str) -> None:
        if stage == "ppo":
            raise KeyboardInterrupt

    with suppress(KeyboardInterrupt):
        run_cycle(job, LEARNING, data, finished=interrupted)
    if not quick():
        settings = LearningSettings(LEARNING.reward_model, LEARNING.ppo, CycleSettings(evaluation_samples=2, seed=1))
        result = run_cycle(job, settings, data, registry=registry)
        report_of(registry.adapter(result.adapter_id), registry, data, data / "reports" / f"{result.adapter_id}.html")


def erase(place: Place, person: Person, number: int, subject: str) -> set[str]:
    """In one of the ways that there are, in turn; the adapters that it named."""
    if person.name in place.cookies:
        how: tuple[dict[str, Any], dict[str, str]] = {}, {"Cookie": place.cookies[person.name]}
    elif number % 3 == 0:
        how = {}, {"Authorization": f"Feedback {place.tokens[person.name]}"}
    elif number in (1, 4):
        printed = place.command("feedback", "erase", person.name, "--key", place.keys["desk"], "--reason", "they asked")
        return set(re.findall(r"^adapter ([0-9a-f]{64}):", printed, flags=re.M))
    else:
        how = {"subject": subject if number % 3 == 1 else person.name}, {"Authorization": f"Bearer {place.keys['desk']}"}

    async def ask() -> dict[str, Any]:
        async with aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar()) as session:
            return await _post(session, f"{place.url}/v1/people/erase", *how)

    return set(asyncio.run(ask())["adapters"])


def used(before: Path, subject: str) -> set[str]:
    """By brute force: every adapter in the store whose snapshot, as it was before, holds a row of this person."""
    held = {
        path.name for path in (before / "snapshots").iterdir() for row in snapshot.load(path).rows if subject in (row.subject, row.rater)
    }
    manifests = [read_manifest(path) for path in (before / "adapters").iterdir()]
    return {manifest.adapter_id for manifest in manifests if manifest.snapshot in held}


def restored(place: Place, backup: Path) -> Path:
    """The backup from before the erasures, brought back with the erasures made since."""
    target = place.root / "restored"
    shutil.copytree(backup, target)
    with stores_in(place.data) as stores:
        since = stores.archive.erasures()
    with stores_in(target) as stores:
        registry = Registry(stores.engine)
        erasure.replay(stores, since, lambda subject: lineage.forget_cycles(target, lineage.affected(stores, registry, subject).snapshots))
    return target


def caught(before: Path, scratch: Path, step: str, subjects: Mapping[str, Person], search: Search) -> bool:
    """Whether the search finds somebody after an erasure that leaves this step out."""
    shutil.copytree(before, scratch)
    owner, name, instead = LEFT_OUT[step]
    with patch.object(owner, name, instead), stores_in(scratch) as stores:
        registry = Registry(stores.engine)
        for subject in subjects:
            lineage.erase(stores, registry, ErasureSettings(), erasure.Asker(subject, "control"), "control")
        hits = search.found([scratch], subjects.values())
    shutil.rmtree(scratch)
    return bool(hits)


def places(hits: Mapping[str, list[str]], root: Path) -> dict[str, int]:
    """How many people were found in each part of each folder, e.g. `data/log`."""
    parts: dict[str, set[str]] = {}
    for name, where in hits.items():
        for each in where:
            path = Path(each.partition(":")[0])
            part = "/".join(path.relative_to(root).parts[:2]).partition(".")[0] if path.is_relative_to(root) else "keys"
            parts.setdefault(part, set()).add(name)
    return {part: len(names) for part, names in sorted(parts.items())}


def lived(report: Report, place: Place, people: Sequence[Person]) -> dict[str, Person]:
    """Everybody talks, snapshots are taken, the trainer learns, the gateway is killed. Whose pseudonym is whose."""
    place.prepare()
    place.start()
    requests, digests = 0, []
    for part in (people[: PEOPLE // 2], people[PEOPLE // 2 :]):
        requests += asyncio.run(talk(place, part))
        with stores_in(place.data) as stores:
            stores.ingest()
            digests.append(snapshot.build(stores.archive, stores.subjects, place.data / "snapshots").digest)
    report.say(f"{PEOPLE} people, {requests} requests")
    with stores_in(place.data) as stores:
        named = snapshot.Filters(cohorts=("simulated",))
        digests.insert(1, snapshot.build(stores.archive, stores.subjects, place.data / "snapshots", named).digest)
        learn(stores, Registry(stores.engine), digests)
        ids = {person.name: person.name for person in people}
        ids |= {name: f"session:{cookie.partition('=')[2]}" for name, cookie in place.cookies.items()}
        place.end(signal.SIGKILL)
        return {stores.subjects.pseudonym("default", ids[person.name]): person for person in people}


def run(report: Report, place: Place) -> dict[str, Any]:
    """The whole benchmark; its figures."""
    tokenizer = Policy.load(load("concierge").policy_dir(place.root)).tokenizer
    people = invent(PEOPLE, tokenizer.get_vocab(), report.seed)
    subjects = lived(report, place, people)
    stayed, going = people[::2], [(subject, person) for subject, person in subjects.items() if person in people[1::2]]
    before = place.root / "before"
    shutil.copytree(place.data, before)
    search = Search((place.data / "keys" / "kek").read_bytes(), tokenizer)
    search.remember_keys(before / "registry.sqlite")
    search.names = {subject: person.name for subject, person in subjects.items()}
    missed = planted(place.root / "planted", people[0], search)
    everywhere = search.found([before], people)
    report.say(f"before: {places(everywhere, place.root)}")
    place.start()
    seconds, wrong = [], 0
    for number, (subject, person) in enumerate(going):
        began = time.perf_counter()
        adapters = erase(place, person, number, subject)
        seconds.append(time.perf_counter() - began)
        wrong += adapters != used(before, subject)
    roots = [place.data, place.root / "logs", restored(place, before)]
    gone = [person for _, person in going]
    left = search.found(roots, gone)
    place.end()
    left |= search.found(roots, gone)  # what the gateway did at its end
    kept = search.found(roots, stayed)
    report.say(f"after: {places(kept, place.root)} of who stayed, {places(left, place.root)} of who went")
    seen = {step: caught(before, place.root / "control", step, dict(going[:CONTROLS]), search) for step in LEFT_OUT}
    where = {name: places({name: hits}, place.root) for name, hits in kept.items()}
    whole = sum(all(part in where.get(person.name, {}) for part in MUST_HOLD) for person in stayed)
    report.check("encodings that the search misses where they are planted", len(missed), at_most=0)
    report.check("people of whom the search finds nothing before the erasure", PEOPLE - len(everywhere), at_most=0)
    report.check("erased people of whom anything is found", len(left), at_most=0)
    report.check("people who stayed and are found in log, archive and snapshots, also of the restored backup", whole, at_least=len(stayed))
    report.check("erased people whose list of adapters differs from the recomputation", wrong, at_most=0)
    report.control("one step of the erasure is left out: " + "; ".join(LEFT_OUT), caught=all(seen.values()))
    return {
        "people": PEOPLE,
        "erased": len(gone),
        "milliseconds_an_erasure": round(1000 * median(seconds), 1),
        "found_before": places(everywhere, place.root),
        "found_of_who_stayed": places(kept, place.root),
        "left": {name: hits[:3] for name, hits in left.items()},
        "controls_caught": seen,
    }


def main() -> int:
    torch.set_num_threads(1)
    report = Report("erase", seed=0)
    with tempfile.TemporaryDirectory() as name:
        place = Place(Path(name))
        try:
            figures = run(report, place)
        finally:
            place.end(signal.SIGKILL)
    return report.finish(figures)


if __name__ == "__main__":
    raise SystemExit(main())
