"""Who feeds the archive from Kafka: members of one consumer group, which share the topic's partitions.

Kafka says which member reads which partition; the archive decides whose batch counts. On assignment a member claims its partitions in the
archive and goes on from the archive's own position, so a member that was paused, cut off or replaced finds its batch refused: nothing is
lost and nothing counts twice. What is committed to Kafka afterwards is for people who watch the lag; nothing is ever read from there.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterable
from typing import Any

import structlog

from feedback.archive import BATCH, Archive
from feedback.config import KafkaSettings
from feedback.errors import Conflict, NotDurable, PlauditError
from feedback.kafka_log import make_consumer, partition_name, to_records
from feedback.kafka_topic import Topic, away, library
from feedback.log import Position, Record

log = structlog.get_logger(__name__)

POLL_MS = 300
TOPIC_S = 5.0
"""How often an idle member asks whether the topic is still the one that it reads."""
CLOSE_S = 1.0
BACKOFF_S = 1.0
"""After its batch was refused a member stays away for so long, so that two groups on one archive do not spin."""


class GroupReader:
    """One member. Connects at first use; `step` and `close` may be called from any thread.

    `member` names it in the group: one that comes back within `kafka.session_timeout_s` under its name gets its partitions back at once.
    """

    def __init__(self, archive: Archive, settings: KafkaSettings, member: str) -> None:
        self._archive = archive
        self._settings = settings
        self._member = member
        self._instance = ""
        self._topic = Topic(settings)
        self._kafka: Any = library()
        self._consumer: Any = None
        self._key = ""
        self._owned: dict[str, int] = {}
        self._position: Position = {}
        self._asked = self._back_at = 0.0
        self._lock = threading.Lock()

    def check(self) -> None:
        """Look at the topic now. Raises ConfigError where it would lose events, NotDurable where no broker answers."""
        self._topic.check()

    def catch_up(self) -> int:
        """Store what this member's partitions hold now; how many events were new."""
        total = 0
        while (read := self.step()) is not None:
            total += read
        return total

    def step(self, timeout_ms: int = POLL_MS) -> int | None:
        """Store one batch; how many of its events were new, or None where none came within the time.

        Raises NotDurable while Kafka is away, the topic is gone or the archive cannot be written; ConfigError where the topic would lose
        events.
        """
        with self._lock:
            if time.monotonic() < self._back_at:
                return None
            try:
                self._consumer = self._consumer or self._join()
                polled = self._consumer.poll(timeout_ms=timeout_ms, max_records=BATCH)
                if polled or time.monotonic() - self._asked > TOPIC_S:
                    self._compare_topic()
                return self._store(to_records(self._key, polled)) if polled else None
            except Conflict as exc:
                log.warning("archive.reader_replaced", member=self._member, reason=exc.message)
                self._back_at = time.monotonic() + BACKOFF_S
                self._drop()
                return None
            except self._kafka.errors.KafkaError as exc:
                self._drop()
                if isinstance(exc.__cause__, PlauditError):  # our own, from inside the rebalance
                    raise exc.__cause__ from exc
                raise away(self._settings, exc) from exc
            except PlauditError:
                self._drop()
                raise

    def owned(self) -> set[str]:
        """The partitions that this member reads now."""
        return set(self._owned)

    def close(self) -> None:
        """Leave the group, so that the others take over at once."""
        if not self._lock.acquire(timeout=CLOSE_S):
            self._topic.close()  # a step waits for a broker that is away
            self._lock.acquire()
        try:
            joined = self._consumer is not None
            self._drop()
            if joined:
                self._leave()
        finally:
            self._lock.release()
        self._topic.close()

    def _join(self) -> Any:
        self._key = self._topic.check().key
        self._asked = time.monotonic()
        settings = self._settings
        # Under the same name it would be given what it had of a topic that is gone, without anybody dividing the new one.
        instance = f"{self._member}-{self._key[-8:]}"
        if instance != self._instance:
            self._leave()
            self._instance = instance
        consumer = make_consumer(
            settings,
            group_id=settings.group,
            group_instance_id=instance,
            session_timeout_ms=int(settings.session_timeout_s * 1000),
            heartbeat_interval_ms=int(settings.session_timeout_s * 1000 / 3),
            max_poll_interval_ms=int(settings.max_poll_interval_s * 1000),
        )
        consumer.subscribe([settings.topic], listener=self._listener(consumer))
        return consumer

    def _listener(self, consumer: Any) -> Any:
        base: Any = self._kafka.ConsumerRebalanceListener

        class Claims(base):  # type: ignore[misc]  # the library has no types
            def on_partitions_assigned(_, assigned: Iterable[Any]) -> None:
                self._claim(consumer, list(assigned))

            def on_partitions_revoked(_, revoked: Iterable[Any]) -> None:
                for each in revoked:
                    self._owned.pop(partition_name(self._key, each), None)

        return Claims()

    def _claim(self, consumer: Any, assigned: list[Any]) -> None:
        """Take the partitions over in the archive, then go on from where the archive is."""
        self._owned |= self._archive.claim([partition_name(self._key, each) for each in assigned])
        self._position = self._archive.positions()
        for each in assigned:
            # What retention has deleted is out of range, and so is more than a truncated topic has; both start at the oldest that is left.
            consumer.seek(each, self._position.get(partition_name(self._key, each), 0))

    def _compare_topic(self) -> None:
        """What was polled came from the topic of `_key`, if that one is still there afterwards."""
        self._asked = time.monotonic()
        if self._topic.key() != self._key:
            raise NotDurable(f"topic '{self._settings.topic}' was made anew and is read from its beginning", field="kafka.topic")

    def _store(self, records: list[Record]) -> int:
        new = self._archive.store(records, self._position, self._owned)
        self._position |= {record.partition: record.offset + 1 for record in records}
        commits = {}
        for each in self._consumer.assignment():
            if (following := self._position.get(partition_name(self._key, each))) is not None:
                commits[each] = self._kafka.OffsetAndMetadata(following, "", -1)
        self._consumer.commit_async(commits)
        return new

    def _leave(self) -> None:
        if self._instance:
            with contextlib.suppress(PlauditError):  # Kafka is away; it forgets this member after the session's time
                self._topic.leave(self._settings.group, self._instance)
            self._instance = ""

    def _drop(self) -> None:
        self._owned.clear()
        if self._consumer is not None:
            self._consumer.close(timeout_ms=1000)
            self._consumer = None
