"""Settings: TOML and environment, and errors that name the key."""

from __future__ import annotations

from pathlib import Path

import pytest

from feedback.config import Settings, load
from feedback.errors import ConfigError
from feedback.stores import open_stores


def test_the_file_is_read_and_the_environment_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plaudit.toml"
    path.write_text('[feedback]\ntoken_expiry_s = 600\ntenant = "acme"\n[kafka]\ntopic = "t"\n')
    monkeypatch.setenv("PLAUDIT__FEEDBACK__TOKEN_EXPIRY_S", "700")
    settings = load(Settings, path)
    assert (settings.feedback.token_expiry_s, settings.feedback.tenant, settings.kafka.topic) == (700, "acme", "t")
    assert settings.registry.resolved(Path("/d")) == "sqlite:////d/registry.sqlite"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[feedback]\ntoken_expires = 600\n", r"feedback\.token_expires.*not known"),
        ("[feedback]\ntoken_expiry_s = 5\n", r"feedback\.token_expiry_s.*60.*got 5"),
        ("[kitchen]\nsink = 1\n", r"kitchen.*not known"),
        ("[feedback]\nunrated_expiry_days = 1\n", r"token_expiry_s is 604800, more than the 1 days of unrated_expiry_days"),
        ("[feedback\n", "not TOML"),
    ],
)
def test_a_wrong_file_is_refused_by_key(tmp_path: Path, text: str, named: str) -> None:
    path = tmp_path / "plaudit.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=named):
        load(Settings, path)


def test_a_missing_file_and_an_unknown_variable_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load(Settings, tmp_path / "none.toml")
    monkeypatch.setenv("PLAUDIT__KITCHEN__SINK", "1")
    with pytest.raises(ConfigError, match="kitchen"):
        load(Settings)


def test_a_list_in_the_environment_is_json_and_names_may_be_lower_case(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("plaudit__feedback__tenant", "acme")
    assert load(Settings).feedback.tenant == "acme"
    monkeypatch.setenv("PLAUDIT__KAFKA", '{"sasl_password": "hunter2"')
    with pytest.raises(ConfigError, match="PLAUDIT__KAFKA must be JSON") as caught:
        load(Settings)
    assert "hunter2" not in str(caught.value)


def test_passwords_are_never_shown(tmp_path: Path) -> None:
    path = tmp_path / "plaudit.toml"
    path.write_text(
        '[kafka]\nsasl_password = "hunter2"\nsasl_username = "ann"\nsasl_mechanism = "PLAIN"\nsecurity_protocol = "SASL_SSL"\n'
        '[registry]\nurl = "postgresql://ann:hunter2@db/plaudit"\n'
    )
    settings = load(Settings, path)
    assert "hunter2" not in repr(settings) and "hunter2" not in settings.model_dump_json()
    assert settings.registry.resolved(tmp_path) == "postgresql://ann:hunter2@db/plaudit"
    path.write_text('[kafka]\nsasl_password = ["hunter2"]\n')
    with pytest.raises(ConfigError) as caught:
        load(Settings, path)
    assert "hunter2" not in str(caught.value)


def test_waiting_for_a_broker_that_is_not_set_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "plaudit.toml"
    path.write_text(f'[feedback]\nack = "broker"\ndata_dir = "{tmp_path}"\n')
    with pytest.raises(ConfigError, match=r"kafka\.bootstrap"):
        open_stores(load(Settings, path))
