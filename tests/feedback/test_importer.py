"""Importing judged pairs: both forms, broken lines named, a second import adds nothing."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from feedback_world import stores_in

from feedback import snapshot
from feedback.errors import InvalidInput
from feedback.importer import MAX_LINE_BYTES, import_file
from feedback.snapshot import Snapshot
from feedback.stores import Stores

HH = {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello!", "rejected": "\n\nHuman: Hi\n\nAssistant: What?"}
USER = {"role": "user", "content": "Hi"}
IMPLICIT = {
    "chosen": [USER, {"role": "assistant", "content": "Hey."}],
    "rejected": [USER, {"role": "assistant", "content": "Go."}],
    "rater": "ann",
}
EXPLICIT = {"prompt": [USER], "chosen": [{"role": "assistant", "content": "Yes?"}], "rejected": [{"role": "assistant", "content": "No."}]}
BARE = {"prompt": "Hi", "chosen": "Good day.", "rejected": "Bad day."}


def lines(*records: object) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def rows_of(stores: Stores) -> Snapshot:
    stores.archive.ingest(stores.logs)
    return snapshot.build(stores.archive, stores.subjects, stores.settings.feedback.data_dir / "snapshots")


def test_every_form_is_read_and_a_second_import_adds_nothing(tmp_path: Path) -> None:
    stores = stores_in(tmp_path / "data", "import")
    path = tmp_path / "pairs.jsonl.gz"
    path.write_bytes(gzip.compress(lines(HH, IMPLICIT, EXPLICIT, BARE, HH).encode()))
    first = import_file(path, "hh", stores.log, stores.subjects)
    assert (first.added, first.skipped, first.errors) == (4, 1, [])
    rows = rows_of(stores).rows
    better = {row.answer_a if row.outcome == "a" else row.answer_b for row in rows}
    assert better == {"Hello!", "Hey.", "Yes?", "Good day."}
    assert all(row.prompt == [USER] and row.source == "import" and row.side is None for row in rows)
    assert all(row.cohorts == ("import:hh",) for row in rows) and len({row.rater for row in rows}) == 2
    again = import_file(path, "hh", stores.log, stores.subjects)
    assert (again.added, again.skipped) == (0, 5)
    assert rows_of(stores).rows == rows
    stores.close()


def test_the_better_answer_is_as_often_first_as_second(tmp_path: Path) -> None:
    stores = stores_in(tmp_path / "data", "import")
    path = tmp_path / "pairs.jsonl"
    path.write_text("\ufeff" + lines(*({"prompt": f"Question {n}", "chosen": "good", "rejected": "bad"} for n in range(400))))
    assert import_file(path, "made", stores.log, stores.subjects).added == 400
    first = sum(row.outcome == "a" for row in rows_of(stores).rows)
    assert 150 <= first <= 250  # a fair coin leaves this range once in two million
    stores.close()


def test_broken_lines_are_named_and_the_good_ones_kept(tmp_path: Path) -> None:
    stores = stores_in(tmp_path / "data", "import")
    bad: list[tuple[str, str, str]] = [
        ("{nonsense\n", "line", "not JSON"),
        ("[1]\n", "line", "not a JSON object"),
        (lines({"chosen": "x"}), "chosen", "prompt must be given"),
        (lines({"prompt": "Hi", "chosen": "x"}), "rejected", "missing"),
        (lines({"prompt": "Hi", "chosen": "x", "rejected": "x"}), "rejected", "same answer"),
        (lines(HH | {"rejected": "\n\nHuman: Other\n\nAssistant: What?"}), "rejected", "different prompts"),
        (lines(HH | {"chosen": "\n\nHuman: Hi"}), "chosen", "end with one assistant turn"),
        (lines(HH | {"chosen": "\n\nHuman: Hi\n\nAssistant:"}), "chosen", "empty answer"),
        (lines(EXPLICIT | {"prompt": [{"role": "wizard", "content": "Hi"}]}), "prompt", "wizard"),
        (lines(EXPLICIT | {"chosen": [{"role": "assistant"}]}), "chosen", "content"),
        (lines(HH | {"rater": 7}), "rater", "1 to 200"),
        (lines(HH | {"rater": "\ud800"}), "rater", "surrogates"),
        (lines(BARE | {"chosen": "half a \ud83d"}), "chosen", "surrogates"),
        (lines(BARE | {"chosen": "x" * (2 * MAX_LINE_BYTES + 9)}), "line", "longer than"),
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b"".join(line.encode() for line, _, _ in bad) + b'{"chosen": "\xff"}\n\n' + lines(HH).encode())
    result = import_file(path, "hh", stores.log, stores.subjects)
    assert result.added == 1
    for number, ((_, field, part), (line, named, message)) in enumerate(zip(bad, result.errors, strict=False), start=1):
        assert (line, named) == (number, field) and part in message, message
    assert result.errors[len(bad)] == (15, "line", "the line is not UTF-8")
    assert len(result.errors) == 15
    stores.close()


def test_a_file_that_cannot_be_read_and_a_bad_source_are_refused(tmp_path: Path) -> None:
    stores = stores_in(tmp_path / "data", "import")
    with pytest.raises(InvalidInput, match="cannot be read"):
        import_file(tmp_path / "missing.jsonl", "hh", stores.log, stores.subjects)
    with pytest.raises(InvalidInput, match="directory"):
        import_file(tmp_path, "hh", stores.log, stores.subjects)
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    with pytest.raises(InvalidInput, match="no lines"):
        import_file(empty, "hh", stores.log, stores.subjects)
    with pytest.raises(InvalidInput, match="source"):
        import_file(empty, "a/b", stores.log, stores.subjects)
    stores.close()


def test_of_a_file_that_breaks_off_the_lines_before_are_kept(tmp_path: Path) -> None:
    stores = stores_in(tmp_path / "data", "import")
    torn = tmp_path / "torn.jsonl.gz"
    whole = lines({"prompt": "Hi"}, *(BARE | {"prompt": str(n)} for n in range(300))).encode()
    torn.write_bytes(gzip.compress(whole)[:-8])  # less its trailer
    result = import_file(torn, "hh", stores.log, stores.subjects)
    assert result.added == 300
    assert [(line, field) for line, field, _ in result.errors] == [(1, "chosen"), (302, "file")]
    assert "cannot be read" in result.errors[1][2]
    stores.close()
