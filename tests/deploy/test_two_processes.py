"""The registry under several processes at once, on either database: one of them wins, a leader that was replaced writes nothing, no clock
but the database's counts, and one that is killed between two statements leaves nothing half."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from postgres_world import Postgres
from pydantic import JsonValue
from sqlalchemy import Engine, MetaData, event, select

from deploy import ledger
from deploy import registry as registry_module
from deploy.registry import Registry
from feedback import audit
from feedback.clock import wall_ms
from feedback.database import open_database
from feedback.errors import Conflict, PlauditError

MakeAdapter = Callable[[Path, Path, int], tuple[str, Path]]
Change = Callable[[Registry], object]
WON: list[dict[str, JsonValue]] = [{"name": "wins", "verdict": "pass", "reason": "people prefer it"}]


@pytest.fixture
def one(registry: Registry) -> Registry:
    """The registry as one process has it."""
    return registry


@pytest.fixture
def two(one: Registry, database_url: str) -> Iterator[Registry]:
    """The same database through an engine of its own, as from another machine."""
    engine = open_database(database_url)
    yield Registry(engine)
    engine.dispose()


def everything(engine: Engine) -> dict[str, list[tuple[Any, ...]]]:
    """Every row of every table, but for the count that each write begins with."""
    metadata = MetaData()
    metadata.reflect(engine)
    with engine.connect() as db:
        rows = {name: sorted(map(repr, db.execute(select(table)))) for name, table in metadata.tables.items()}
    return {name: [(row,) for row in found if "'epoch'" not in row] for name, found in rows.items()}


def at_once(*changes: Callable[[], object]) -> list[PlauditError]:
    """Run them together; what they raised."""
    together = threading.Barrier(len(changes))
    raised: list[PlauditError] = []

    def run(change: Callable[[], object]) -> None:
        together.wait()
        try:
            change()
        except PlauditError as exc:
            raised.append(exc)

    threads = [threading.Thread(target=run, args=(change,)) for change in changes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


def awaiting(registry: Registry, adapter: str) -> str:
    epoch = registry.lease("controller", "one", 60)
    assert epoch is not None
    rollout = registry.begin_rollout(adapter, "controller", epoch).id
    registry.start_canary(rollout, 0.25, [], "controller", epoch)
    registry.await_approval(rollout, WON, "won", "controller", epoch)
    return rollout


# --- compare-and-swap -----------------------------------------------------------------------------------------------


def test_of_two_promotions_one_wins(one: Registry, two: Registry, adapters: list[tuple[str, Path]]) -> None:
    rollout = awaiting(one, adapters[1][0])
    raised = at_once(lambda: one.promote(rollout, "mara"), lambda: two.promote(rollout, "noor"))
    assert [type(each) for each in raised] == [Conflict]
    assert (one.alias("stable"), one.alias("previous"), one.alias("canary")) == (adapters[1][0], adapters[0][0], None)
    assert [row["name"] for row in one.aliases(100)["history"]] == ["stable", "canary", "stable", "previous", "canary"]


def test_of_a_promotion_and_a_stop_one_wins(one: Registry, two: Registry, adapters: list[tuple[str, Path]]) -> None:
    rollout = awaiting(one, adapters[1][0])
    raised = at_once(lambda: one.promote(rollout, "mara"), lambda: two.end_rollout(rollout, "enough", "noor"))
    assert [type(each) for each in raised] == [Conflict]
    assert (one.rollout(rollout).state, one.alias("stable")) in [("promoted", adapters[1][0]), ("stopped", adapters[0][0])]
    assert one.routing().weight == 0.0 and one.alias("canary") is None


def test_two_people_who_roll_back_the_same_adapter_do_not_bring_it_back(
    one: Registry, two: Registry, adapters: list[tuple[str, Path]]
) -> None:
    one.promote(awaiting(one, adapters[1][0]), "mara")
    bad = adapters[1][0]
    raised = at_once(lambda: one.rollback("mara", "bad", bad), lambda: two.rollback("noor", "bad", bad))
    assert [each.message for each in raised] == [f"rollback: stable is {adapters[0][0]}, expected was {bad}: somebody else was first"]
    assert one.alias("stable") == adapters[0][0]


def test_of_two_rollouts_one_begins(one: Registry, two: Registry, adapters: list[tuple[str, Path]]) -> None:
    raised = at_once(lambda: one.begin_rollout(adapters[1][0], "a"), lambda: two.begin_rollout(adapters[2][0], "b"))
    assert [type(each) for each in raised] == [Conflict] and len(one.rollouts()) == 1


def test_an_adapter_registered_twice_at_once_is_one(database: Engine, database_url: str, adapters: list[tuple[str, Path]]) -> None:
    adapter, path = adapters[1]
    first, engine = Registry(database), open_database(database_url)
    second = Registry(engine)
    assert at_once(lambda: first.register(adapter, path, "a"), lambda: second.register(adapter, path, "b")) == []
    assert [each.id for each in second.adapters()] == [adapter]
    assert audit.verify(engine)[0].rows == len(second.unsent()) == 1
    engine.dispose()


def test_a_routing_table_is_of_one_moment(one: Registry, two: Registry, database: Engine, adapters: list[tuple[str, Path]]) -> None:
    rollout = awaiting(one, adapters[1][0])
    before = one.routing()
    moved: list[bool] = []

    @event.listens_for(database, "after_cursor_execute")
    def promote(conn: object, cursor: object, statement: str, *_: object) -> None:
        if "registry_facts" in statement and not moved:  # the version is read, the aliases are not
            moved.append(True)
            two.promote(rollout, "mara")

    assert one.routing() == before and moved
    assert one.routing().stable.adapter == adapters[1][0]


# --- the lease ------------------------------------------------------------------------------------------------------


def test_of_two_controllers_one_leads(one: Registry, two: Registry) -> None:
    epochs: list[int | None] = []
    at_once(lambda: epochs.append(one.lease("controller", "one", 60)), lambda: epochs.append(two.lease("controller", "two", 60)))
    assert sorted(map(str, epochs)) == ["1", "None"]


def test_a_leader_that_was_replaced_writes_nothing(
    one: Registry, two: Registry, database: Engine, adapters: list[tuple[str, Path]]
) -> None:
    old = one.lease("controller", "one", 0.0)
    assert old is not None
    rollout = one.begin_rollout(adapters[1][0], "controller", old).id
    assert two.lease("controller", "two", 60) == old + 1
    before, unsent = everything(database), one.unsent()
    late: list[Callable[[], object]] = [
        lambda: one.start_canary(rollout, 0.25, [], "controller", old),
        lambda: one.await_approval(rollout, WON, "won", "controller", old),
        lambda: one.note(rollout, "looked", [], old),
        lambda: one.end_rollout(rollout, "failed", "controller", [], old),
        lambda: one.begin_rollout(adapters[2][0], "controller", old),
        lambda: one.mark_sent(unsent, old),
    ]
    for write in late:
        with pytest.raises(Conflict, match=f"another controller has taken over: epoch {old} is over"):
            write()
    assert everything(database) == before
    one.end_rollout(rollout, "a person stops it", "mara")  # people need no lease


@pytest.mark.parametrize("by_own_clock", [False, True], ids=["database's clock", "negative control: own clock"])
@pytest.mark.parametrize("day", [-1, 1])
def test_a_wrong_clock_neither_takes_the_lease_nor_keeps_it(
    one: Registry, two: Registry, day: int, by_own_clock: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if by_own_clock:
        for module in (ledger, registry_module):
            monkeypatch.setattr(module, "now_ms", lambda db: wall_ms())
    with monkeypatch.context() as skewed:
        real = time.time_ns
        skewed.setattr(time, "time_ns", lambda: real() + day * 24 * 3600 * 10**9)
        assert one.lease("controller", "one", 60) == 1  # by a clock a day ahead it would be kept for a day, by one behind for no time
        one.report_held("one", {"a"})
    first = two.lease("controller", "two", 60)
    held = two.held_everywhere()
    ran_out = {row[0] for row in everything(two._engine)["leases"] if str(wall_ms())[:5] in row[0]}
    right = (first is None, held, len(ran_out)) == (True, {"a"}, 1)
    assert right is not by_own_clock


# --- one transaction, whatever kills it -----------------------------------------------------------------------------


def reach(registry: Registry, stage: str, base: str, adapter: str) -> None:
    """From nothing to where an adapter is at this stage."""
    stages = ["nothing", "stable", "gates", "canary", "awaiting", "promoted"]
    epoch = registry.lease("controller", "one", 60) or 0
    steps: list[Callable[[], object]] = [
        lambda: registry.start_with(base, "system"),
        lambda: registry.begin_rollout(adapter, "controller", epoch),
        lambda: registry.start_canary(running(registry), 0.25, [], "controller", epoch),
        lambda: registry.await_approval(running(registry), WON, "won", "controller", epoch),
        lambda: registry.promote(running(registry), "mara"),
    ]
    for step in steps[: stages.index(stage)]:
        step()


def running(registry: Registry) -> str:
    found = registry.active_rollout()
    assert found is not None
    return found.id


def changes(adapters: list[tuple[str, Path]]) -> dict[str, tuple[str, Change]]:
    """Every change by name: the stage before it, and the change."""
    (base, _), (first, _), (second, path) = adapters
    return {
        "start": ("nothing", lambda registry: registry.start_with(base, "system")),
        "register": ("nothing", lambda registry: registry.register(second, path, "trainer")),
        "attest": ("nothing", lambda registry: registry.attest(first, "note", {"a": 1}, "trainer")),
        "stand by": ("stable", lambda registry: registry.stand_by(first, "mara", "to be loaded")),
        "begin": ("stable", lambda registry: registry.begin_rollout(first, "controller", 1)),
        "canary": ("gates", lambda registry: registry.start_canary(running(registry), 0.25, [], "controller", 1)),
        "await": ("canary", lambda registry: registry.await_approval(running(registry), WON, "won", "controller", 1)),
        "stop": ("canary", lambda registry: registry.end_rollout(running(registry), "no", "controller", [], 1)),
        "promote": ("awaiting", lambda registry: registry.promote(running(registry), "mara")),
        "rollback": ("promoted", lambda registry: registry.rollback("mara", "bad")),
        "retire": (
            "promoted",
            lambda registry: registry.withhold(first, {"reason": "erased"}, "system", retire=True, fallback=base),
        ),
    }


def killed(url: str, change: Change, kill_at: int | None = None) -> int:
    """Run it in a process of its own that dies just before its `kill_at`-th statement, commits among them; without, before the first
    commit. How many statements it had made."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            engine = open_database(url)
            registry, made = Registry(engine), 0

            def die(commit: bool) -> None:
                nonlocal made
                if made + 1 == kill_at or (kill_at is None and commit):
                    os.write(writing, str(made).encode())
                    os._exit(9)
                made += 1

            event.listen(engine, "before_cursor_execute", lambda *_: die(commit=False))
            event.listen(engine, "commit", lambda _: die(commit=True))
            change(registry)
        finally:
            os._exit(1)
    os.close(writing)
    with os.fdopen(reading) as said:
        told = said.read()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    return int(told)


NAMES = ["start", "register", "attest", "stand by", "begin", "canary", "await", "stop", "promote", "rollback", "retire"]


@pytest.mark.parametrize("name", NAMES)
def test_a_change_is_one_transaction_with_its_audit_row_and_its_event(
    name: str, database: Engine, database_url: str, adapters: list[tuple[str, Path]]
) -> None:
    registry = Registry(database)
    for adapter, path in adapters[: 2 if name == "register" else 3]:
        registry.register(adapter, path, "trainer")
    stage, change = changes(adapters)[name]
    reach(registry, stage, adapters[0][0], adapters[1][0])
    registry.mark_sent(registry.unsent())
    before, version = everything(database), registry_version(registry)
    database.dispose()  # SQLite's connections do not outlive a fork
    total = killed(database_url, change)
    assert everything(database) == before, f"killed before its commit, after {total} statements"
    for kill_at in range(1, total + 1, 3) if name == "promote" else [total // 2]:
        database.dispose()
        assert killed(database_url, change, kill_at) == kill_at - 1
        assert everything(database) == before, f"killed before statement {kill_at} of {total}"
    commits: list[bool] = []
    event.listen(database, "commit", lambda _: commits.append(True))
    change(registry)
    assert commits == [True], "one transaction"
    after = everything(database)
    assert len(after["audit"]) == len(before["audit"]) + 1 and audit.verify(database)[1] is None
    assert registry_version(registry) == version + 1
    assert registry.unsent() != [], "the event waits in the outbox"
    moved = set(map(str, after["aliases"])) ^ set(map(str, before["aliases"]))
    assert bool(moved) == (len(after["alias_history"]) > len(before["alias_history"]))


def test_half_a_change_would_be_seen(database: Engine, database_url: str, adapters: list[tuple[str, Path]]) -> None:
    """Negative control: two transactions where one was promised."""
    registry = Registry(database)
    registry.register(*adapters[0], "trainer")

    def broken(registry: Registry) -> None:
        registry.attest(adapters[0][0], "note", {}, "trainer")
        registry.start_with(adapters[0][0], "system")

    before = everything(database)
    database.dispose()
    first = killed(database_url, broken)
    assert everything(database) == before
    database.dispose()
    killed(database_url, broken, first + 3)
    assert everything(database) != before


def registry_version(registry: Registry) -> int:
    with registry._read() as db:
        return int(db.exec_driver_sql("SELECT value FROM registry_facts WHERE name = 'version'").scalar_one())


def test_a_leader_stopped_in_the_middle_of_a_write_delays_a_rollback_by_a_second(
    postgres: Postgres, adapters: list[tuple[str, Path]]
) -> None:
    url = postgres.new()
    engine = open_database(url)
    registry = Registry(engine)
    for adapter, path in adapters[:2]:
        registry.register(adapter, path, "trainer")
    registry.start_with(adapters[0][0], "system")
    registry.promote(awaiting(registry, adapters[1][0]), "mara")
    child = os.fork()
    if child == 0:
        try:
            own = open_database(url)
            stopped = Registry(own)
            event.listen(own, "commit", lambda _: os.kill(os.getpid(), signal.SIGSTOP))
            stopped.note("", "", [])
        finally:
            os._exit(1)
    try:
        assert os.WIFSTOPPED(os.waitpid(child, os.WUNTRACED)[1])
        began = time.monotonic()
        assert registry.rollback("mara", "bad") == adapters[0][0]
        assert time.monotonic() - began < 4, "without the timeout it would wait for as long as the other is stopped"
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        engine.dispose()
