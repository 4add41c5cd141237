"""One checker for every fault test: a history and what was left at the end, searched for anomalies, in Jepsen's manner.

| anomaly | means |
|---|---|
| lost write | acknowledged, and not there; or the last word in a cell is one that cannot have been the last |
| duplicate | one thing said counts twice |
| aborted read | refused, erased or withdrawn, and yet in what came later |
| half a comparison | a choice without both of its answers |
| stale snapshot | a snapshot lacks what the one before had, and nobody left or spoke since |
| split brain | two gateways differ once all is quiet |
| no interaction | what was said joins no answer, or another one than was read |

`info` operations may have taken effect or not: whatever they could explain is no anomaly.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.operations import SAYING, Cell, Op


@dataclass(frozen=True)
class Final:
    """What was left once everything was up again and drained."""

    events: Sequence[Mapping[str, Any]]
    """The archive's: event_id, type, about, subject, key (Idempotency-Key, where known), comparison, answer."""
    held: Mapping[Cell, str]
    """The archive's fold."""
    gateways: Mapping[str, Mapping[Cell, str]] = field(default_factory=dict)
    """What each gateway says is held, of the cells that it was asked about."""
    asked: frozenset[Cell] = frozenset()


@dataclass(frozen=True)
class Anomaly:
    kind: str
    what: str


def check(history: Sequence[Op], final: Final) -> list[Anomaly]:
    """Every anomaly. None means that all outcomes can be explained by operations that took effect once, in an order that fits."""
    seen = _Evidence(history, final)
    rules = (_lost, _doubled, _aborted, _halves, _stale, _split)
    return [Anomaly(kind, what) for rule in rules for kind, what in rule(seen)]


Found = Iterator[tuple[str, str]]


class _Evidence:
    """The history, sorted into what the rules ask for."""

    def __init__(self, history: Sequence[Op], final: Final) -> None:
        self.final = final
        self.chats = [op for op in history if op.kind == "chat"]
        self.said = [op for op in history if op.kind in SAYING]
        self.leaving = [op for op in history if op.kind in ("erase", "withdraw") and op.outcome != "fail"]
        self.snapshots = [op for op in history if op.kind == "snapshot" and op.outcome == "ok"]
        self.stable = {op.value["gateway"]: op.result["stable"] for op in history if op.kind == "route" and op.outcome == "ok"}
        self.by_id = {event["event_id"]: event for event in final.events}
        self.about: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
        for event in final.events:
            self.about[event["about"]].append(event)
        self.op_of = {op.result["event_id"]: op for op in self.said if op.outcome == "ok"}
        self.cells: dict[Cell, list[Op]] = defaultdict(list)
        for op in self.said:
            if op.outcome != "fail":
                self.cells[op.cell].append(op)
        by_key = {op.value["key"]: op for op in self.said}
        self.op_of |= {event["event_id"]: by_key[event["key"]] for event in final.events if event.get("key") in by_key}
        self.asker = {each: op.value["subject"] for op in self.chats for each in _targets(op)}

    def left(self, *subjects: str | None, erased: bool = False) -> list[Op]:
        """Erasures, and unless `erased` withdrawals too, of any of these subjects."""
        return [op for op in self.leaving if op.value["subject"] in subjects and (op.kind == "erase" or not erased)]

    def others(self, op: Op) -> list[Op]:
        """What else may have been said in the same cell."""
        return [other for other in self.cells[op.cell] if other is not op]

    def whose(self, op: Op) -> tuple[str, str | None]:
        """Rater and asker of what was said."""
        return op.value["rater"], self.asker.get(op.value["target"])


def _targets(chat: Op) -> list[str]:
    """What can be rated of a chat: its answers and their comparison."""
    comparison = chat.result.get("comparison")
    return [*chat.result.get("interactions", {}), *([comparison] if comparison else [])]


def _lost(seen: _Evidence) -> Found:
    """What was acknowledged is there, joins what it is about, and the last word is a word that can be the last."""
    for op in seen.chats:
        if seen.left(op.value["subject"], erased=True):
            continue
        for interaction, text in op.result.get("interactions", {}).items():
            events = {event["type"]: event for event in seen.about[interaction]}
            if "interaction.started" not in events:
                yield "lost write", f"{interaction} was answered and its beginning is not there"
            elif op.outcome == "ok" and events.get("interaction.finished", {}).get("answer") != text:
                yield "lost write", f"{interaction} was answered to its end and its end is not there as it was read"
    for op in seen.said:
        if op.outcome == "ok" and not seen.left(*seen.whose(op), erased=True):
            if op.result["event_id"] not in seen.by_id:
                yield "lost write", f"{op.kind} {op.value['key']} was acknowledged and is not there"
            if op.value["slot"] != "choice" and not any(event["type"] == "interaction.started" for event in seen.about[op.value["target"]]):
                yield "no interaction", f"{op.kind} {op.value['key']} joins no interaction"
    for cell, ops in seen.cells.items():
        if seen.left(*seen.whose(ops[0]), erased=True):
            continue
        possible = {op.value["value"] for op in ops if not any(op.before(other) for other in ops if other.outcome == "ok")}
        if not any(op.outcome == "ok" for op in ops):
            possible.add(None)
        if seen.final.held.get(cell) not in possible:
            yield "lost write", f"{cell} ends at {seen.final.held.get(cell)}, which is none of {sorted(map(str, possible))}"


def _doubled(seen: _Evidence) -> Found:
    for event_id, times in Counter(event["event_id"] for event in seen.final.events).items():
        if times > 1:
            yield "duplicate", f"{event_id} is in the record {times} times"
    for key, ids in _by_key(seen.final.events).items():
        if len(ids) > 1:
            yield "duplicate", f"{key} became {len(ids)} events"
    for number, snapshot in enumerate(seen.snapshots):
        for event_id, times in Counter(row["event_id"] for row in snapshot.result["rows"]).items():
            if times > 1:
                yield "duplicate", f"{event_id} is in snapshot {number} {times} times"


def _by_key(events: Iterable[Mapping[str, Any]]) -> dict[str, set[str]]:
    ids: dict[str, set[str]] = defaultdict(set)
    for event in events:
        if event.get("key"):
            ids[event["key"]].add(event["event_id"])
    return ids


def _aborted(seen: _Evidence) -> Found:
    """What was refused is nowhere; what was said before an erasure is nowhere after it; whoever left is in no later snapshot."""
    refused = {op.value["key"] for op in seen.said if op.outcome == "fail"}
    for event in seen.final.events:
        if event.get("key") in refused:
            yield "aborted read", f"{event['key']} was refused and is in the record"
        op = seen.op_of.get(event["event_id"])
        if op and any(op.before(gone) and gone.outcome == "ok" for gone in seen.left(op.value["rater"], erased=True)):
            yield "aborted read", f"{event['key']} was erased and is in the record"
    for chat in seen.chats:
        erasures = [gone for gone in seen.left(chat.value["subject"], erased=True) if gone.outcome == "ok" and chat.before(gone)]
        for interaction in chat.result.get("interactions", {}) if erasures else ():
            if seen.about[interaction]:
                yield "aborted read", f"{interaction} was erased and is in the record"
    for number, snapshot in enumerate(seen.snapshots):
        for row in snapshot.result["rows"]:
            if any(gone.outcome == "ok" and gone.before(snapshot) for gone in seen.left(row["rater"], row["subject"])):
                yield "aborted read", f"{row['event_id']} is in snapshot {number}, taken after its person had left"


def _halves(seen: _Evidence) -> Found:
    """A choice has both its answers, as the person read them."""
    texts = {each: text for op in seen.chats if op.outcome == "ok" for each, text in op.result["interactions"].items()}
    sides: dict[str, list[str]] = {
        op.result["comparison"]: list(op.result["interactions"]) for op in seen.chats if op.result.get("comparison")
    }
    for op in seen.said:
        if op.value["slot"] != "choice" or op.outcome != "ok" or seen.left(*seen.whose(op), erased=True):
            continue
        begun = [each for each in sides.get(op.value["target"], []) if any(e["type"] == "interaction.started" for e in seen.about[each])]
        if len(begun) != 2:
            yield "half a comparison", f"choice {op.value['key']} has {len(begun)} of its 2 answers"
    for number, snapshot in enumerate(seen.snapshots):
        for row in snapshot.result["rows"]:
            said = seen.op_of.get(row["event_id"])
            if said is None:
                continue
            shown = sides.get(said.value["target"], [said.value["target"]])
            read_texts = [texts[each] for each in shown if each in texts]
            if len(row["answers"]) != len(shown) or None in row["answers"]:
                yield "half a comparison", f"{row['event_id']} in snapshot {number} has {len(row['answers'])} of {len(shown)} answers"
            elif len(read_texts) == len(shown) and row["answers"] != read_texts:
                yield "no interaction", f"{row['event_id']} in snapshot {number} is joined with another answer than was read"


def _stale(seen: _Evidence) -> Found:
    """A snapshot lacks a row of the one before only where somebody has left or said something else since."""
    for number, (older, newer) in enumerate(zip(seen.snapshots, seen.snapshots[1:], strict=False)):
        kept = {row["event_id"] for row in newer.result["rows"]}
        for row in older.result["rows"]:
            said = seen.op_of.get(row["event_id"])
            if row["event_id"] in kept or said is None:
                continue
            since = [op for op in seen.others(said) if not op.before(said)]
            if not any(op.invoked < newer.ended for op in since + seen.left(row["rater"], row["subject"])):
                yield "stale snapshot", f"{row['event_id']} was in snapshot {number} and is not in snapshot {number + 1}"
    if seen.snapshots:
        yield from _missing_at_last(seen, seen.snapshots[-1])


def _missing_at_last(seen: _Evidence, last: Op) -> Found:
    """The last snapshot, taken when all was quiet, has every opinion that is held about answers that were read to their end."""
    counted = {row["event_id"] for row in last.result["rows"]}
    whole = {each for op in seen.chats if op.outcome == "ok" for each in _targets(op)}
    for op in seen.said:
        if op.outcome != "ok" or op.value["value"] is None or op.cell[0] not in whole or seen.left(*seen.whose(op)):
            continue
        after = [other for other in seen.others(op) if not other.before(op)]
        if not after and op.result["event_id"] not in counted:
            yield "lost write", f"{op.kind} {op.value['key']} is not in the last snapshot"


def _split(seen: _Evidence) -> Found:
    for name, held in seen.final.gateways.items():
        for cell in seen.final.asked:
            if held.get(cell) != seen.final.held.get(cell):
                yield "split brain", f"{name} says {cell} is {held.get(cell)}, the record says {seen.final.held.get(cell)}"
    if len(set(seen.stable.values())) > 1:
        yield "split brain", f"at last the gateways serve {seen.stable} as stable"
