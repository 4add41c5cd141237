"""`plaudit feedback export, schema, stats, tail` and `plaudit backup, restore`: who may run them and what they print."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import plaudit
from feedback import audit
from feedback.config import FeedbackSettings, Settings
from feedback.errors import Conflict, InvalidInput, NotAllowed, NotAuthenticated, TrainingRefused
from feedback.stores import Stores, open_stores

PAIRS = [
    {"chosen": f"\n\nHuman: {n} onions?\n\nAssistant: Thin.", "rejected": f"\n\nHuman: {n} onions?\n\nAssistant: No.", "rater": rater}
    for n, rater in enumerate(("ann", "ann", "ben"))
]


def stores_in(folder: Path) -> Stores:
    return open_stores(Settings(feedback=FeedbackSettings(data_dir=folder / "data")), "tests")


@pytest.fixture
def stores(tmp_path: Path) -> Iterator[Stores]:
    stores = stores_in(tmp_path)
    yield stores
    stores.close()


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    monkeypatch.delenv("PLAUDIT_KEY", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plaudit.toml").write_text(f'[feedback]\ndata_dir = "{tmp_path / "data"}"\n')
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))

    def run(*words: str, key: str | None = None) -> Result:
        return CliRunner().invoke(plaudit.app, [*words, *(["--key", key] if key else [])])

    assert run("feedback", "import", "pairs.jsonl", "--source", "hh").exit_code == 0
    return run


def objects(result: Result) -> list[Any]:
    assert result.exit_code == 0, result.exception
    return [json.loads(line) for line in result.output.splitlines()]


def test_an_export_needs_the_scope_dataset_and_obeys_its_filters(run: Callable[..., Result], stores: Stores, tmp_path: Path) -> None:
    _, chat = stores.api_keys.create("app", ("chat",))
    _, ada = stores.api_keys.create("ada", ("dataset",))
    assert isinstance(run("feedback", "export", "--out", "o.jsonl").exception, NotAuthenticated)
    assert isinstance(run("feedback", "export", "--out", "o.jsonl", key=chat).exception, NotAllowed)
    assert not (tmp_path / "o.jsonl").exists()
    told = run("feedback", "export", "--out", "o.jsonl", key=ada)
    digest = told.output.split()[-1]
    assert told.exit_code == 0 and told.output.startswith("3 lines in o.jsonl (preference), from 3 opinions; snapshot ")
    assert (tmp_path / "data" / "snapshots" / digest).is_dir()
    exported = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert sorted(each["prompt"][0]["content"] for each in exported) == ["0 onions?", "1 onions?", "2 onions?"]
    for words, error in (
        (("--source", "person"), TrainingRefused),
        (("--cohort", "cooks"), TrainingRefused),
        (("--since", "2999-01-01"), TrainingRefused),
        (("--until", "2001-01-01T00:00:00"), TrainingRefused),
        (("--source", "robots"), InvalidInput),
        (("--form", "unpaired"), InvalidInput),
    ):
        assert isinstance(run("feedback", "export", "--out", "n.jsonl", *words, key=ada).exception, error)
    every = ("--source", "import", "--cohort", "import:hh", "--since", "2001-01-01", "--form", "jsonl")
    assert run("feedback", "export", "--out", "n.jsonl", *every, key=ada).exit_code == 0
    made = [(row["actor"], row["action"], row["subject"]) for row in audit.read(stores.engine) if row["action"] == "feedback.exported"]
    assert made[0] == ("ada", "feedback.exported", digest) and len(made) == 2


def test_figures_lines_and_the_schema_are_json_in_a_pipe(run: Callable[..., Result], stores: Stores) -> None:
    (figures,) = objects(run("feedback", "stats"))
    assert figures["events"] == {"interaction.started": 6, "interaction.finished": 6, "feedback.given": 3} and figures["raters"] == 2
    assert [event["type"] for event in objects(run("feedback", "tail", "-n", "2"))] == ["interaction.finished", "feedback.given"]
    assert len(objects(run("feedback", "tail", "--type", "feedback.given"))) == 3
    assert json.loads(run("feedback", "schema").output)["oneOf"]
    assert isinstance(run("feedback", "tail", "--type", "feedback.sung").exception, InvalidInput)


def test_texts_are_shown_with_the_scope_dataset_only(run: Callable[..., Result], stores: Stores) -> None:
    _, ada = stores.api_keys.create("ada", ("dataset",))
    sealed = run("feedback", "tail", "-n", "100")
    assert "onions" not in sealed.output and len(objects(sealed)) == 15
    assert isinstance(run("feedback", "tail", "--open").exception, NotAuthenticated)
    opened = objects(run("feedback", "tail", "-n", "100", "--open", key=ada))
    assert next(each["text"]["messages"][0]["content"] for each in opened if each["type"] == "interaction.started") == "0 onions?"


def test_an_erasure_names_exports_and_a_restore_makes_it_again(run: Callable[..., Result], tmp_path: Path) -> None:
    stores = stores_in(tmp_path)
    _, ada = stores.api_keys.create("ada", ("dataset", "erase", "keys"))
    assert run("feedback", "export", "--out", "o.jsonl", key=ada).exit_code == 0
    assert run("backup", "copy", key=ada).exit_code == 0
    told = run("feedback", "erase", "import:hh/ann", "--reason", "asked", key=ada)
    assert told.exit_code == 0 and f"export {tmp_path / 'o.jsonl'}: delete it" in told.output
    assert isinstance(run("restore", "copy", "--replace", key=ada).exception, Conflict)  # this test's own stores are open
    stores.close()
    again = run("restore", "copy", "--replace", key=ada)
    assert again.exit_code == 0 and "1 erasures made again" in again.output
    stores = stores_in(tmp_path)
    (figures,) = objects(run("feedback", "stats"))
    assert (figures["raters"], figures["held"]["choice"]) == (1, dict.fromkeys(figures["held"]["choice"], 1))
    assert [row["action"] for row in audit.read(stores.engine)][-1] == "backup.restored" and audit.verify(stores.engine)[1] is None
    stores.close()
