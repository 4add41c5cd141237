"""Kafka as an event log: one topic, events keyed by what keeps their order.

`kafka-python` (extra `kafka`) is imported when a `KafkaLog` is made. Its producer buffers without a bound, so what is in flight is bounded
here; its futures cannot be awaited, so callers wait in a thread.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from typing import Any

from feedback.clock import HybridClock
from feedback.config import KafkaSettings
from feedback.errors import ConfigError, NotDurable
from feedback.events import Event, encode, partition_key
from feedback.log import Position, Record
from feedback.sqlite_log import parse

RETRY_AFTER_S = 5
POLL_MS = 500


class KafkaLog:
    """Producer and reader of one topic. Thread-safe. Connects at first use; raises NotDurable while the broker is away."""

    def __init__(self, settings: KafkaSettings, clock: HybridClock) -> None:
        try:
            import kafka
        except ImportError as exc:
            raise ConfigError("kafka.bootstrap is set, but kafka-python is not installed: install plaudit[kafka]", field="kafka") from exc
        self._kafka: Any = kafka
        self._settings = settings
        self._clock = clock
        self._producer: Any = None
        self._consumer: Any = None
        self._sending = threading.Lock()
        self._reading = threading.Lock()

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
            try:
                self._producer = self._producer or self._make_producer()
                for start in range(0, len(rows), self._settings.batch_events):
                    part = rows[start : start + self._settings.batch_events]
                    futures = [self._queue(key, value) for key, value in part]
                    problems += [self._outcome(future) for future in futures]
            except self._kafka.errors.KafkaError as exc:
                self._drop_producer()
                raise NotDurable(f"Kafka at {self._settings.bootstrap} does not answer: {exc}", retry_after_s=RETRY_AFTER_S) from exc
        return problems

    def read(self, position: Position, limit: int) -> list[Record]:
        """See `EventLog.read`; partitions are named `<topic>/<number>`. Returns what arrives within half a second."""
        errors = self._kafka.errors
        with self._reading:
            try:
                self._consumer = self._consumer or self._make_consumer()
                numbers = self._consumer.partitions_for_topic(self._settings.topic) or set()
                partitions = [self._kafka.TopicPartition(self._settings.topic, number) for number in sorted(numbers)]
                if not partitions:
                    return []
                self._consumer.assign(partitions)
                ends = self._consumer.end_offsets(partitions)
                starts = self._consumer.beginning_offsets(partitions)
                for each in partitions:
                    # What retention has deleted cannot be read any more; start at the oldest that is left.
                    self._consumer.seek(each, max(position.get(_name(each), 0), starts[each]))
                return self._poll(ends, limit)
            except errors.KafkaError as exc:
                self._drop_consumer()
                raise NotDurable(f"Kafka at {self._settings.bootstrap} cannot be read: {exc}", retry_after_s=RETRY_AFTER_S) from exc

    def close(self) -> None:
        with self._sending:
            self._drop_producer()
        with self._reading:
            self._drop_consumer()

    def _poll(self, ends: dict[Any, int], limit: int) -> list[Record]:
        """Until the limit, or until every partition's end as it was at the call."""
        records: list[Record] = []
        while len(records) < limit and any(self._consumer.position(each) < end for each, end in ends.items()):
            for each, batch in self._consumer.poll(timeout_ms=POLL_MS, max_records=limit - len(records)).items():
                records += [Record(_name(each), message.offset, parse(message.value), message.value) for message in batch]
        return records

    def _queue(self, key: str, value: bytes) -> Any:
        try:
            return self._producer.send(self._settings.topic, value=value, key=key.encode())
        except self._kafka.errors.MessageSizeTooLargeError as exc:
            return exc

    def _outcome(self, future: Any) -> str | None:
        permanent = (self._kafka.errors.MessageSizeTooLargeError, self._kafka.errors.InvalidRecordError)
        if isinstance(future, permanent):
            return str(future)
        try:
            future.get(timeout=self._settings.delivery_timeout_s)
        except permanent as exc:
            return str(exc)
        return None

    def _make_producer(self) -> Any:
        timeout_ms = int(self._settings.delivery_timeout_s * 1000)
        return self._kafka.KafkaProducer(
            **self._connection(),
            acks="all",
            enable_idempotence=True,
            linger_ms=5,
            max_block_ms=min(5000, timeout_ms),
            delivery_timeout_ms=timeout_ms,
            request_timeout_ms=max(1000, timeout_ms // 3),
            metrics_enabled=False,
        )

    def _make_consumer(self) -> Any:
        return self._kafka.KafkaConsumer(
            **self._connection(), group_id=None, enable_auto_commit=False, auto_offset_reset="earliest", isolation_level="read_committed"
        )

    def _connection(self) -> dict[str, Any]:
        settings = self._settings
        password = settings.sasl_password.get_secret_value() if settings.sasl_password else None
        options = {
            "bootstrap_servers": (settings.bootstrap or "").split(","),
            "security_protocol": settings.security_protocol,
            "sasl_mechanism": settings.sasl_mechanism,
            "sasl_plain_username": settings.sasl_username,
            "sasl_plain_password": password,
            "ssl_cafile": str(settings.ssl_cafile) if settings.ssl_cafile else None,
            "bootstrap_timeout_ms": 5000,
        }
        return {name: value for name, value in options.items() if value is not None}

    def _drop_producer(self) -> None:
        # close() raises where records are pending; those stay unsent in the partition and are sent again.
        if self._producer is not None:
            try:
                self._producer.close(timeout=1)
            except self._kafka.errors.KafkaError:
                self._producer._sender.force_close()
            self._producer = None

    def _drop_consumer(self) -> None:
        if self._consumer is not None:
            self._consumer.close()
            self._consumer = None


def _name(partition: Any) -> str:
    return f"{partition.topic}/{partition.partition}"
