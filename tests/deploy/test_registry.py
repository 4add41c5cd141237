"""The registry's promises on either database: compare-and-swap, one leader, one transaction for change, audit and event, and words for
refusals."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, event, text

from deploy.manifest import vllm_name
from deploy.registry import Registry
from deploy.tables import metadata
from feedback import audit
from feedback.database import create_tables
from feedback.errors import Conflict, InvalidInput, NotDurable, NotFound
from feedback.events import AdapterEvent

MakeAdapter = Callable[[Path, Path, int], tuple[str, Path]]


def at_canary(registry: Registry, adapter: str) -> str:
    epoch = registry.lease("controller", "one", 10)
    assert epoch is not None
    rollout = registry.begin_rollout(adapter, "controller").id
    registry.start_canary(rollout, 0.25, [], "controller", epoch)
    return rollout


def test_an_empty_registry_routes_nobody(database: Engine) -> None:
    with pytest.raises(NotFound, match="no stable adapter yet"):
        Registry(database).routing()


def test_a_first_start_that_cannot_be_written_is_one_clear_error(database: Engine) -> None:
    for tables in (metadata, audit.metadata):
        create_tables(database, tables)
    database.dispose()
    # As on a full disk: the tables are there, and nothing more is taken.
    readonly = "PRAGMA query_only=ON" if database.dialect.name == "sqlite" else "SET default_transaction_read_only = on"

    @event.listens_for(database, "connect")
    def refuse(connection: Any, _: object) -> None:
        connection.execute(readonly)
        connection.commit()

    with pytest.raises(NotDurable, match="registry's database"):
        Registry(database)


def test_adapters_by_their_first_digits(registry: Registry, adapters: list[tuple[str, Path]]) -> None:
    adapter, path = adapters[1]
    assert registry.adapter(adapter[:10]).id == registry.adapter(vllm_name(adapter)).id == adapter
    assert registry.register(adapter, path, "somebody else").registered_by == "trainer", "what is registered stays as it is"
    for wrong in ("ffff" * 16, "%", ""):
        with pytest.raises((NotFound, InvalidInput), match="adapter: "):
            registry.adapter(wrong)


def test_a_folder_that_holds_another_adapter_is_refused(registry: Registry, adapters: list[tuple[str, Path]]) -> None:
    with pytest.raises(InvalidInput, match=f"holds adapter {adapters[1][0][:16]}, not ffff"):
        registry.register("f" * 64, adapters[1][1], "trainer")
    assert len(registry.adapters()) == 3


def test_two_first_stables_are_one_too_many(registry: Registry, adapters: list[tuple[str, Path]]) -> None:
    with pytest.raises(Conflict, match=r"alias stable points at .*: somebody else was first"):
        registry.start_with(adapters[1][0], "system")
    assert registry.alias("stable") == adapters[0][0]
    assert registry.adapter(adapters[1][0]).state == "candidate", "nothing of a refused change stays"


def test_one_rollout_at_a_time(registry: Registry, adapters: list[tuple[str, Path]]) -> None:
    rollout = registry.begin_rollout(adapters[1][0], "controller")
    with pytest.raises(Conflict, match=f"rollout {rollout.id} is running; it must end before another begins"):
        registry.begin_rollout(adapters[2][0], "controller")


def test_no_step_is_skipped_and_none_is_taken_twice(registry: Registry, adapters: list[tuple[str, Path]]) -> None:
    rollout = at_canary(registry, adapters[1][0])
    with pytest.raises(Conflict, match="is canary; only one that is awaiting can become promoted"):
        registry.promote(rollout, "mara")
    with pytest.raises(Conflict, match="is canary; only one that is gates can become canary"):
        registry.start_canary(rollout, 0.5, [], "controller", 1)
    registry.end_rollout(rollout, "enough", "mara")
    with pytest.raises(Conflict, match="has ended already"):
        registry.end_rollout(rollout, "again", "mara")
    assert registry.routing().weight == 0.0


def test_a_leader_that_was_replaced_is_refused(registry: Registry, adapters: list[tuple[str, Path]]) -> None:
    old = registry.lease("controller", "one", 0.0)
    assert old is not None
    rollout = registry.begin_rollout(adapters[1][0], "controller").id
    new = registry.lease("controller", "two", 10)
    assert new == old + 1
    with pytest.raises(Conflict, match="another controller has taken over"):
        registry.start_canary(rollout, 0.25, [], "controller", old)
    assert registry.routing().canary is None
    registry.start_canary(rollout, 0.25, [], "controller", new)
    assert registry.routing().weight == 0.25


def test_a_lease_is_renewed_by_its_holder_alone(registry: Registry) -> None:
    assert registry.lease("controller", "one", 10) == 1
    assert registry.lease("controller", "one", 10) == 1
    assert registry.lease("controller", "two", 10) is None


def test_what_replicas_must_hold(registry: Registry, adapters: list[tuple[str, Path]]) -> None:
    stable, candidate = adapters[0], adapters[1]
    assert registry.wanted() == {vllm_name(stable[0]): stable[1].resolve()}
    rollout = registry.begin_rollout(candidate[0], "controller").id
    wanted = {
        vllm_name(stable[0]): stable[1].resolve(),
        vllm_name(candidate[0]): candidate[1].resolve(),
        vllm_name(stable[0], rollout): stable[1].resolve(),
    }
    assert registry.wanted() == wanted
    registry.end_rollout(rollout, "enough", "mara")
    assert registry.wanted() == {vllm_name(stable[0]): stable[1].resolve()}


def test_held_is_what_every_living_replica_holds(registry: Registry, database: Engine) -> None:
    assert registry.held_everywhere() == set()
    registry.report_held("one", {"a", "b"})
    registry.report_held("two", {"b", "c"})
    assert registry.held_everywhere() == {"b"}
    with database.begin() as db:  # replica one has been silent for longer than counts as living
        db.execute(text("UPDATE holdings SET at_ms = at_ms - 60000 WHERE replica = 'one'"))
    assert registry.held_everywhere() == {"b", "c"}


def test_eight_writers_leave_one_chain_of_audit_rows(registry: Registry, adapters: list[tuple[str, Path]], database: Engine) -> None:
    before, version = audit.verify(database)[0].rows, registry.routing().version

    def write(who: int) -> None:
        mine = Registry(database)
        for turn in range(5):
            mine.attest(adapters[1][0], "note", {"turn": turn}, f"writer {who}")

    threads = [threading.Thread(target=write, args=(who,)) for who in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    chain, fault = audit.verify(database)
    assert fault is None
    assert chain.rows - before == len(registry.attestations(adapters[1][0], "note")) == 40
    assert registry.routing().version - version == 40


def test_events_wait_until_they_are_sent(registry: Registry, adapters: list[tuple[str, Path]]) -> None:
    kinds = [event.type for event in registry.unsent()]
    assert kinds.count("adapter.registered") == 3 and kinds.count("adapter.aliased") == 1
    registry.mark_sent(registry.unsent())
    assert registry.unsent() == []
    rollout = at_canary(registry, adapters[1][0])
    kinds = sorted(event.type for event in registry.unsent())
    assert kinds == ["adapter.aliased", "rollout.started", "rollout.stepped"]
    registry.mark_sent(registry.unsent())
    registry.end_rollout(rollout, "enough", "mara")
    left, ended = sorted(registry.unsent(), key=lambda event: event.type)
    assert (left.type, ended.type) == ("adapter.unaliased", "rollout.ended")
    assert isinstance(left, AdapterEvent) and (left.alias, left.adapter, left.actor) == ("canary", adapters[1][0], "mara")
    assert left.detail == {"before": adapters[1][0], "reason": "enough"}
    assert registry.aliases(100)["history"][-1]["event_id"] == left.event_id


def test_everything_is_there_after_a_restart(registry: Registry, adapters: list[tuple[str, Path]], database: Engine) -> None:
    rollout = at_canary(registry, adapters[1][0])
    before = registry.routing()
    database.dispose()
    again = Registry(database)
    assert again.routing() == before
    assert again.rollout(rollout).state == "canary"
    assert [row["name"] for row in again.aliases(100)["history"]] == ["stable", "canary"]
