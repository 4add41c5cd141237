"""A member of the archive's group, to be paused and killed by test_kafka_readers.py. Says how many new events each batch brought."""

from __future__ import annotations

import sys
from pathlib import Path

from feedback.archive import Archive
from feedback.config import KafkaSettings
from feedback.readers import GroupReader


def main(path: Path, settings: KafkaSettings, member: str) -> None:
    reader = GroupReader(Archive(path), settings, member)
    while True:
        if (new := reader.step()) is not None:
            print(f"# {new} {' '.join(sorted(reader.owned()))}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), KafkaSettings.model_validate_json(sys.argv[2]), sys.argv[3])
