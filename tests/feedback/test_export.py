"""Training sets for others: TRL's shapes, what each form leaves out, and figures and lines about what is there."""

from __future__ import annotations

import gzip
import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from feedback_world import answered, clearing, rating, stores_in

from feedback import audit, export, snapshot, tail
from feedback.errors import InvalidInput, NotDurable
from feedback.events import FeedbackText, new_id
from feedback.importer import import_file
from feedback.snapshot import Snapshot
from feedback.stats import statistics
from feedback.stores import Stores

ASKED = [{"role": "user", "content": "How do I cut an onion?"}]
CHOICES = {"c1": "a", "c2": "b", "c3": "tie", "c4": "both_bad", "c5": "a"}


def said(answer: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": answer}]


@pytest.fixture
def stores(tmp_path: Path) -> Any:
    """Five choices, of which the last is between two answers that are the same, and two thumbs."""
    stores = stores_in(tmp_path / "data")
    for number, (comparison, value) in enumerate(CHOICES.items(), 1):
        second = "answer 5" if comparison == "c5" else f"other {number}"
        stores.log.append_sync(answered(stores, f"{comparison}-a", "anna", f"answer {number}", comparison=comparison, side="a"))
        stores.log.append_sync(answered(stores, f"{comparison}-b", "anna", second, comparison=comparison, side="b"))
        stores.log.append_sync([rating(comparison, "anna", value, slot="choice", event_id=f"e{number}")])
    stores.log.append_sync([*answered(stores, "good", "ben", "Slowly."), rating("good", "ben", "up", event_id="e6")])
    stores.log.append_sync([*answered(stores, "bad", "ben", "Why?"), rating("bad", "ben", "down", event_id="e7")])
    yield stores
    stores.close()


def taken(stores: Stores) -> Snapshot:
    stores.archive.ingest(stores.logs)
    return snapshot.build(stores.archive, stores.subjects, stores.settings.feedback.data_dir / "snapshots")


def lines(path: Path) -> list[Any]:
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [json.loads(line) for line in raw.decode().splitlines()]


def is_trl(record: Any) -> bool:
    """TRL's conversational shapes as its documentation on dataset formats states them, checked by hand."""

    def conversation(value: object, last: str) -> bool:
        fits = isinstance(value, list) and value and all(isinstance(each, dict) and each.keys() >= {"role", "content"} for each in value)
        return bool(fits) and isinstance(value, list) and value[-1]["role"] == last

    if record.keys() == {"prompt", "chosen", "rejected"}:
        answers = conversation(record["chosen"], "assistant") and conversation(record["rejected"], "assistant")
        return conversation(record["prompt"], "user") and answers
    paired = record.keys() == {"prompt", "completion", "label"} and isinstance(record["label"], bool)
    return paired and conversation(record["prompt"], "user") and conversation(record["completion"], "assistant")


def test_choices_become_trls_preference_form_and_ties_are_counted(stores: Stores, tmp_path: Path) -> None:
    done = export.export(taken(stores), tmp_path / "pairs.jsonl", "preference")
    # e1: side a won, e2: side b won; e3 a tie, e4 both bad, e5 twice the same answer, e6 and e7 thumbs.
    assert lines(done.path) == [
        {"prompt": ASKED, "chosen": said("answer 1"), "rejected": said("other 1")},
        {"prompt": ASKED, "chosen": said("other 2"), "rejected": said("answer 2")},
    ]
    assert all(is_trl(record) for record in lines(done.path))
    assert (done.written, done.left_out) == (2, {"ties": 1, "both bad": 1, "the same answer twice": 1, "thumbs": 2})
    assert done.path.stat().st_mode & 0o77 == 0
    assert not is_trl({"prompt": ASKED, "chosen": "answer 1", "rejected": said("other 1")})


def test_thumbs_become_trls_unpaired_form_and_choices_where_asked_for(stores: Stores, tmp_path: Path) -> None:
    thumbs = [
        {"prompt": ASKED, "completion": said("Slowly."), "label": True},
        {"prompt": ASKED, "completion": said("Why?"), "label": False},
    ]
    done = export.export(taken(stores), tmp_path / "thumbs.jsonl", "unpaired")
    assert lines(done.path) == thumbs and done.left_out == {"choices": 5}
    both = export.export(taken(stores), tmp_path / "all.jsonl", "unpaired", choices=True)
    labelled = [(record["completion"][0]["content"], record["label"]) for record in lines(both.path)[:6]]
    expected = [("answer 1", True), ("other 1", False), ("other 2", True), ("answer 2", False), ("answer 4", False), ("other 4", False)]
    assert labelled == expected and lines(both.path)[6:] == thumbs
    assert both.left_out == {"ties": 1, "the same answer twice": 1}
    assert all(is_trl(record) for record in lines(both.path))


def test_plain_lines_are_the_snapshots_rows_packed_by_suffix_and_the_same_each_time(stores: Stores, tmp_path: Path) -> None:
    rows = taken(stores).rows
    done = export.export(taken(stores), tmp_path / "rows.jsonl.gz", "jsonl")
    assert [snapshot.Row.model_validate(record) for record in lines(done.path)] == rows and len(rows) == 7
    again = export.export(taken(stores), tmp_path / "again.jsonl.gz", "jsonl")
    assert again.path.read_bytes() == done.path.read_bytes()


def test_the_datasets_library_reads_both_forms(stores: Stores, tmp_path: Path) -> None:
    pyarrow_json = pytest.importorskip("pyarrow.json")
    for form, names in (("preference", ["prompt", "chosen", "rejected"]), ("unpaired", ["prompt", "completion", "label"])):
        done = export.export(taken(stores), tmp_path / f"{form}.jsonl", form)  # type: ignore[arg-type]
        table = pyarrow_json.read_json(done.path)  # what `datasets` reads JSON lines with
        assert table.column_names == names and table.num_rows == done.written


def test_an_exported_file_imports_as_the_same_pairs(stores: Stores, tmp_path: Path) -> None:
    done = export.export(taken(stores), tmp_path / "pairs.jsonl.gz", "preference")
    other = stores_in(tmp_path / "other")
    result = import_file(done.path, "elsewhere", other.log, other.subjects)
    assert (result.added, result.errors) == (2, [])
    again = export.export(taken(other), tmp_path / "again.jsonl", "preference")
    assert sorted(map(json.dumps, lines(again.path))) == sorted(map(json.dumps, lines(done.path)))
    other.close()


def test_a_file_that_cannot_be_written_is_refused_and_leaves_nothing(stores: Stores, tmp_path: Path) -> None:
    rows = taken(stores)
    with pytest.raises(InvalidInput, match="out: "):
        export.export(rows, tmp_path / "nowhere" / "x.jsonl", "jsonl")
    thumbs = Snapshot(rows.path, rows.digest, rows.rows[5:], rows.filters, False)
    (tmp_path / "out").mkdir()
    with pytest.raises(InvalidInput, match="2 thumbs"):
        export.export(thumbs, tmp_path / "out" / "x.jsonl", "preference")
    with pytest.raises(NotDurable, match="could not be written"):
        export.export(rows, tmp_path / "out" / ("x" * 250), "jsonl")  # with the temporary's name longer than a file's may be
    assert list((tmp_path / "out").iterdir()) == []


def test_an_export_is_audited_and_found_again_by_its_snapshot(stores: Stores, tmp_path: Path) -> None:
    rows = taken(stores)
    done = export.export(rows, tmp_path / "pairs.jsonl", "preference")
    export.record(stores.engine, "ada", rows, done, "preference")
    told = [row for row in audit.read(stores.engine) if row["action"] == "feedback.exported"]
    assert [(row["actor"], row["subject"]) for row in told] == [("ada", rows.digest)] and audit.verify(stores.engine)[1] is None
    assert export.made_from(stores.engine, {rows.digest}) == [str(done.path)] and export.made_from(stores.engine, {"other"}) == []


def test_figures_of_a_data_folder(stores: Stores) -> None:
    stores.log.append_sync([rating("good", "ben", "down"), clearing("bad", "ben")])
    sealed = stores.subjects.seal(("ben",), FeedbackText(comment="Thin slices."))
    stores.log.append_sync([rating("good", "ben", "x", slot="comment").model_copy(update={"value": None, "sealed": sealed})])
    stores.archive.ingest(stores.logs)
    found = statistics(stores)
    assert found.events == {"interaction.started": 12, "interaction.finished": 12, "feedback.given": 9, "feedback.cleared": 1}
    assert found.held == {"choice": {"a": 2, "b": 1, "both_bad": 1, "tie": 1}, "comment": {"text": 1}, "rating": {"down": 1}}
    assert (found.raters, found.sources, found.cohorts) == (2, {"person": 7}, {"cooks": 12})
    assert (found.poison, found.unsent, found.dead_letters) == (0, None, 0)
    assert found.oldest_ms is not None and found.newest_ms is not None and found.oldest_ms <= found.newest_ms
    assert statistics(stores) == found


def test_an_empty_folder_has_figures_too(tmp_path: Path) -> None:
    stores = stores_in(tmp_path)
    found = statistics(stores)
    assert (found.events, found.held, found.raters, found.oldest_ms) == ({}, {}, 0, None)
    stores.close()


def test_the_last_events_and_those_that_follow_from_every_partition(stores: Stores) -> None:
    second = stores_in(stores.settings.feedback.data_dir, "other")
    second.log.append_sync([rating("good", "carl", "up", event_id="late")])
    events, position = tail.last(stores.logs, 3)
    assert [event.event_id for event in events] == ["finished-bad", "e7", "late"]
    assert [event.event_id for event in tail.last(stores.logs, 2, {"feedback.given"})[0]] == ["e7", "late"]
    assert tail.last(stores.logs, 0)[0] == [] and len(tail.last(stores.logs, 1_000)[0]) == 32
    coming = tail.follow(stores.logs, position, {"feedback.given"})
    assert next(coming) is None
    stores.log.append_sync(answered(stores, "new", "anna", "x"))
    second.log.append_sync([rating("new", "anna", "up", event_id="newest")])
    assert [event.event_id for event in islice(coming, 1) if event] == ["newest"]
    second.close()


def test_a_line_keeps_texts_sealed_unless_it_may_open_them(stores: Stores) -> None:
    comment = stores.subjects.seal(("ben",), FeedbackText(comment="Thin slices."))
    event = rating("good", "ben", "up").model_copy(update={"sealed": comment})
    assert json.loads(tail.line(event)) == event.model_dump(mode="json")
    opened = json.loads(tail.line(event, stores.subjects))
    assert opened["text"] == {"comment": "Thin slices."} and "sealed" not in opened
    stores.subjects.erase("ben")
    assert json.loads(tail.line(event, stores.subjects))["text"] is None
    assert json.loads(tail.line(clearing("good", "ben", event_id=new_id()), stores.subjects))["type"] == "feedback.cleared"
