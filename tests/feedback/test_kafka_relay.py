"""From SQLite's partitions to Kafka: outages, two relays, dead letters, a topic that was deleted or that would lose events."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from feedback_world import rating
from kafka_world import MARKS, Hand, a_topic, archived, broker_away, in_topic, stores_with
from waiting import until

from deploy.broker import Broker
from deploy.process import free_port
from feedback import outbox
from feedback.clock import HybridClock
from feedback.config import KafkaSettings
from feedback.errors import ConfigError, NotDurable
from feedback.kafka_log import KafkaLog
from feedback.outbox import Outbox
from feedback.relay import Relay
from feedback.sqlite_log import SqliteLog
from feedback.stores import Stores

pytestmark = [*MARKS, pytest.mark.slow]


def say(stores: Stores, first: int, number: int) -> str:
    said = [rating(f"i{n}", "r", "up", event_id=f"e{n:04}") for n in range(first, first + number)]
    return asyncio.run(stores.record_feedback(said))[1]


def ids(number: int) -> list[str]:
    return [f"e{n:04}" for n in range(number)]


def test_everything_arrives_over_an_outage_of_the_broker(kafka: Broker, tmp_path: Path) -> None:
    settings = a_topic(kafka)
    stores = stores_with(settings, tmp_path)
    assert stores.relay is not None
    assert say(stores, 0, 200) == "broker"
    with broker_away(kafka):
        stores.close()
        stores = stores_with(settings, tmp_path, timeout_s=1)  # a gateway that starts while the broker is away
        relay = stores.relay
        assert relay is not None
        until(lambda: relay.problem is not None)
        with pytest.raises(NotDurable, match=r"stored here, not yet by the broker: Kafka at .* does not answer") as caught:
            say(stores, 200, 100)
        assert caught.value.retry_after_s == 5 and relay.pending() == 100
    until(lambda: relay.pending() == 0)
    assert relay.dead == 0
    stores.close()
    assert archived(settings, tmp_path) == ids(300)


def test_an_outage_is_told_once_and_leaves_nothing_behind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """kafka-python leaves a thread and four descriptors behind for each client that could not connect."""
    monkeypatch.setattr("feedback.kafka_topic.CONNECT_S", 0.3)
    monkeypatch.setattr("feedback.relay.AWAY_S", 0.1)
    log = SqliteLog(tmp_path / "log" / "gateway.sqlite", HybridClock())
    log.append_sync([rating("i", "r", "up")])
    relay = Relay(tmp_path / "log", KafkaSettings(bootstrap=f"127.0.0.1:{free_port()}"))
    before_each: list[tuple[int, int]] = []
    send = relay._kafka.send

    def counted(rows: Any) -> Any:
        gc.collect()
        before_each.append((threading.active_count(), len(os.listdir("/proc/self/fd"))))
        return send(rows)

    relay._kafka.send = counted  # type: ignore[method-assign]
    until(lambda: len(before_each) >= 4, 20)
    assert before_each[1] == before_each[-1]
    relay.close()
    log.close()
    assert capsys.readouterr().out.count("relay.waits") == 1


def test_a_relay_drains_partitions_of_the_dead_and_those_that_come_later(kafka: Broker, tmp_path: Path) -> None:
    settings = a_topic(kafka)
    dead = SqliteLog(tmp_path / "dead.sqlite", HybridClock())
    dead.append_sync([rating("i0", "r", "up", event_id="e0000")])
    dead.close()
    relay = Relay(tmp_path, settings)
    until(lambda: relay.sent == 1)
    later = SqliteLog(tmp_path / "later.sqlite", HybridClock())
    later.append_sync([rating("i1", "r", "up", event_id="e0001")])
    until(lambda: relay.sent == 2)
    relay.close()
    later.close()
    assert in_topic(settings) == ids(2)


def test_of_two_relays_one_carries_a_partition_and_the_other_takes_over(kafka: Broker, tmp_path: Path) -> None:
    settings = a_topic(kafka)
    log = SqliteLog(tmp_path / "gateway.sqlite", HybridClock())
    first, second = Relay(tmp_path, settings), Relay(tmp_path, settings)
    assert (first.holds(), second.holds()) == ({"gateway"}, set())
    log.append_sync([rating(f"i{n}", "r", "up", event_id=f"e{n:04}") for n in range(50)])
    until(lambda: first.pending() == 0)
    assert (first.sent, second.sent) == (50, 0)
    first.close()  # as when it dies: the kernel frees the lock
    log.append_sync([rating("i50", "r", "up", event_id="e0050")])
    until(lambda: second.pending() == 0)
    assert second.holds() == {"gateway"} and second.sent == 1
    second.close()
    log.close()
    assert in_topic(settings) == ids(51)


def test_without_the_lock_two_relays_send_everything_twice(kafka: Broker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: readers would still count each once, but the topic would carry double the work."""
    monkeypatch.setattr("feedback.outbox.fcntl.flock", lambda *_: None)
    settings = a_topic(kafka)
    log = SqliteLog(tmp_path / "gateway.sqlite", HybridClock())
    log.append_sync([rating(f"i{n}", "r", "up", event_id=f"e{n:04}") for n in range(20)])
    both = threading.Barrier(2)
    waiting = Outbox.waiting

    def together(self: Outbox, limit: int) -> list[outbox.Row]:
        rows = waiting(self, limit)
        if rows:
            both.wait(10)
        return rows

    monkeypatch.setattr(Outbox, "waiting", together)
    relays = Relay(tmp_path, settings), Relay(tmp_path, settings)
    until(lambda: sum(relay.sent for relay in relays) == 40)
    for relay in relays:
        relay.close()
    log.close()
    assert in_topic(settings) == sorted(ids(20) * 2)
    assert archived(settings, tmp_path) == ids(20)


def test_ack_broker_holds_where_another_relay_carries_the_partition(kafka: Broker, tmp_path: Path) -> None:
    settings = a_topic(kafka)
    log = SqliteLog(tmp_path / "log" / "gateway.sqlite", HybridClock())
    log.close()
    alone = Relay(tmp_path / "log", settings)
    stores = stores_with(settings, tmp_path)
    assert stores.relay is not None and stores.relay.holds() == set()
    assert say(stores, 0, 3) == "broker"
    assert (alone.sent, stores.relay.sent) == (3, 0)
    alone.close()
    stores.close()


def test_a_row_that_kafka_will_never_take_is_set_aside_and_the_rest_goes_on(kafka: Broker, tmp_path: Path) -> None:
    settings = a_topic(kafka)
    stores = stores_with(settings, tmp_path)
    relay, paths = stores.relay, stores.logs.partitions()
    assert relay is not None
    stores.log.append_sync([rating("i", "r", "x" * 2_200_000, event_id="large"), rating("j", "r", "up", event_id="fine")])
    asyncio.run(relay.delivered([rating("j", "r", "up", event_id="fine")], 20))
    with pytest.raises(NotDurable, match=r"never by the broker|does not take it"):
        asyncio.run(relay.delivered([rating("i", "r", "", event_id="large")], 20))
    assert (relay.dead, relay.sent, relay.pending(), relay.dead_letters()) == (1, 1, 0, 1)
    [letter] = outbox.dead_letters(paths)
    assert (letter.partition, letter.offset, letter.event_id) == ("gateway", 1, "large")
    assert "max.message.bytes" in letter.reason and abs(letter.at_ms / 1000 - time.time()) < 60
    outbox.send_again(paths[0], letter.offset)  # nothing has changed, so it comes back
    until(lambda: relay.dead == 2)
    assert relay.dead_letters() == 1 and in_topic(settings) == ["fine"]
    stores.close()


@pytest.mark.parametrize(
    ("configs", "named"),
    [
        ({"cleanup_policy": "compact"}, "cleanup.policy is compact, it must be delete"),
        ({"retention_ms": "86400000"}, "retention.ms is 86400000, it must be at least 2592000000"),
        ({"retention_bytes": "1000000"}, "retention.bytes is 1000000, it must be -1"),
        ({"max_message_bytes": "1000"}, "max.message.bytes is 1000, it must be at least 1048576"),
        ({"min_insync_replicas": "2"}, "min.insync.replicas is 2 with 1 replicas"),
    ],
)
def test_a_topic_that_would_lose_events_is_refused_by_name(configs: dict[str, str], named: str, kafka: Broker, tmp_path: Path) -> None:
    settings = a_topic(kafka)
    with Hand(settings) as hand:
        hand.make(**configs)
    stores = stores_with(settings, tmp_path, timeout_s=0.2)
    relay = stores.relay
    assert relay is not None
    with pytest.raises(ConfigError) as caught:
        stores.start_reading()
    assert named in caught.value.message and settings.topic in caught.value.message and "kafka-configs.sh" in caught.value.message
    until(lambda: relay.problem is not None)
    with pytest.raises(NotDurable, match="would lose events"):
        say(stores, 0, 1)
    assert relay.pending() == 1
    stores.close()


def test_a_missing_topic_is_made_as_it_has_to_be(kafka: Broker) -> None:
    settings = a_topic(kafka, partitions=5)
    log = KafkaLog(settings, HybridClock())
    assert log.topic.check().partitions == 5
    assert log.topic.check().max_message_bytes == 2 * 1_048_576
    log.close()
    too_many = KafkaLog(a_topic(kafka, replication=3), HybridClock())
    with pytest.raises(ConfigError, match=r"kafka.replication = 3"):
        too_many.topic.check()
    too_many.close()


def test_a_topic_deleted_under_a_running_service_loses_nothing(kafka: Broker, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = a_topic(kafka)
    stores = stores_with(settings, tmp_path, timeout_s=3)
    assert stores.relay is not None
    say(stores, 0, 30)
    with Hand(settings) as hand:
        hand.delete()
        with pytest.raises(NotDurable):
            say(stores, 30, 10)
        until(lambda: stores.relay is not None and "was deleted" in (stores.relay.problem or ""))
        assert stores.relay.pending() == 10
        hand.make(retention_ms="-1")
    until(lambda: archived(settings, tmp_path) == ids(40))  # those of the deleted topic too
    until(lambda: stores.relay is not None and stores.relay.pending() == 0)
    stores.close()
    assert capsys.readouterr().out.count("was deleted") == 1


def test_what_an_outage_left_is_drained_ten_times_as_fast_as_it_came(kafka: Broker, tmp_path: Path) -> None:
    """50 events a second came in; 3,000 of them are the backlog of a minute, and may take 6 s. Two idle cores did 8,000 a second."""
    log = SqliteLog(tmp_path / "gateway.sqlite", HybridClock())
    log.append_sync([rating(f"i{n}", "r", "up") for n in range(3_000)])
    started = time.monotonic()
    relay = Relay(tmp_path, a_topic(kafka))
    until(lambda: relay.pending() == 0)
    assert time.monotonic() - started < 3_000 / 500
    relay.close()
    log.close()
