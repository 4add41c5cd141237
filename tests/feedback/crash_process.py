"""A process that dies by kill -9 between a write and its acknowledgement, for test_kafka_crash.py.

`sqlite` and `kafka` append an event and die before anybody is told. `relay` carries a partition and dies after Kafka has acknowledged the
rows, before they are marked. `forgetful` is the control: it marks first and dies before Kafka has them.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from feedback_world import rating

from feedback.clock import HybridClock
from feedback.config import KafkaSettings
from feedback.kafka_log import KafkaLog
from feedback.outbox import Outbox
from feedback.relay import Relay
from feedback.sqlite_log import SqliteLog


def die(*_: Any) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def main(mode: str, folder: Path, settings: KafkaSettings) -> None:
    event = rating("i", "r", "up", event_id="e")
    if mode == "sqlite":
        SqliteLog(folder / "one.sqlite", HybridClock()).append_sync([event])
        die()
    if mode == "kafka":
        asyncio.run(KafkaLog(settings, HybridClock()).append([event]))
        die()
    if mode == "forgetful":

        def marks_first(self: Relay, box: Outbox) -> int:
            rows = box.waiting(500)
            box.mark(self._kafka.topic.key(), rows, [None] * len(rows))
            return int(die())

        Relay._drain = marks_first  # type: ignore[method-assign]
    else:
        Outbox.mark = die  # type: ignore[method-assign, assignment]
    Relay(folder, settings)
    time.sleep(60)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), KafkaSettings.model_validate_json(sys.argv[3]))
