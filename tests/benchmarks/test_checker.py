"""The history checker: each anomaly in a history made by hand, and ambiguous ones that it has to let pass."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.checker import Final, check
from benchmarks.operations import History, Kind, Op, Outcome, read

RATER = "anna"


def op(kind: Kind, at: float, end: float | None, result: Mapping[str, Any] | None = None, **value: Any) -> Op:
    """Invoked at `at`, ok at `end`; without an end, info."""
    outcome: Outcome = "info" if end is None else "ok"
    return Op(RATER, kind, value, at, outcome, result or {}, math.inf if end is None else end)


def chat(at: float, *interactions: str, comparison: str | None = None, whole: bool = True) -> Op:
    texts = {each: f"text of {each}" if whole else None for each in interactions}
    return op("chat", at, at + 1 if whole else None, {"interactions": texts, "comparison": comparison}, subject=RATER)


def said(key: str, at: float, end: float | None, value: str | None, target: str = "i", slot: str = "rating") -> Op:
    kind: Kind = "clear" if value is None else "choose" if slot == "choice" else "rate"
    return op(kind, at, end, {"event_id": f"event {key}"} if end else {}, key=key, target=target, rater=RATER, slot=slot, value=value)


def snapshot(at: float, *rows: Mapping[str, Any]) -> Op:
    return op("snapshot", at, at + 1, {"rows": rows})


def row(key: str, *answers: str | None) -> dict[str, Any]:
    return {"event_id": f"event {key}", "rater": RATER, "subject": RATER, "answers": list(answers or ["text of i"])}


def answered(*interactions: str) -> list[dict[str, Any]]:
    """What the archive holds of them."""
    begun = [{"event_id": f"began {each}", "type": "interaction.started", "about": each} for each in interactions]
    ended = [
        {"event_id": f"ended {each}", "type": "interaction.finished", "about": each, "answer": f"text of {each}"} for each in interactions
    ]
    return [*begun, *ended]


def heard(*keys: str, target: str = "i") -> list[dict[str, Any]]:
    return [{"event_id": f"event {key}", "type": "feedback.given", "about": target, "key": key} for key in keys]


def kinds(
    history: Sequence[Op], events: Sequence[Mapping[str, Any]], value: str | None = None, slot: str = "rating", **more: Any
) -> list[str]:
    """The kinds of anomalies found, where the record holds `value` in the one cell of these tests."""
    target = "c" if slot == "choice" else "i"
    held = {(target, RATER, slot): value} if value else {}
    return list(dict.fromkeys(anomaly.kind for anomaly in check(history, Final(events, held, **more))))


UP = [chat(0, "i"), said("1", 2, 3, "up"), snapshot(10, row("1"))]
PAIR = [chat(0, "i", "j", comparison="c"), said("1", 2, 3, "a", "c", "choice")]


def test_a_sound_history_has_no_anomaly() -> None:
    assert kinds(UP, [*answered("i"), *heard("1")], "up") == []
    pair = [*PAIR, snapshot(10, row("1", "text of i", "text of j"))]
    assert kinds(pair, [*answered("i", "j"), *heard("1", target="c")], "a", "choice") == []


def test_lost_writes() -> None:
    assert kinds(UP, answered("i"), "up") == ["lost write"]  # the event
    assert kinds(UP, [*answered("i"), *heard("1")]) == ["lost write"]  # the fold
    assert kinds([*UP[:2], snapshot(10)], [*answered("i"), *heard("1")], "up") == ["lost write"]  # the last snapshot
    assert kinds(UP[:1], answered("i")[:1]) == ["lost write"]  # the end of the answer
    assert kinds(UP[:1], []) == ["lost write"]  # its beginning
    changed = [*UP[:2], said("2", 4, 5, "down")]
    assert kinds(changed, [*answered("i"), *heard("1", "2")], "up") == ["lost write"]  # the last word


def test_a_rating_that_joins_no_interaction_or_another_answer() -> None:
    assert kinds([said("1", 2, 3, "up")], heard("1"), "up") == ["no interaction"]
    mixed = [*UP[:2], snapshot(10, row("1", "text of somebody else's"))]
    assert kinds(mixed, [*answered("i"), *heard("1")], "up") == ["no interaction"]


def test_duplicates() -> None:
    assert kinds(UP, [*answered("i"), *heard("1", "1")], "up") == ["duplicate"]
    twice = [*heard("1"), {**heard("1")[0], "event_id": "another"}]
    assert kinds(UP, [*answered("i"), *twice], "up") == ["duplicate"]
    assert kinds([*UP[:2], snapshot(10, row("1"), row("1"))], [*answered("i"), *heard("1")], "up") == ["duplicate"]


def test_aborted_reads() -> None:
    refused = replace(said("1", 2, 3, "up"), outcome="fail", result={})
    assert kinds([chat(0, "i"), refused], [*answered("i"), *heard("1")]) == ["aborted read"]
    erased = [*UP[:2], op("erase", 4, 5, subject=RATER)]
    assert kinds(erased, heard("1"), "up") == ["aborted read"]
    assert kinds(erased, answered("i")) == ["aborted read"]
    assert kinds([*erased, snapshot(6, row("1"))], []) == ["aborted read"]
    withdrawn = [*UP[:2], op("withdraw", 4, 5, subject=RATER), snapshot(6, row("1"))]
    assert kinds(withdrawn, [*answered("i"), *heard("1")], "up") == ["aborted read"]


def test_half_a_comparison() -> None:
    half = [event for event in answered("i", "j") if event["event_id"] != "began j"]
    assert "half a comparison" in kinds(PAIR, [*half, *heard("1", target="c")], "a", "choice")
    one_sided = [*PAIR, snapshot(10, row("1", "text of i", None))]
    assert kinds(one_sided, [*answered("i", "j"), *heard("1", target="c")], "a", "choice") == ["half a comparison"]


def test_a_stale_snapshot() -> None:
    stale = [*UP[:2], snapshot(4, row("1")), snapshot(6), snapshot(10, row("1"))]
    assert kinds(stale, [*answered("i"), *heard("1")], "up") == ["stale snapshot"]


def test_split_brain() -> None:
    cell = ("i", RATER, "rating")
    events = [*answered("i"), *heard("1")]
    assert kinds(UP, events, "up", asked=frozenset([cell]), gateways={"north": {cell: "up"}, "south": {cell: "up"}}) == []
    assert kinds(UP, events, "up", asked=frozenset([cell]), gateways={"north": {cell: "up"}, "south": {}}) == ["split brain"]
    routes = [op("route", at, at + 1, {"stable": stable}, gateway=name) for at, name, stable in ((20, "north", "x"), (22, "south", "y"))]
    assert kinds([*UP, *routes], events, "up") == ["split brain"]
    caught_up = op("route", 24, 25, {"stable": "x"}, gateway="south")
    assert kinds([*UP, *routes, caught_up], events, "up") == []


@pytest.mark.parametrize("value", ["up", "down"])
def test_what_may_have_happened_may_be_there_or_not(value: str) -> None:
    """`down` was sent and its reply never came."""
    events = [*answered("i"), *heard("1", *(["2"] if value == "down" else []))]
    last = snapshot(10, row("2" if value == "down" else "1"))
    assert kinds([*UP[:2], said("2", 4, None, "down"), last], events, value) == []


@pytest.mark.parametrize("value", ["up", "down"])
def test_what_overlaps_may_have_happened_in_either_order(value: str) -> None:
    assert kinds([chat(0, "i"), said("1", 2, 6, "up"), said("2", 3, 5, "down")], [*answered("i"), *heard("1", "2")], value) == []


def test_an_answer_that_broke_off_needs_a_beginning_and_no_end() -> None:
    broken = [chat(0, "i", whole=False), said("1", 2, 3, "up"), snapshot(10)]
    assert kinds(broken, [*answered("i")[:1], *heard("1")], "up") == []


def test_an_erasure_explains_what_is_missing_also_where_its_reply_never_came() -> None:
    for end in (5, None):
        assert kinds([*UP[:2], snapshot(3.5, row("1")), op("erase", 4, end, subject=RATER), snapshot(8)], []) == []


def test_a_snapshot_may_miss_what_was_cleared_changed_or_withdrawn_since() -> None:
    events = [*answered("i"), *heard("1", "2")]
    cleared = [*UP[:2], snapshot(4, row("1")), said("2", 6, 7, None), snapshot(8)]
    assert kinds(cleared, events) == []
    changed = [*UP[:2], snapshot(4, row("1")), said("2", 6, 7, "down"), snapshot(8, row("2"))]
    assert kinds(changed, events, "down") == []
    withdrawn = [*UP[:2], snapshot(4, row("1")), op("withdraw", 6, 7, subject=RATER), snapshot(8)]
    assert kinds(withdrawn, [*answered("i"), *heard("1")], "up") == []


def test_a_history_survives_being_written_and_a_process_that_dies_is_info(tmp_path: Path) -> None:
    history = History(tmp_path / "history.jsonl")
    first = history.invoke("anna", "rate", key="1", target="i", rater="anna", slot="rating", value="up")
    history.invoke("ben", "erase", subject="ben")
    history.end(first, "fail", status=403)
    history.close()
    refused, unknown = read(tmp_path / "history.jsonl")
    assert (refused.outcome, refused.result, refused.cell) == ("fail", {"status": 403}, ("i", "anna", "rating"))
    assert refused.invoked < unknown.invoked < refused.ended < math.inf
    assert (unknown.outcome, unknown.ended) == ("info", math.inf)
