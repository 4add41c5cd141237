"""The people of `erase.py` and where they live: a real gateway, a real broker where one can run, and everything that learns from them."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from benchmarks.canaries import Person
from benchmarks.harness import ROOT, Report, quick
from deploy.broker import Broker
from deploy.manifest import ManifestFields, base_digests, write_adapter
from deploy.registry import Registry
from examples import load
from feedback import export, outbox, snapshot
from feedback.config import FeedbackSettings, KafkaSettings, Settings
from feedback.events import InteractionStarted, StartedText, new_id
from feedback.stores import Stores, open_stores
from trainer.config import CycleSettings, PPOSettings, RewardModelSettings
from trainer.cycle import run_cycle
from trainer.report import report_of
from trainer.schedule import Job, LearningSettings

PEOPLE = 50
VISITORS = 5
"""Every fifth comes by the chat page."""
OUTAGE = 40
"""Who has this number or a higher one, and is no visitor, also talks while the broker is away; who of them goes is erased meanwhile."""
BY_COMMAND = (1, 4, 7)
"""The second, fifth and eighth who go are erased on the command line; the eighth is a visitor."""
TOO_LARGE = (46, 47)
"""Somebody who stays and somebody who goes say something that Kafka does not take."""
TOO_LARGE_BYTES = 2_200_000
LIMITS: dict[str, object] = {
    "chat_per_minute": 10_000,
    "streams_per_key": 0,
    "feedback_per_minute": 1_000,
    "feedback_per_day": 1_000,
    "changes": 100,
}
"""Nobody meets them here, and everybody is counted."""
LEARNING = LearningSettings(
    reward_model=RewardModelSettings(maps=("linear",), ridges=(0.3, 3.0), folds=2, grid_extensions=0, base_samples=2),
    ppo=PPOSettings(iterations=1, rollouts=8, minibatch=8, microbatch_tokens=512, kl_target_nats=3.0),
    cycle=CycleSettings(evaluation_samples=2),
)
GATEWAY = """
import sys, plaudit, serving.service
from benchmarks.canaries import told
serving.service.echo = told
sys.argv = ["plaudit", "up", "--config", sys.argv[1]]
plaudit.main()
"""
FORMS: dict[export.Form, str] = {"preference": "pairs.jsonl", "unpaired": "thumbs.jsonl.gz", "jsonl": "rows.jsonl"}
"""Form of an export -> the file's name."""


@dataclass
class Place:
    """Folders, settings and keys of one run, and what people hold of it."""

    root: Path
    broker: Broker | None = None
    keys: dict[str, str] = field(default_factory=dict)
    url: str = ""
    process: subprocess.Popen[bytes] | None = None
    tokens: dict[str, str] = field(default_factory=dict)
    """A feedback token of each person."""
    cookies: dict[str, str] = field(default_factory=dict)
    probes: tuple[str, ...] = ()
    """What the operator's own prompts say, which reports show."""

    @property
    def data(self) -> Path:
        return self.root / "data"

    @property
    def kafka(self) -> KafkaSettings:
        return KafkaSettings(bootstrap=self.broker.bootstrap if self.broker else None, partitions=3, session_timeout_s=3.0)

    def settings(self, name: str = "data", kafka: bool = True) -> Path:
        """The settings' file of a data folder."""
        sections: dict[str, dict[str, object]] = {
            "feedback": {"data_dir": str(self.root / name)},
            "server": {"port": 0},
            "engine": {"kind": "scripted"},
            "policy": {"base": "concierge"},
            "limits": LIMITS,
        }
        if kafka and self.broker is not None:
            sections["kafka"] = self.kafka.model_dump(include={"bootstrap", "partitions", "session_timeout_s"})
        lines = [
            f"[{name}]\n" + "\n".join(f"{key} = {json.dumps(value)}" for key, value in keys.items()) for name, keys in sections.items()
        ]
        path = self.root / f"{name}.toml"
        path.write_text("\n".join(lines))
        return path

    def prepare(self) -> None:
        if self.broker is not None:
            self.broker.start()
        with stores_in(self.data) as stores:
            self.keys["app"] = stores.api_keys.create("application", ("chat", "feedback"))[1]
            self.keys["desk"] = stores.api_keys.create("support desk", ("erase",), person=True)[1]
            self.keys["data"] = stores.api_keys.create("data desk", ("dataset", "keys"), person=True)[1]

    def start(self) -> None:
        """The gateway, until it answers; what it says goes to `logs/`."""
        log = self.root / "logs" / f"gateway-{time.time_ns()}.log"
        log.parent.mkdir(exist_ok=True)
        with log.open("wb") as output:
            words = [sys.executable, "-c", GATEWAY, str(self.settings())]
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

    def close(self) -> None:
        self.end(signal.SIGKILL)
        if self.broker is not None:
            self.broker.kill()

    def command(self, *words: str, settings: Path | None = None) -> str:
        """One command of the command line; what it prints."""
        whole = [sys.executable, "-m", "plaudit", *words, "--config", str(settings or self.settings())]
        done = subprocess.run(whole, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"plaudit {words[0]} ended with {done.returncode}: {done.stderr[-500:]}")
        return done.stdout

    def export(self, folder: str) -> None:
        """Everything as of now, in every form."""
        (self.root / folder).mkdir()
        with stores_in(self.data) as stores:
            taken = snapshot.build(stores.archive, stores.subjects, self.data / "snapshots")
            for form, name in FORMS.items():
                done = export.export(taken, self.root / folder / name, form)
                export.record(stores.engine, "data desk", taken, done, form)

    def settle(self) -> None:
        """Wait until Kafka has what it takes and the archive has everything."""
        logs = sorted((self.data / "log").glob("*.sqlite"))
        until(lambda: self.broker is None or outbox.count(logs, outbox.WAITS) == 0)
        until(lambda: _ids(logs, f"SELECT event_id FROM events WHERE sent != {outbox.DEAD}") <= _archived(self.data))


def until(true: Callable[[], bool], within_s: float = 120) -> None:
    end = time.monotonic() + within_s
    while not true():
        if time.monotonic() > end:
            raise RuntimeError(f"it did not come to that within {within_s:g} s")
        time.sleep(0.05)


def _ids(paths: Sequence[Path], query: str) -> set[str]:
    found: set[str] = set()
    for path in paths:
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=10)) as db:
            found |= {row[0] for row in db.execute(query)}
    return found


def _archived(data: Path) -> set[str]:
    return _ids([data / "archive.sqlite"], "SELECT event_id FROM events")


@contextmanager
def stores_in(data: Path, process: str = "benchmark") -> Iterator[Stores]:
    """Beside a gateway with Kafka too: it carries what is appended here."""
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
        visitor = is_visitor(person)
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


def learn(place: Place, stores: Stores, registry: Registry, digests: Sequence[str]) -> None:
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
        gist = report_of(registry.adapter(result.adapter_id), registry, data, data / "reports" / f"{result.adapter_id}.html")
        (data / "reports" / f"{result.adapter_id}.txt").write_text(gist)
        place.probes = tuple(str(probe) for probe in job.probes)


def say_too_much(place: Place, people: Mapping[str, Person]) -> None:
    """Questions that are larger than the topic's messages: they become dead letters, and nothing else holds them back."""
    with stores_in(place.data) as stores:
        for subject, person in people.items():
            text = StartedText(messages=[{"role": "user", "content": person.text("question") + "." * TOO_LARGE_BYTES}])
            started = InteractionStarted(
                event_id=new_id(), interaction_id=new_id(), subject=subject, subject_kind="named", model="plaudit", adapter=""
            )
            stores.log.append_sync([started.model_copy(update={"sealed": stores.subjects.seal((subject,), text)})])
    logs = sorted((place.data / "log").glob("*.sqlite"))
    until(lambda: outbox.count(logs, outbox.DEAD) == len(people))


def lived(report: Report, place: Place, people: Sequence[Person]) -> dict[str, Person]:
    """Everybody talks, snapshots, exports and a backup are taken, the trainer learns, the gateway is killed. Whose pseudonym is whose."""
    place.start()
    requests, digests = 0, []
    for part in (people[: PEOPLE // 2], people[PEOPLE // 2 :]):
        requests += asyncio.run(talk(place, part))
        place.settle()
        with stores_in(place.data) as stores:
            digests.append(snapshot.build(stores.archive, stores.subjects, place.data / "snapshots").digest)
    report.say(f"{PEOPLE} people, {requests} requests")
    with stores_in(place.data) as stores:
        ids = {person.name: person.name for person in people}
        ids |= {name: f"session:{cookie.partition('=')[2]}" for name, cookie in place.cookies.items()}
        subjects = {stores.subjects.pseudonym("default", ids[person.name]): person for person in people}
    if place.broker is not None:
        say_too_much(place, {subject: person for subject, person in subjects.items() if number_of(person) in TOO_LARGE})
    place.export("exported")
    (place.root / "exported-named").mkdir()
    named = str(place.root / "exported-named" / "rows.jsonl")
    place.command("feedback", "export", "--out", named, "--form", "jsonl", "--cohort", "simulated", "--key", place.keys["data"])
    with stores_in(place.data) as stores:
        some = snapshot.Filters(cohorts=("simulated",))
        digests.insert(1, snapshot.build(stores.archive, stores.subjects, place.data / "snapshots", some).digest)
        learn(place, stores, Registry(stores.engine), digests)
    place.command("backup", str(place.root / "backup"), "--key", place.keys["data"])
    place.end(signal.SIGKILL)
    shutil.copytree(place.data, place.root / "before")
    return subjects


def erase(place: Place, person: Person, number: int, subject: str) -> tuple[set[str], set[Path] | None]:
    """In one of the ways that there are, in turn; the adapters that it named, and the exports, where it names them."""
    if number in BY_COMMAND:
        who = subject if is_visitor(person) else person.name
        printed = place.command("feedback", "erase", who, "--key", place.keys["desk"], "--reason", "they asked")
        files = {Path(name) for name in re.findall(r"^export (.+?): delete it", printed, flags=re.M)}
        return set(re.findall(r"^adapter ([0-9a-f]{64}):", printed, flags=re.M)), files
    if is_visitor(person):
        how: tuple[dict[str, Any], dict[str, str]] = {}, {"Cookie": place.cookies[person.name]}
    elif number % 3 == 0:
        how = {}, {"Authorization": f"Feedback {place.tokens[person.name]}"}
    else:
        how = {"subject": subject if number % 3 == 1 else person.name}, {"Authorization": f"Bearer {place.keys['desk']}"}

    async def ask() -> dict[str, Any]:
        async with aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar()) as session:
            return await _post(session, f"{place.url}/v1/people/erase", *how)

    return set(asyncio.run(ask())["adapters"]), None


def number_of(person: Person) -> int:
    return int(person.name.rpartition("-")[2])


def is_visitor(person: Person) -> bool:
    return number_of(person) % VISITORS == 0


def talks_in_outage(person: Person) -> bool:
    return number_of(person) >= OUTAGE and not is_visitor(person)
