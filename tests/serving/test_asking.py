"""`plaudit adapters` and `rollouts`: the same words and the same deeds over a gateway and on the registry's database itself."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ops_world import MakeAdapter, Two, two_gateways
from typer.testing import CliRunner, Result

import plaudit
from deploy import address
from feedback.errors import (
    ConfigError,
    Conflict,
    GatewayUnavailable,
    InvalidInput,
    NotAllowed,
    NotAuthenticated,
    NotFound,
    PlauditError,
    PromotionRefused,
)

Run = Callable[..., Result]
WAYS = ("a gateway that is named", "the gateway that runs here", "the database itself")


@pytest.fixture
def two(tmp_path: Path, tiny_policy: Path, make_adapter: MakeAdapter) -> Iterator[Two]:
    made = [make_adapter(tiny_policy, tmp_path / "store", seed) for seed in (0, 1, 2, 3)]
    with two_gateways(tmp_path, f"sqlite:///{tmp_path / 'registry.sqlite'}", made) as running:
        yield running


@pytest.fixture
def toml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("PLAUDIT_KEY", raising=False)
    monkeypatch.setenv("COLUMNS", "250")
    path = tmp_path / "plaudit.toml"
    sections: dict[str, dict[str, object]] = {
        "feedback": {"data_dir": tmp_path / "data0"},
        "registry": {"url": f"sqlite:///{tmp_path / 'registry.sqlite'}"},
        "deploy": {"store": tmp_path / "store"},
    }
    path.write_text(
        "\n".join(f"[{name}]\n" + "".join(f'{key} = "{value}"\n' for key, value in keys.items()) for name, keys in sections.items())
    )
    return path


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def run(two: Two, toml: Path, tmp_path: Path, way: str) -> Iterator[Run]:
    """Runs a command over the way of the test, which says on standard error where it is the database."""
    host, _, port = two.gateways[0].url.removeprefix("http://").rpartition(":")

    def run(*words: str, key: str = "") -> Result:
        url = ["--url", two.gateways[1].url] if way == WAYS[0] else []
        done = CliRunner().invoke(plaudit.app, [*words, *url, "--config", str(toml), *(["--key", key] if key else [])])
        remarks = [f"plaudit: no gateway runs on {tmp_path / 'data0'}; the registry's database is asked itself"] if way == WAYS[2] else []
        assert done.stderr.splitlines() in (remarks, []) and (done.exception or done.stderr.splitlines() == remarks)
        return done

    if way == WAYS[1]:
        with address.announcing(tmp_path / "data0", host, int(port)):
            yield run
    else:
        yield run


def refusal(done: Result) -> tuple[type[BaseException], str, str | None]:
    error = done.exception
    assert isinstance(error, PlauditError), done.output
    return type(error), error.message, error.field


def test_an_operators_day(run: Run, two: Two, tmp_path: Path) -> None:
    mara, (stable, better) = two.secrets["mara"], two.adapters[:2]
    rollout = two.awaiting()
    listed = run("adapters", "list", key=mara).stdout
    assert better[:16] in listed and "candidate" in listed
    assert rollout in run("rollouts", "list", key=mara).stdout
    verdicts = json.loads(run("rollouts", "show", rollout, key=mara).stdout)["verdicts"]
    assert verdicts == [{"name": "wins", "verdict": "pass", "reason": "8 of 8"}]
    assert run("rollouts", "approve", rollout, key=mara).stdout == f"{better[:16]} is stable: approved by mara\n"
    assert json.loads(run("adapters", "show", better[:12], key=mara).stdout)["rollouts"][0]["approved_by"] == "mara"
    back = run("adapters", "rollback", "--reason", "too long", "--expect", better[:16], key=two.secrets["omar"])
    assert back.stdout == f"{stable[:16]} is stable again\n"
    late = run("adapters", "rollback", "--reason", "too long", "--expect", better[:16], key=mara)
    assert refusal(late)[:2] == (Conflict, f"rollback: stable is {stable}, expected was {better}: somebody else was first")
    aliases = json.loads(run("adapters", "aliases", "-n", "1", key=mara).stdout)
    assert aliases["previous"] == better and [move["reason"] for move in aliases["history"]] == ["too long"]
    two.awaiting(2)
    assert run("adapters", "promote", two.adapters[2], key=mara).exit_code == 0
    # Without `--expect` it takes back what is stable as the command looks.
    assert run("adapters", "rollback", "--reason", "worse", key=mara).exit_code == 0
    writer = two.key("loader", "adapters:write")
    done = run("adapters", "register", str(tmp_path / "store" / two.adapters[3]), key=writer)
    assert done.stdout == f"{two.adapters[3][:16]} is 'candidate': registered by loader\n"
    stopped = two.at_canary(3)
    assert run("adapters", "stop", "--reason", "enough", key=mara).stdout == "stopped by mara: enough\n"
    assert two.gateways[0].registry.rollout(stopped).state == "stopped"
    override = run(
        "adapters", "override", two.adapters[3], "length", "--reason", "wanted", key=two.key("eva", "gates:override", person=True)
    )
    assert override.stdout == f"length is overridden for {two.adapters[3][:16]}, which is 'refused'\n"


def test_every_refusal_has_the_same_words(run: Run, two: Two) -> None:
    rollout, adapter = two.awaiting(), two.adapters[1]
    mara, robot = two.secrets["mara"], two.key("ci", "adapters:promote")
    chat = two.key("app", "chat")
    ci, app = two.gateways[0].stores.api_keys.list()[-2:]
    needed = "an API key with the scope 'adapters:promote' is needed: give it with --key or in PLAUDIT_KEY"
    no_person = f"approval: key {ci.id} of 'ci' names no person; make one with plaudit keys create --person"
    no_scope = f"key {app.id} has scopes chat; this needs"
    cases: list[tuple[tuple[str, ...], str, type[PlauditError], str]] = [
        (("rollouts", "approve", rollout), "", NotAuthenticated, needed),
        (("rollouts", "approve", rollout), chat, NotAllowed, f"{no_scope} 'adapters:promote'"),
        (("adapters", "list"), chat, NotAllowed, f"{no_scope} 'adapters:read'"),
        (("rollouts", "approve", rollout), f"pl_{'A' * 12}_{'B' * 32}", NotAuthenticated, "the API key is not known"),
        (("rollouts", "approve", rollout), robot, PromotionRefused, no_person),
        (("adapters", "promote", adapter), robot, PromotionRefused, no_person),
        (("rollouts", "show", "nothing"), mara, NotFound, "rollout: there is none with id 'nothing'"),
        (("adapters", "show", "[/b] ?"), mara, NotFound, "adapter: there is none with id '[/b] ?'; `plaudit adapters list` shows them"),
        (("adapters", "show", ""), mara, InvalidInput, "adapter: is empty, it must be an id"),
        (("rollouts", "show", "a" * 17), mara, InvalidInput, 'rollout: String should have at most 16 characters, got "aaa'),
        (("rollouts", "stop", "nothing", "--reason", "x"), mara, NotFound, "rollout: there is none with id 'nothing'"),
        (("adapters", "override", adapter, "mood", "--reason", "x"), mara, NotAllowed, "this needs 'gates:override'"),
        (
            ("adapters", "rollback", "--reason", "x"),
            mara,
            NotFound,
            "rollback: the alias 'previous' points at nothing; nothing was promoted yet",
        ),
        (
            ("adapters", "rollback", "--reason", "a\nb"),
            mara,
            InvalidInput,
            "reason: holds line breaks or characters that cannot be printed",
        ),
    ]
    for words, key, kind, told in cases:
        found = refusal(run(*words, key=key))
        assert found[0] is kind and told in found[1], (words, found)
    assert two.gateways[0].registry.rollout(rollout).state == "awaiting"


def plain(toml: Path, *words: str) -> Result:
    return CliRunner().invoke(plaudit.app, [*words, "--config", str(toml)])


@pytest.fixture
def silent() -> Iterator[int]:
    """A port that takes connections and never says anything, as a stopped process does."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def test_a_gateway_that_stands_still_hinders_nobody(
    two: Two, toml: Path, tmp_path: Path, silent: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    two.awaiting()
    two.gateways[0].registry.promote(two.gateways[0].registry.rollouts()[-1].id, "mara")
    monkeypatch.setenv("PLAUDIT__OPERATOR__TIMEOUT_S", "0.2")
    with address.announcing(tmp_path / "data0", "0.0.0.0", silent):
        done = plain(toml, "adapters", "rollback", "--reason", "now", "--key", two.secrets["mara"])
    told = (
        f"plaudit: the gateway at http://127.0.0.1:{silent} does not answer: nothing within 0.2 s; the registry's database is asked itself"
    )
    assert done.exit_code == 0 and done.stderr.splitlines() == [told]
    assert two.gateways[1].registry.alias("stable") == two.adapters[0]


def test_a_gateway_that_was_named_is_the_only_one_asked(two: Two, toml: Path, silent: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLAUDIT__OPERATOR__TIMEOUT_S", "0.2")
    monkeypatch.setenv("PLAUDIT__OPERATOR__URL", f"http://127.0.0.1:{silent}/")
    refused = refusal(plain(toml, "adapters", "list", "--key", two.secrets["mara"]))
    assert refused[0] is GatewayUnavailable and refused[2] == "operator.url"
    assert refusal(plain(toml, "adapters", "list"))[0] is NotAuthenticated
    monkeypatch.setenv("PLAUDIT__OPERATOR__URL", f"{two.gateways[0].url}/elsewhere")
    foreign = refusal(plain(toml, "adapters", "list", "--key", two.secrets["mara"]))
    assert "answered 404, which is none of its replies" in foreign[1]
    monkeypatch.setenv("PLAUDIT__OPERATOR__URL", "http://ops.example")
    far = refusal(plain(toml, "adapters", "list"))
    assert far[:2] == (ConfigError, "setting operator.url: is plain http to ops.example, where others could read it; use https")
    monkeypatch.delenv("PLAUDIT__OPERATOR__URL")
    assert refusal(plain(toml, "adapters", "list", "--url", "http://ops.example"))[0] is InvalidInput


def test_without_a_key_the_database_is_read_and_nothing_changed(two: Two, toml: Path, tmp_path: Path, silent: int) -> None:
    with address.announcing(tmp_path / "data0", "127.0.0.1", silent):
        done = plain(toml, "rollouts", "list")
        assert done.exit_code == 0 and done.stderr == "plaudit: no API key was given; the registry's database is asked itself\n"
        assert refusal(plain(toml, "adapters", "stop", "--reason", "x"))[0] is NotAuthenticated
    assert address.announced(tmp_path / "data0") is None, "the one that was there is gone, whoever has its port now"


def test_an_address_that_anybody_could_have_written_gets_no_key(tmp_path: Path) -> None:
    with address.announcing(tmp_path, "127.0.0.1", 1):
        assert address.announced(tmp_path) == "http://127.0.0.1:1"
        for path in (tmp_path / address.FILE, tmp_path):
            before = path.stat().st_mode
            path.chmod(before | 0o002)
            assert address.announced(tmp_path) is None
            path.chmod(before)
        (tmp_path / address.FILE).rename(tmp_path / "elsewhere")
        (tmp_path / address.FILE).symlink_to(tmp_path / "elsewhere")
        assert address.announced(tmp_path) is None


def test_a_card_is_written_and_compared_whichever_way_it_came(run: Run, two: Two, tmp_path: Path) -> None:
    written = run("adapters", "card", two.adapters[1][:12], "--out", str(tmp_path / "card"), key=two.secrets["mara"])
    assert written.exit_code == 0, written.output
    assert two.adapters[1][:16] in (tmp_path / "card" / "card.html").read_text() and (tmp_path / "card" / "README.md").exists()
    compared = run("adapters", "diff", two.adapters[1][:12], two.adapters[2][:12], key=two.secrets["mara"])
    assert compared.exit_code == 0 and all(each[:16] in compared.stdout for each in two.adapters[1:3])
    assert isinstance(run("adapters", "card", "ffff", key=two.secrets["mara"]).exception, NotFound)
