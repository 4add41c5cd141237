"""Kafka as an event log: one topic, events keyed by what keeps their order.

`kafka-python` (extra `kafka`) is imported when a `KafkaLog` is made. Its producer buffers without a bound, so what is in flight is bounded
here; its futures cannot be awaited, so callers wait in a thread.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from typing import Any

from feedback.clock import HybridClock
from feedback.config import KafkaSettings
from feedback.errors import NotDurable
from feedback.events import Event, encode, partition_key
from feedback.kafka_topic import RETRY_AFTER_S, Topic, TopicFacts, away, connected, library
from feedback.log import Position, Record
from feedback.sqlite_log import parse

POLL_MS = 500


class KafkaLog:
    """Producer and reader of one topic. Thread-safe. Connects at first use and checks the topic then: raises NotDurable while the broker is
    away or the topic is gone, ConfigError where the topic would lose events."""

    def __init__(self, settings: KafkaSettings, clock: HybridClock) -> None:
        self._kafka: Any = library()
        self._settings = settings
        self._clock = clock
        self._producer: Any = None
        self._consumer: Any = None
        self._facts: TopicFacts | None = None
        self._sending = threading.Lock()
        self._reading = threading.Lock()
        self._closing = threading.Event()
        self.topic = Topic(settings)

    async def append(self, events: Sequence[Event]) -> list[Event]:
        """See `EventLog.append`; Kafka holds a repeated event twice, its readers de-duplicate."""
        stamped = [event.model_copy(update={"stamp": self._clock.tick(event.stamp)}) for event in events]
        problems = await asyncio.to_thread(self.send, [(partition_key(event), encode(event)) for event in stamped])
        for problem in problems:
            if problem is not None:
                raise NotDurable(f"Kafka did not take an event: {problem}", retry_after_s=RETRY_AFTER_S)
        return stamped

    def send(self, rows: Sequence[tuple[str, bytes]]) -> list[str | None]:
        """Send (key, value) pairs and wait for all in-sync replicas; for each what is wrong with it for good, or None.

        At most `kafka.batch_events` are in flight. Raises NotDurable where the broker is away, after which nothing is known about the rows:
        they are sent again and readers de-duplicate.
        """
        problems: list[str | None] = []
        with self._sending:
            if self._closing.is_set():
                raise NotDurable("this connection to Kafka is closed", retry_after_s=RETRY_AFTER_S)
            try:
                self._producer = self._producer or self._make_producer()
                for start in range(0, len(rows), self._settings.batch_events):
                    part = rows[start : start + self._settings.batch_events]
                    futures = [self._queue(key, value) for key, value in part]
                    problems += [self._outcome(future) for future in futures]
            except self._kafka.errors.KafkaError as exc:
                self._drop_producer()
                raise away(self._settings, exc) from exc
        return problems

    def read(self, position: Position, limit: int) -> list[Record]:
        """See `EventLog.read`; partitions are named by `partition_name`. Returns what arrives within half a second."""
        with self._reading:
            try:
                facts = self._facts = self._facts or self.topic.check()
                self._consumer = self._consumer or make_consumer(self._settings)
                partitions = [self._kafka.TopicPartition(self._settings.topic, number) for number in range(facts.partitions)]
                self._consumer.assign(partitions)
                ends = self._consumer.end_offsets(partitions)
                starts = self._consumer.beginning_offsets(partitions)
                for each in partitions:
                    # What retention has deleted, or what lies beyond the end of a truncated topic, cannot be read; start at the oldest.
                    wanted = position.get(partition_name(facts.key, each), 0)
                    self._consumer.seek(each, wanted if starts[each] <= wanted <= ends[each] else starts[each])
                records = self._poll(facts.key, ends, limit)
                if self.topic.key() != facts.key:
                    raise self._kafka.errors.UnknownTopicIdError("the topic was made anew meanwhile")
                return records
            except self._kafka.errors.KafkaError as exc:
                self._drop_consumer()
                raise away(self._settings, exc) from exc
            except NotDurable:
                self._drop_consumer()
                raise

    def close(self) -> None:
        self._closing.set()
        self.topic.close()
        with self._sending:
            self._drop_producer()
        with self._reading:
            self._drop_consumer()

    def _poll(self, key: str, ends: dict[Any, int], limit: int) -> list[Record]:
        """Until the limit, or until every partition's end as it was at the call."""
        records: list[Record] = []
        while len(records) < limit and any(self._consumer.position(each) < end for each, end in ends.items()):
            records += to_records(key, self._consumer.poll(timeout_ms=POLL_MS, max_records=limit - len(records)))
        return records

    def _queue(self, key: str, value: bytes) -> Any:
        try:
            return self._producer.send(self._settings.topic, value=value, key=key.encode())
        except self._kafka.errors.MessageSizeTooLargeError as exc:
            return exc

    def _outcome(self, future: Any) -> str | None:
        """None, or why this record will never be taken. Raises KafkaError where that is not known."""
        errors = self._kafka.errors
        permanent = (errors.MessageSizeTooLargeError, errors.InvalidRecordError)
        if isinstance(future, permanent):
            return f"it is larger than the topic's max.message.bytes ({future})"
        deadline = time.monotonic() + self._settings.delivery_timeout_s
        while True:
            try:
                future.get(timeout=0.1)
                return None
            except permanent as exc:
                return str(exc)
            except errors.KafkaTimeoutError:  # of this short wait, or of the delivery: then the future is done
                if future.is_done or self._closing.is_set() or time.monotonic() > deadline:
                    raise

    def _make_producer(self) -> Any:
        facts = self.topic.check()
        timeout_ms = int(self._settings.delivery_timeout_s * 1000)
        return connected(
            self._kafka.KafkaProducer,
            self._settings,
            acks="all",
            enable_idempotence=True,
            allow_auto_create_topics=False,
            linger_ms=5,
            max_block_ms=min(5000, timeout_ms),
            max_request_size=facts.max_message_bytes,
            delivery_timeout_ms=timeout_ms,
            request_timeout_ms=max(1000, timeout_ms // 3),
            metrics_enabled=False,
        )

    def _drop_producer(self) -> None:
        # close() raises where records are pending; those stay unsent in the partition and are sent again.
        if self._producer is not None:
            try:
                self._producer.close(timeout=1)
            except self._kafka.errors.KafkaError:
                self._producer._sender.force_close()
            self._producer = None

    def _drop_consumer(self) -> None:
        self._facts = None
        if self._consumer is not None:
            self._consumer.close()
            self._consumer = None


def make_consumer(settings: KafkaSettings, **options: Any) -> Any:
    """A consumer that starts where it is told to and commits nothing by itself. Raises KafkaError."""
    return connected(
        library().KafkaConsumer,
        settings,
        **{
            "group_id": None,
            "enable_auto_commit": False,
            "allow_auto_create_topics": False,
            "auto_offset_reset": "earliest",
            "isolation_level": "read_committed",
            "metrics_enabled": False,
            **options,
        },
    )


def partition_name(key: str, partition: Any) -> str:
    """A partition of this very topic: another one of the same name starts at its beginning."""
    return f"{key}/{partition.partition}"


def to_records(key: str, polled: dict[Any, list[Any]]) -> list[Record]:
    """What a poll brought. A value that is no event, none at all included, is left to the archive to set aside."""
    return [
        Record(partition_name(key, each), message.offset, parse(message.value or b""), message.value or b"")
        for each, batch in polled.items()
        for message in batch
    ]
