"""`plaudit keys` and `plaudit audit`: who may run them, what they print, and that each leaves one record."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import text
from typer.testing import CliRunner, Result

import plaudit
from feedback import audit
from feedback.config import FeedbackSettings, Settings
from feedback.errors import Conflict, InvalidInput, NotAllowed, NotAuthenticated, NotDurable, PlauditError
from feedback.keys import SCOPES
from feedback.stores import Stores, open_stores

Run = Callable[..., Result]


@pytest.fixture
def stores(tmp_path: Path) -> Iterator[Stores]:
    (tmp_path / "plaudit.toml").write_text(f'[feedback]\ndata_dir = "{tmp_path / "data"}"\n')
    stores = open_stores(Settings(feedback=FeedbackSettings(data_dir=tmp_path / "data")))
    yield stores
    stores.close()


@pytest.fixture
def run(stores: Stores, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.delenv("PLAUDIT_KEY", raising=False)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*words: str, key: str | None = None) -> Result:
        given = ["--key", key] if key else []
        return CliRunner().invoke(plaudit.app, [*words, *given, "--config", str(tmp_path / "plaudit.toml")])

    return run


def secret_in(printed: str) -> str:
    return printed.strip().rpartition(" ")[2]


def actions(stores: Stores) -> list[tuple[str, str]]:
    return [(row["actor"], row["action"]) for row in audit.read(stores.engine)]


def test_before_the_first_start_there_is_no_key_to_use(run: Run, stores: Stores) -> None:
    for words in (("keys", "create", "--owner", "app", "--scopes", "chat"), ("keys", "list"), ("audit", "verify")):
        error = run(*words).exception
        assert isinstance(error, NotAuthenticated) and "plaudit up" in error.message
    plaudit._first_key(stores)
    plaudit._first_key(stores)
    (admin,) = stores.api_keys.list()
    assert admin.scopes == SCOPES and actions(stores) == [("first start", "key.created")]
    missing = run("keys", "list").exception
    assert isinstance(missing, NotAuthenticated) and "PLAUDIT_KEY" in missing.message


def test_nobody_is_locked_out(run: Run, stores: Stores, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(plaudit, "say", full)
    with pytest.raises(NotDurable, match="could not be shown on standard output"):
        plaudit._first_key(stores)
    assert stores.api_keys.list() == [] and actions(stores) == []
    monkeypatch.undo()
    plaudit._first_key(stores)
    admin = secret_in(capsys.readouterr().out)
    assert run("keys", "disable", admin[3:15], "--reason", "leaked", key=admin).exit_code == 0
    stores.api_keys.create("old", ("keys",), expires_ms=1)
    stores.api_keys.create("app", ("chat",))
    plaudit._first_key(stores)
    plaudit._first_key(stores)
    said = capsys.readouterr().out
    assert said.count("pl_") == 1 and "'keys' is left" in said and run("keys", "list", key=secret_in(said)).exit_code == 0


def test_keys_are_made_listed_and_disabled_by_who_may(run: Run, stores: Stores) -> None:
    _, admin = stores.api_keys.create("Ada", ("keys",), by="first start")
    made = run(
        "keys",
        "create",
        "--owner",
        "app",
        "--scopes",
        "chat, feedback, chat",
        "--expires-days",
        "7",
        "--origins",
        "https://a.example",
        key=admin,
    )
    key = stores.api_keys.check(secret_in(made.output))
    assert (key.owner, key.scopes, key.origins) == ("app", ("chat", "feedback"), ("https://a.example",))
    assert key.expires_ms is not None and key.expires_ms - key.created_ms == pytest.approx(7 * 86_400_000, abs=1000)
    listed = [json.loads(line) for line in run("keys", "list", "--json", key=admin).output.splitlines()]
    assert [each["owner"] for each in listed] == ["Ada", "app"] and secret_in(made.output)[16:] not in json.dumps(listed)
    assert "valid" in run("keys", "list", key=admin).output
    refused = run("keys", "create", "--owner", "x", "--scopes", "chat", key=secret_in(made.output)).exception
    assert isinstance(refused, NotAllowed) and "'keys'" in refused.message
    assert run("keys", "disable", key.id, "--reason", "leaked", key=admin).exit_code == 0
    with pytest.raises(NotAuthenticated, match="disabled"):
        open_keys = type(stores.api_keys)(stores.engine)  # this process's own would know within two seconds
        open_keys.check(secret_in(made.output))
    assert isinstance(run("keys", "disable", key.id, "--reason", "again", key=admin).exception, Conflict)
    assert isinstance(run("keys", "create", "--owner", "x", "--scopes", "root", key=admin).exception, InvalidInput)
    assert run("keys", "create", "--owner", "x", "--scopes", "chat", "--expires-days", "0", key=admin).exit_code == 2
    assert actions(stores) == [("first start", "key.created"), ("Ada", "key.created"), ("Ada", "key.disabled")]


@pytest.mark.parametrize(
    ("words", "field"),
    [
        (("keys", "create", "--owner", "a\udcffb", "--scopes", "chat"), "owner"),  # a byte of the command line that is no UTF-8
        (("keys", "create", "--owner", "a\x1b[31m", "--scopes", "chat"), "owner"),
        (("keys", "create", "--owner", "a", "--scopes", "chat", "--origins", "https://app.example:443"), "origins"),
        (("keys", "disable", "a\udcffb", "--reason", "x"), "id"),
        (("keys", "disable", "nobody", "--reason", "a\udcffb"), "reason"),
        (("keys", "disable", "nobody", "--reason", " "), "reason"),
        (("feedback", "erase", "anna", "--reason", "x" * 501), "reason"),
        (("adapters", "rollback", "--reason", "two\nlines"), "reason"),
    ],
)
def test_what_cannot_stand_in_one_line_is_refused_by_name(run: Run, stores: Stores, words: tuple[str, ...], field: str) -> None:
    _, admin = stores.api_keys.create("Ada", SCOPES, by="first start")
    refused = run(*words, key=admin).exception
    assert isinstance(refused, PlauditError) and refused.field == field
    assert field in refused.message or field == "id"
    assert actions(stores) == [("first start", "key.created")]


def test_rotation_is_recorded_and_followed(run: Run, stores: Stores) -> None:
    _, admin = stores.api_keys.create("Ada", ("keys",), by="first start")
    path = stores.settings.feedback.data_dir / "keys" / "token.keys"
    before = path.read_bytes().split()
    assert run("keys", "rotate-tokens", key=admin).exit_code == 0
    assert path.read_bytes().split()[1:] == before
    assert actions(stores)[-1] == ("Ada", "token_keys.rotated")


def test_the_audit_is_listed_and_verified(run: Run, stores: Stores) -> None:
    _, auditor = stores.api_keys.create("Mara", ("audit",), by="first start")
    stores.api_keys.create("app", ("chat",), by="Mara")
    whole = run("audit", "verify", key=auditor)
    head, _ = audit.verify(stores.engine)
    assert whole.exit_code == 0 and "2 records" in whole.output and head.digest in whole.output
    rows = [json.loads(line) for line in run("audit", "list", "--json", key=auditor).output.splitlines()]
    assert [(row["id"], row["actor"]) for row in rows] == [(1, "first start"), (2, "Mara")]
    assert "Mara" in run("audit", "list", key=auditor).output
    with stores.engine.begin() as db:
        db.execute(text("UPDATE audit SET actor = 'nobody' WHERE id = 2"))
    broken = run("audit", "verify", key=auditor)
    assert broken.exit_code == 1 and "record 2 is bad" in broken.output + broken.stderr
    _, other = stores.api_keys.create("app", ("chat",))
    assert isinstance(run("audit", "list", key=other).exception, NotAllowed)
