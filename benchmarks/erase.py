"""After half of the people were erased, is anything of them left, in any file and any form? And are the adapters that used them known?

    make bench-erase             50 people, 25 of them erased; a whole learning cycle and one that was interrupted
    QUICK=1 make bench-erase     the same without the whole cycle and its report

A real gateway over the scripted engine and a real Kafka broker; everybody has unique strings in questions, answers, comments,
corrections and metadata. Exports and a backup are made, then the gateway is killed, so that write-ahead logs are left behind. People are
erased over HTTP, by the page's session and on the command line, some of them while the broker is away and their words wait for it.

Searched is all that `canaries.py` describes: data folder, logs, what is exported afterwards, Kafka's segments, an archive made from the
topic, the backup restored where nothing is known but the list of erasures, and where nothing is known but the topic. Each search shows
that it finds what is there on the people who stayed, on everybody before, on planted encodings and with keys that were stolen before the
erasure. The control is the same with one step left out, for each step whose absence leaves something. Without java and mvn the parts
about Kafka are left out, and the figure `skipped` says so.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch

from benchmarks import erase_copies as copies
from benchmarks.canaries import Person, Search, invent, planted
from benchmarks.erase_world import FORMS, PEOPLE, TOO_LARGE, Place, erase, lived, stores_in, talk, talks_in_outage, until
from benchmarks.harness import Report, quick
from deploy import broker, lineage
from deploy.config import ErasureSettings
from deploy.manifest import read_manifest
from deploy.registry import Registry
from examples import load
from feedback import erasure, outbox, snapshot
from feedback.subjects import Subjects
from trainer.policy import Policy

CONTROLS = 5
"""So many are erased with a step left out."""
KAFKA = "outbox, dead letters, Kafka's segments, an archive and a restore by the topic"
LEFT_OUT: dict[str, tuple[Any, str, Callable[..., object]]] = {
    "keys are not destroyed": (Subjects, "erase", lambda *_, **__: 0),
    "the write-ahead log of the keys is not emptied": (Subjects, "scrub", lambda *_: None),
    "snapshots are not redacted": (erasure, "_clean_snapshots", lambda *_: (0, True)),
    "cycles' files are not deleted": (lineage, "forget_cycles", lambda *_: None),
}
NO_LIST = "a restore does not know of the erasures"
NO_ERASURES = "a reader of the topic does not know erasures"


@dataclass
class World:
    """One run after everybody has talked."""

    report: Report
    place: Place
    search: Search
    people: Sequence[Person]
    subjects: Mapping[str, Person]
    thief: Path
    figures: dict[str, Any] = field(default_factory=dict)
    caught: dict[str, bool] = field(default_factory=dict)

    @property
    def stayed(self) -> Sequence[Person]:
        return self.people[::2]

    @property
    def gone(self) -> Sequence[Person]:
        return self.people[1::2]

    @property
    def going(self) -> list[tuple[str, Person]]:
        return [(subject, person) for subject, person in self.subjects.items() if person in self.gone]

    def stolen(self, people: Sequence[Person], *folders: Path) -> dict[str, list[str]]:
        """Who is found in these folders by whoever has everybody's keys as they were before."""
        return copies.inside(self.search.found([self.thief, *folders], people), *folders)


def used(before: Path, subject: str) -> set[str]:
    """By brute force: every adapter in the store whose snapshot, as it was before, holds a row of this person."""
    held = {
        path.name for path in (before / "snapshots").iterdir() for row in snapshot.load(path).rows if subject in (row.subject, row.rater)
    }
    manifests = [read_manifest(path) for path in (before / "adapters").iterdir()]
    return {manifest.adapter_id for manifest in manifests if manifest.snapshot in held}


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


def begun(report: Report, place: Place) -> World:
    """Everybody has talked; what the search finds of them before anybody is erased."""
    with ThreadPoolExecutor(1) as pool:
        prepared = pool.submit(place.prepare)  # the broker starts meanwhile
        tokenizer = Policy.load(load("concierge").policy_dir(place.root)).tokenizer
    prepared.result()
    people = invent(PEOPLE, tokenizer.get_vocab(), report.seed)
    subjects = lived(report, place, people)
    before = place.root / "before"
    search = Search((place.data / "keys" / "kek").read_bytes(), tokenizer)
    search.remember_keys(before / "registry.sqlite")
    search.names = {subject: person.name for subject, person in subjects.items()}
    world = World(report, place, search, people, subjects, copies.old_keys(place))
    missed = planted(place.root / "planted", people[0], search)
    everywhere = search.found([before], people)
    in_logs = {name for name, where in everywhere.items() if any(".sqlite-wal" in each for each in where)}
    exported = copies.in_every_form(search, place.root / "exported", people)
    report.say(f"before: {places(everywhere, place.root)}")
    report.check("encodings that the search misses where they are planted", len(missed), at_most=0)
    report.check("people of whom the search finds nothing before the erasure", PEOPLE - len(everywhere), at_most=0)
    report.check("people found in a write-ahead log before the erasure", len(in_logs), at_least=1)
    report.check("people found in the exports of every form from before the erasure", exported, at_least=PEOPLE)
    world.figures["found_before"] = places(everywhere, place.root)
    if not quick():
        texts = [path.read_text() for path in (before / "reports").iterdir()]
        shown = sum(all(probe in text for probe in place.probes) for text in texts)
        report.check("reports that show all of the operator's own prompts, before the erasure", shown, at_least=1)
        report.check(
            "people of whom a report shows anything, before the erasure", len(copies.inside(everywhere, before / "reports")), at_most=0
        )
    return world


def erase_all(world: World) -> None:
    """Everybody who goes is erased, the last ones while the broker is away and what they said meanwhile waits for it."""
    place, report, away = world.place, world.report, False
    place.start()
    seconds, wrong, misnamed = [], 0, 0
    for number, (subject, person) in enumerate(world.going):
        if talks_in_outage(person) and place.broker is not None and not away:
            away = True
            place.broker.kill()
            asyncio.run(talk(place, [each for each in world.people if talks_in_outage(each)]))
            world.figures["waited_for_kafka"] = len(copies.waiting(place))
        started = time.perf_counter()
        adapters, files = erase(place, person, number, subject)
        seconds.append(time.perf_counter() - started)
        wrong += adapters != used(place.root / "before", subject)
        misnamed += files is not None and files != copies.holding(world.search, place, person)
    world.figures["milliseconds_an_erasure"] = round(1000 * median(seconds), 1)
    report.check("erased people whose list of adapters differs from the recomputation", wrong, at_most=0)
    report.check("erased people whose list of exports differs from the files that hold them", misnamed, at_most=0)
    names = dict(world.going)
    if place.broker is not None:
        waits = copies.waiting(place)
        report.check("people who stayed and whose events wait for the broker", len(waits - names.keys()), at_least=1)
        report.check("erased people of whom anything but the erasure waits for the broker", len(waits & names.keys()), at_most=0)
        place.broker.start()
        logs = sorted((place.data / "log").glob("*.sqlite"))
        until(lambda: outbox.count(logs, outbox.WAITS) == 0)
        letters = copies.dead(place)
        report.check("people who stayed and whose dead letter is there", len(letters - names.keys()), at_least=len(TOO_LARGE) - 1)
        report.check("erased people of whom a dead letter is left", len(letters & names.keys()), at_most=0)
    place.settle()
    counted = copies.counted(place)
    report.check("people who stayed and whose counters name their answers", len(counted - names.keys()), at_least=len(world.stayed))
    report.check("erased people of whom a counter names an answer", len(counted & names.keys()), at_most=0)
    left = copies.left_in_pages(place)
    report.check(
        "people who stayed and whose answers the bytes of the counters' file name", len(left - names.keys()), at_least=len(world.stayed)
    )
    report.check("erased people of whom they name an answer", len(left & names.keys()), at_most=0)


def kafka(world: World) -> list[Path]:
    """Kafka's segments and archives that are made from them; the folders to be searched with the others."""
    place, report, gone = world.place, world.report, dict(world.going)
    segments = place.root / "kafka"
    named, erased = copies.in_segments(place)
    report.check("people whose pseudonym is seen in Kafka's segments", len(named & world.subjects.keys()), at_least=PEOPLE)
    report.check("erased people whose erasure is seen in Kafka's segments", len(erased & gone.keys()), at_least=len(gone))
    report.check(
        "people of whom the stolen keys open something in Kafka's segments", len(world.stolen(world.people, segments)), at_least=PEOPLE
    )
    report.check("people whose words lie open in Kafka's folder", len(world.search.found([segments], world.people)), at_most=0)
    made = copies.from_topic(place, "from-topic")
    differing = copies.differing(place, made)
    report.check("events by which an archive made from the topic differs from the one that lived", len(differing), at_most=0)
    report.check("erased people of whom the stolen keys open something in that archive", len(world.stolen(world.gone, made)), at_most=0)
    world.caught[NO_ERASURES] = bool(world.stolen(world.gone, copies.from_topic(place, "forgetful", forgetful=True)))
    return [segments, made]


def searched(world: World, roots: list[Path]) -> None:
    """Everything is searched for everybody; with a part that has to hold all who stayed, in each folder."""
    place, report, search = world.place, world.report, world.search
    left = search.found(roots, world.gone)
    place.end()
    hits = search.found(roots, world.people)  # what the gateway did at its end, too
    gone = {person.name for person in world.gone}
    left |= {name: where for name, where in hits.items() if name in gone}
    kept = {name: where for name, where in hits.items() if name not in gone}
    report.say(f"after: {places(kept, place.root)} of who stayed, {places(left, place.root)} of who went")
    must = [f"{root.name}/{part}" for root in roots if (root / "log").is_dir() for part in ("log", "archive", "snapshots")]
    must += [f"exported-after/{name.partition('.')[0]}" for name in FORMS.values()]
    must += ["kafka/data", "from-topic/archive"] if place.broker is not None else []
    where = {name: places({name: found}, place.root) for name, found in kept.items()}
    whole = sum(all(part in where.get(person.name, {}) for part in must) for person in world.stayed)
    said = b"".join(path.read_bytes() for path in (place.root / "logs").iterdir())
    report.check("starts of the gateway that the logs tell of", said.count(b"answers at"), at_least=2)
    report.check("erased people of whom anything is found", len(left), at_most=0)
    report.check(f"people who stayed and are found in {len(must)} places: {', '.join(must)}", whole, at_least=len(world.stayed))
    stolen = world.stolen(world.gone, place.data)
    report.check("erased people of whom the stolen keys open something in the data folder", len(stolen), at_most=0)
    world.figures |= {"found_of_who_stayed": places(kept, place.root), "left": {name: found[:3] for name, found in left.items()}}
    world.figures |= {"left_for_stolen_keys": {name: found[:3] for name, found in stolen.items()}}
    if not quick():
        again = search.found([copies.replaced(place)], world.people)
        report.check("erased people found in the data folder after a restore in its place", len(again.keys() & gone), at_most=0)
        report.check("people who stayed and are found there", len(again.keys() - gone), at_least=len(world.stayed))


def run(report: Report, place: Place) -> dict[str, Any]:
    """The whole benchmark; its figures."""
    world = begun(report, place)
    erase_all(world)
    place.export("exported-after")
    lists = place.root / "kept-elsewhere.jsonl"
    shutil.copy(place.data / "erased.jsonl", lists)
    roots = [place.data, place.root / "logs", place.root / "exported-after"]
    with ThreadPoolExecutor(2) as pool:  # a restore has a process of its own
        unaware = pool.submit(copies.restored, place, "unaware")
        aware = [pool.submit(copies.restored, place, "restored", lists)]
        if place.broker is not None:
            aware.append(pool.submit(copies.restored, place, "restored-by-topic", kafka=True))
            roots += kafka(world)
    roots += [each.result() for each in aware]
    world.caught[NO_LIST] = len(world.search.found([unaware.result()], world.gone)) == len(world.gone)
    searched(world, roots)
    for step in LEFT_OUT:
        world.caught[step] = caught(place.root / "before", place.root / "control", step, dict(world.going[:CONTROLS]), world.search)
    report.control("one step is left out: " + "; ".join(world.caught), caught=all(world.caught.values()))
    skipped = {KAFKA: broker.missing()} if place.broker is None else {}
    for what, why in skipped.items():
        report.say(f"left out: {what}: {why}")
    return {"people": PEOPLE, "erased": len(world.gone), "skipped": skipped, **world.figures, "controls_caught": world.caught}


def main() -> int:
    torch.set_num_threads(1)
    report = Report("erase", seed=0)
    with tempfile.TemporaryDirectory() as name:
        node = None if broker.missing() else broker.Broker(Path(name) / "kafka")
        place = Place(Path(name), node)
        try:
            figures = run(report, place)
        finally:
            place.close()
    return report.finish(figures)


if __name__ == "__main__":
    raise SystemExit(main())
