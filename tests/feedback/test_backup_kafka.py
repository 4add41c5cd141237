"""A restore where the data folder is lost and Kafka has what happened since the backup."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
from feedback_world import answered, rating
from kafka_world import MARKS, a_topic, stores_with
from waiting import until

from deploy.broker import Broker
from feedback import backup, erasure, restore
from feedback.errors import NotDurable
from feedback.events import StartedText
from feedback.stores import Stores

pytestmark = [pytest.mark.slow, *MARKS]


def ada(_: Stores) -> str:
    return "ada"


def again(stores: Stores, erasures: Mapping[str, int]) -> object:
    return erasure.replay(stores, erasures)


def sent(stores: Stores) -> bool:
    return stores.relay is not None and stores.relay.pending() == 0


def test_newer_events_and_erasures_come_back_from_the_topic(kafka: Broker, tmp_path: Path) -> None:
    settings = a_topic(kafka)
    stores = stores_with(settings, tmp_path / "data")
    for who in ("anna", "ben"):
        stores.log.append_sync([*answered(stores, f"of {who}", who, "Thin."), rating(f"of {who}", who, "up", event_id=f"{who} up")])
    until(lambda: sent(stores))
    stores.start_reading()
    until(lambda: stores.ingest() == 0 and len(stores.archive.current()) == 2)
    backup.backup(stores, tmp_path / "backup", "ada")
    stores.log.append_sync([rating("of ben", "ben", "down", event_id="late")])
    stamp = erasure.erase(stores, "anna", "ada", "asked").stamp
    until(lambda: sent(stores))
    with_kafka = stores.settings
    stores.close()
    shutil.rmtree(tmp_path / "data")
    done = restore.restore(tmp_path / "backup", with_kafka, ada, again)
    assert (done.newer, done.erased) == (2, ("anna",))
    stores = stores_with(settings, tmp_path / "data")
    assert stores.archive.state("of ben")["ben", "rating"].event_id == "late"
    assert stores.archive.interaction("of anna") is None and stores.subjects.erased("anna") == stamp
    ben = stores.archive.interaction("of ben")
    assert ben is not None and ben.started.sealed is not None and stores.subjects.open(ben.started.sealed, StartedText).messages
    # The restored archive goes on where the topic was read to.
    stores.log.append_sync([rating("of ben", "ben", "up", event_id="after")])
    until(lambda: sent(stores))
    stores.start_reading()
    until(lambda: stores.ingest() >= 0 and stores.archive.state("of ben")["ben", "rating"].event_id == "after")
    stores.close()


def test_a_restore_that_cannot_read_the_topic_is_refused(kafka: Broker, tmp_path: Path) -> None:
    settings = a_topic(kafka)
    stores = stores_with(settings, tmp_path / "data")
    stores.log.append_sync(answered(stores, "i", "anna", "Thin."))
    backup.backup(stores, tmp_path / "backup", "ada")
    nowhere = stores.settings.model_copy(update={"kafka": settings.model_copy(update={"bootstrap": "127.0.0.1:1"})})
    stores.close()
    with pytest.raises(NotDurable, match=r"127\.0\.0\.1:1"):
        restore.restore(tmp_path / "backup", nowhere, ada, again, replace=True)
    assert (tmp_path / "data" / "archive.sqlite").exists() and not list(tmp_path.glob(".data*"))
