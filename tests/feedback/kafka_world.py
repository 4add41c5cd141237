"""What the tests of Kafka share: settings for a topic of their own, and somebody who changes the topic."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from waiting import until

from deploy.broker import Broker
from feedback.archive import Archive
from feedback.clock import HybridClock
from feedback.config import FeedbackSettings, KafkaSettings, Settings
from feedback.kafka_log import KafkaLog
from feedback.kafka_topic import connected, library
from feedback.stores import Stores, open_stores

MARKS = [
    # kafka-python 3.0 reads its protocol files with a function that Python 3.11 and 3.12 call deprecated,
    pytest.mark.filterwarnings(r"ignore:\w+ is deprecated. Use files:DeprecationWarning"),
    # and leaves sockets to the garbage collector where its broker goes away.
    pytest.mark.filterwarnings("ignore:unclosed <(socket|ssl):ResourceWarning"),
    pytest.mark.usefixtures("sockets_collected"),
]


def a_topic(broker: Broker, **other: Any) -> KafkaSettings:
    """Settings for a topic that nobody used before."""
    given: dict[str, Any] = {"topic": f"t-{time.time_ns()}", "partitions": 3, "group": f"g-{time.time_ns()}", "delivery_timeout_s": 3.0}
    return KafkaSettings(bootstrap=broker.bootstrap, **(given | {"session_timeout_s": 2.0, "max_poll_interval_s": 10.0} | other))


def stores_with(settings: KafkaSettings, folder: Path, timeout_s: float = 20, process: str = "gateway") -> Stores:
    feedback = FeedbackSettings(data_dir=folder, ack="broker", ack_timeout_s=timeout_s)
    return open_stores(Settings(feedback=feedback, kafka=settings), process)


@contextmanager
def broker_away(broker: Broker) -> Iterator[None]:
    """kill -9 at the beginning; it is back at the end, whatever happened."""
    broker.kill()
    try:
        yield
    finally:
        broker.start()


def archived(settings: KafkaSettings, folder: Path) -> list[str]:
    """The ids of the events in the topic, each once, as an archive finds them that reads it from its beginning."""
    log = KafkaLog(settings, HybridClock())
    archive = Archive(folder / f"look-{time.time_ns()}.sqlite")
    archive.ingest(log)
    found = sorted(event.event_id for event in archive.events("feedback.given", limit=100_000))
    archive.close()
    log.close()
    return found


def in_topic(settings: KafkaSettings) -> list[str]:
    """The ids of the events in the topic as often as they lie there."""
    log = KafkaLog(settings, HybridClock())
    found = sorted(record.event.event_id for record in log.read({}, 100_000) if record.event)
    log.close()
    return found


class Hand:
    """An operator's hand on the cluster."""

    def __init__(self, settings: KafkaSettings) -> None:
        self.settings = settings
        self.admin: Any = connected(library().KafkaAdminClient, settings)

    def __enter__(self) -> Hand:
        return self

    def __exit__(self, *_: object) -> None:
        self.admin.close()

    def make(self, **configs: str) -> None:
        named = {name.replace("_", "."): value for name, value in configs.items()}
        self.admin.create_topics({self.settings.topic: {"num_partitions": 3, "configs": named}}, wait_for_metadata=True)

    def delete(self) -> None:
        self.admin.delete_topics([self.settings.topic])
        until(lambda: self.settings.topic not in self.admin.list_topics())

    def write(self, value: bytes | None, key: bytes = b"k") -> None:
        producer = connected(library().KafkaProducer, self.settings)
        producer.send(self.settings.topic, value=value, key=key).get(10)
        producer.close()
