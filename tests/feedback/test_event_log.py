"""The contract of `EventLog`, for the embedded log and for a real Kafka, and the relay between the two."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Iterator
from pathlib import Path

import kafka_broker
import pytest
from feedback_world import rating

from feedback.archive import Archive
from feedback.clock import HybridClock
from feedback.config import FeedbackSettings, KafkaSettings, Settings
from feedback.errors import NotDurable
from feedback.kafka_log import KafkaLog
from feedback.log import EventLog, Position
from feedback.sqlite_log import SqliteLog
from feedback.stores import Stores, open_stores

pytestmark = [
    # kafka-python 3.0 reads its protocol files with a function that Python 3.11 and 3.12 call deprecated,
    pytest.mark.filterwarnings(r"ignore:\w+ is deprecated. Use files:DeprecationWarning"),
    # and leaves sockets to the garbage collector where its broker goes away.
    pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning"),
]
needs_kafka = pytest.mark.skipif(kafka_broker.why_not() is not None, reason=f"no Kafka here: {kafka_broker.why_not()}")


@pytest.fixture(autouse=True)
def sockets_collected() -> Iterator[None]:
    """While the filter above holds, so that no later test is blamed for them."""
    yield
    gc.collect()


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[kafka_broker.Broker]:
    with kafka_broker.running(tmp_path_factory.mktemp("kafka")) as running:
        yield running


@pytest.fixture(params=["sqlite", pytest.param("kafka", marks=[pytest.mark.slow, needs_kafka])])
def log(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[EventLog]:
    opened: EventLog
    if request.param == "sqlite":
        opened = SqliteLog(tmp_path / "one.sqlite", HybridClock())
    else:
        bootstrap = request.getfixturevalue("broker").bootstrap
        opened = KafkaLog(KafkaSettings(bootstrap=bootstrap, topic=f"events-{time.time_ns()}"), HybridClock())
    yield opened
    opened.close()


def test_what_is_appended_can_be_read_from_any_position(log: EventLog) -> None:
    said = [rating(f"i{n % 5}", "r", "up") for n in range(40)]
    stored = [asyncio.run(log.append([event]))[0] for event in said]
    assert [event.model_copy(update={"stamp": 0}) for event in stored] == said
    assert [event.stamp for event in stored] == sorted({event.stamp for event in stored})
    records = log.read({}, 100)
    assert sorted(event.event_id for event in stored) == sorted(record.event.event_id for record in records if record.event)
    position: Position = {}
    again: list[str] = []
    while batch := log.read(position, 7):
        assert len(batch) <= 7
        for record in batch:
            assert record.offset >= position.get(record.partition, 0)
            position[record.partition] = record.offset + 1
            again += [record.event.event_id] if record.event else []
    assert sorted(again) == sorted(event.event_id for event in said)


def test_what_is_said_about_one_target_stays_in_order(log: EventLog) -> None:
    stored = asyncio.run(log.append([rating(f"i{n % 3}", "r", "up" if n % 2 else "down") for n in range(30)]))
    records = log.read({}, 100)
    for target in ("i0", "i1", "i2"):
        mine = [event for event in stored if getattr(event, "target", None) == target]
        assert [record.event for record in records if getattr(record.event, "target", None) == target] == mine
        assert len({record.partition for record in records if getattr(record.event, "target", None) == target}) == 1


def test_an_archive_reads_each_event_once(log: EventLog, tmp_path: Path) -> None:
    asyncio.run(log.append([rating(f"i{n}", "r", "up", event_id=f"e{n}") for n in range(25)]))
    asyncio.run(log.append([rating("i0", "r", "up", event_id="e0")]))  # said twice
    archive = Archive(tmp_path / "archive.sqlite")
    assert archive.ingest(log) == 25
    assert archive.ingest(log) == 0
    archive.close()


def stores_with(broker: kafka_broker.Broker, folder: Path, topic: str, timeout_s: float = 20) -> Stores:
    feedback = FeedbackSettings(data_dir=folder, ack="broker", ack_timeout_s=timeout_s)
    return open_stores(Settings(feedback=feedback, kafka=KafkaSettings(bootstrap=broker.bootstrap, topic=topic, delivery_timeout_s=3)))


@pytest.mark.slow
@needs_kafka
def test_the_relay_carries_everything_over_an_outage_of_the_broker(broker: kafka_broker.Broker, tmp_path: Path) -> None:
    topic = f"relay-{time.time_ns()}"
    stores = stores_with(broker, tmp_path, topic)
    assert stores.relay is not None

    async def say(first: int, number: int) -> str:
        said = [rating(f"i{n}", "r", "up", event_id=f"e{n}") for n in range(first, first + number)]
        return (await stores.record_feedback(said))[1]

    assert asyncio.run(say(0, 200)) == "broker"
    broker.stop()
    stores.close()
    stores = stores_with(broker, tmp_path, topic, timeout_s=1)  # a gateway that starts while the broker is away
    assert stores.relay is not None
    with pytest.raises(NotDurable, match="stored here, not yet by the broker") as caught:
        asyncio.run(say(200, 100))
    assert caught.value.retry_after_s == 5 and stores.relay.pending() == 100
    broker.start()
    deadline = time.monotonic() + 60
    while stores.relay.pending() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert stores.relay.pending() == 0 and stores.relay.dead == 0
    reader = KafkaLog(KafkaSettings(bootstrap=broker.bootstrap, topic=topic), HybridClock())
    archive = Archive(tmp_path / "far away" / "archive.sqlite")
    assert archive.ingest(reader) == 300
    assert archive.counts()["held:rating"] == 300
    archive.close()
    reader.close()
    stores.close()


@pytest.mark.slow
@needs_kafka
def test_a_row_that_kafka_will_never_take_is_set_aside_and_the_next_one_goes_on(broker: kafka_broker.Broker, tmp_path: Path) -> None:
    stores = stores_with(broker, tmp_path, f"dead-{time.time_ns()}")
    assert stores.relay is not None
    stores.log.append_sync([rating("i", "r", "x" * 2_000_000), rating("j", "r", "up", event_id="fine")])
    asyncio.run(stores.relay.delivered([rating("j", "r", "up", event_id="fine")], 20))
    assert (stores.relay.dead, stores.relay.sent, stores.relay.pending()) == (1, 1, 0)
    stores.close()
