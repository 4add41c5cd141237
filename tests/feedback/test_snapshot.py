"""Snapshots: what goes in, what stays out, and a digest that names it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from feedback_world import answered, clearing, rating, stores_in

from feedback import snapshot
from feedback.errors import NotFound, TrainingRefused
from feedback.events import ConsentWithdrawn, SubjectErased, new_id
from feedback.snapshot import Filters, Snapshot
from feedback.stores import Stores


def rated_world(folder: Path) -> Stores:
    """Anna chose between two answers, Ben put a thumb on a third."""
    stores = stores_in(folder)
    stores.log.append_sync(answered(stores, "left", "anna", "With a knife.", comparison="c", side="a"))
    stores.log.append_sync(answered(stores, "right", "anna", "Halve it first.", comparison="c", side="b", finish="length"))
    stores.log.append_sync([rating("c", "anna", "b", slot="choice", event_id="choice")])
    stores.log.append_sync([*answered(stores, "alone", "ben", "Slowly."), rating("alone", "ben", "up", event_id="thumb")])
    return stores


def built(stores: Stores, filters: Filters | None = None) -> Snapshot:
    stores.archive.ingest(stores.logs)
    return snapshot.build(stores.archive, stores.subjects, stores.settings.feedback.data_dir / "snapshots", filters)


def test_a_choice_and_a_thumb_become_rows_with_what_was_read(tmp_path: Path) -> None:
    stores = rated_world(tmp_path)
    result = built(stores)
    choice, thumb = result.rows
    assert (choice.kind, choice.outcome, choice.answer_a, choice.answer_b) == ("choice", "b", "With a knife.", "Halve it first.")
    assert (choice.finish_a, choice.finish_b, choice.side, choice.rater) == ("stop", "length", "a", "anna")
    assert choice.prompt == [{"role": "user", "content": "How do I cut an onion?"}]
    assert choice.cohorts == ("cooks",) and choice.adapter_a == "a" * 64 == choice.adapter_b
    assert (thumb.kind, thumb.outcome, thumb.answer_a, thumb.answer_b, thumb.side) == ("thumb", "up", "Slowly.", None, None)
    assert snapshot.load(result.path) == result and result.path.name == result.digest
    stores.close()


def test_the_same_opinions_give_the_same_digest_and_another_opinion_or_filter_another(tmp_path: Path) -> None:
    stores = rated_world(tmp_path)
    first = built(stores)
    assert built(stores) == first
    narrower = built(stores, Filters(cohorts=("cooks",)))
    assert narrower.rows == first.rows and narrower.digest != first.digest
    stores.log.append_sync([rating("alone", "ben", "down")])
    assert built(stores).digest != first.digest
    stores.close()


def test_unfinished_broken_cleared_and_half_answers_do_not_train(tmp_path: Path) -> None:
    stores = rated_world(tmp_path)
    expected = built(stores).rows
    streaming = answered(stores, "streaming", "ben", "And")[:1]
    stores.log.append_sync([*streaming, rating("streaming", "ben", "up")])
    stores.log.append_sync([*answered(stores, "broken", "ben", "An", finish="client_closed"), rating("broken", "ben", "up")])
    stores.log.append_sync([*answered(stores, "undone", "ben", "x"), rating("undone", "ben", "up"), clearing("undone", "ben")])
    stores.log.append_sync([*answered(stores, "half", "ben", "x", comparison="d", side="a"), rating("d", "ben", "a", slot="choice")])
    stores.log.append_sync([rating("never seen", "ben", "up")])
    assert built(stores).rows == expected
    stores.log.append_sync(answered(stores, "streaming", "ben", "And done.")[1:])
    assert len(built(stores).rows) == len(expected) + 1  # it trains as soon as it is finished
    stores.close()


def test_who_withdraws_or_is_erased_does_not_train(tmp_path: Path) -> None:
    stores = rated_world(tmp_path)
    stores.log.append_sync([ConsentWithdrawn(event_id=new_id(), subject="anna")])
    assert [row.rater for row in built(stores).rows] == ["ben"]
    stores.log.append_sync([SubjectErased(event_id=new_id(), subject="ben")])
    with pytest.raises(TrainingRefused, match="collect ratings first"):
        built(stores)
    stores.close()


def test_a_destroyed_key_is_enough_to_stay_out(tmp_path: Path) -> None:
    stores = rated_world(tmp_path)
    stores.archive.ingest(stores.logs)
    stores.subjects.erase("anna")  # the event has not arrived yet
    assert [row.rater for row in built(stores).rows] == ["ben"]
    stores.close()


def test_redaction_drops_rows_and_keeps_the_digest(tmp_path: Path) -> None:
    stores = rated_world(tmp_path)
    before = built(stores)
    assert snapshot.redact(before.path, {"anna": 2**62}) == 1
    after = snapshot.load(before.path)
    assert (after.digest, after.redacted, [row.rater for row in after.rows]) == (before.digest, True, ["ben"])
    assert snapshot.redact(before.path, {"anna": 2**62}) == 0
    stores.close()


def test_a_changed_or_missing_snapshot_is_refused(tmp_path: Path) -> None:
    stores = rated_world(tmp_path)
    result = built(stores)
    head = result.path / "snapshot.json"
    changed = json.loads(head.read_text())
    changed["leaves"]["choice"] = "0" * 64
    head.write_text(json.dumps(changed))
    with pytest.raises(TrainingRefused, match="changed"):
        snapshot.load(result.path)
    with pytest.raises(NotFound):
        snapshot.load(tmp_path / "nowhere")
    stores.close()
