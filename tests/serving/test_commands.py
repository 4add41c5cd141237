"""The command line as a process: how it ends, what it refuses, what it prints."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import pytest

from feedback.config import FeedbackSettings, Settings
from feedback.stores import open_stores

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = """
[policy]
base = "{policy}"
[engine]
kind = "scripted"
[server]
port = {port}
"""
pytestmark = pytest.mark.slow

Up = Callable[[int], tuple[subprocess.Popen[str], str, str]]
"""(port) -> process, address, the admin's key; empty where it is not the first start."""


def start(folder: Path, *words: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    # A shell's background job ignores SIGINT, and so would its children.
    ctrl_c = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731
    return subprocess.Popen(
        [sys.executable, "-m", "plaudit", *words],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=ctrl_c,
    )


def run(folder: Path, *words: str) -> tuple[int, str, str]:
    """Exit status, what it printed, and its errors."""
    with start(folder, *words) as process:
        printed, errors = process.communicate(timeout=60)
    return process.returncode, printed, errors


@pytest.fixture
def up(tmp_path: Path, tiny_policy: Path) -> Iterator[Up]:
    running: list[subprocess.Popen[str]] = []

    def begin(port: int) -> tuple[subprocess.Popen[str], str, str]:
        (tmp_path / "plaudit.toml").write_text(SETTINGS.format(policy=tiny_policy, port=port))
        process = start(tmp_path, "up")
        running.append(process)
        key = ""
        assert process.stdout is not None
        for line in process.stdout:
            key = line.strip() if line.strip().startswith("pl_") else key
            if "answers at" in line:
                return process, line.split()[3], key
        raise AssertionError(process.stderr and process.stderr.read())

    yield begin
    for process in running:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_and_a_second_one_changes_nothing(up: Up, number: signal.Signals) -> None:
    process, url, key = up(0)
    body = {"model": "plaudit", "messages": [{"role": "user", "content": "word " * 500}], "max_tokens": 1000, "stream": True}
    with httpx2.stream("POST", f"{url}/v1/chat/completions", json=body, headers={"Authorization": f"Bearer {key}"}) as reply:
        process.send_signal(number)
        process.send_signal(number)
        assert reply.read().endswith(b"data: [DONE]\n\n"), "an answer in flight goes on to its end"
    printed, errors = process.communicate(timeout=20)
    assert (process.returncode, printed, errors) == (128 + number, "", "")


def test_killed_in_mid_stream_it_starts_again_with_what_it_had(up: Up, tmp_path: Path) -> None:
    process, url, key = up(0)
    body = {"model": "plaudit", "messages": [{"role": "user", "content": "word " * 800}], "max_tokens": 1000, "stream": True}
    with httpx2.stream("POST", f"{url}/v1/chat/completions", json=body, headers={"Authorization": f"Bearer {key}"}) as reply:
        token = {"Authorization": f"Feedback {reply.headers['plaudit-feedback-token']}"}
        assert httpx2.post(f"{url}/v1/feedback", json={"kind": "rating", "value": "up"}, headers=token).status_code == 200
        process.kill()
    process.wait()
    _, url, again = up(0)
    assert again == "", "the admin's key is shown once"
    assert httpx2.get(f"{url}/v1/feedback", headers=token).json()["state"]["rating"] == "up"
    assert httpx2.get(f"{url}/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code == 200


def test_a_connection_that_rests_longer_than_clients_keep_theirs_stays_open(up: Up) -> None:
    _, url, _ = up(0)
    with httpx2.Client(limits=httpx2.Limits(keepalive_expiry=60)) as client:
        ports = []
        for pause_s in (0, 6):  # httpx drops its own after 5 s, and uvicorn would as soon
            time.sleep(pause_s)
            stream = client.get(f"{url}/healthz").extensions["network_stream"]
            ports.append(stream.get_extra_info("client_addr"))
    assert ports[0] == ports[1]


def test_a_second_one_is_refused_on_the_folder_and_on_the_port(up: Up, tmp_path: Path) -> None:
    _, url, _ = up(0)
    code, _, errors = run(tmp_path, "up")
    assert code == 1 and "another `plaudit up` runs on it" in errors and len(errors.splitlines()) == 1
    port = int(url.rpartition(":")[2])
    settings = tmp_path / "other.toml"
    text = (tmp_path / "plaudit.toml").read_text().replace("port = 0", f"port = {port}")
    settings.write_text(f'[feedback]\ndata_dir = "other"\n{text}')
    code, _, errors = run(tmp_path, "up", "--config", "other.toml")
    assert code == 2 and f"server.port is {port}" in errors and len(errors.splitlines()) == 1


def test_another_model_on_the_same_folder_is_refused(up: Up, tmp_path: Path, tiny_policy: Path) -> None:
    process, _, _ = up(0)
    process.terminate()
    process.wait(20)
    (tiny_policy / "chat_template.jinja").write_text("another")
    code, _, errors = run(tmp_path, "up")
    assert code == 2 and "belong to another model" in errors and len(errors.splitlines()) == 1


def test_what_looks_like_markup_is_printed_as_it_is(tmp_path: Path) -> None:
    code, printed, errors = run(tmp_path, "adapters", "show", "[/b]")
    assert (code, printed) == (1, "") and errors.splitlines()[-1].startswith("plaudit: adapter: there is none with id '[/b]'")
    stores = open_stores(Settings(feedback=FeedbackSettings(data_dir=tmp_path / "data")), "operator")
    _, admin = stores.api_keys.create("admin", ("keys",))
    stores.close()
    name = f"[red]{'a long name ' * 10}[/red]"
    code, printed, _ = run(tmp_path, "keys", "create", "--owner", name, "--scopes", "chat", "--key", admin)
    assert code == 0 and "[red]a long" in printed and len(printed.splitlines()) == 1


def test_an_operator_reaches_the_gateway_that_runs_here_and_the_registry_where_it_stands_still(
    up: Up, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process, url, key = up(0)
    code, printed, errors = run(tmp_path, "adapters", "list", "--key", key)
    assert (code, errors) == (0, "") and "identity" in printed and "stable" in printed
    process.send_signal(signal.SIGSTOP)
    monkeypatch.setenv("PLAUDIT__OPERATOR__TIMEOUT_S", "0.5")
    code, printed, errors = run(tmp_path, "adapters", "rollback", "--reason", "x", "--key", key)
    assert (code, printed) == (1, "") and errors.splitlines() == [
        f"plaudit: the gateway at {url} does not answer: nothing within 0.5 s; the registry's database is asked itself",
        "plaudit: rollback: the alias 'previous' points at nothing; nothing was promoted yet",
    ]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("nothing",), "plaudit: No such command 'nothing'; see `plaudit --help`"),
        (("feedback", "erase", "ann"), "plaudit: Missing option '--reason'; see `plaudit feedback erase --help`"),
    ],
)
def test_a_wrong_command_line_is_one_line(tmp_path: Path, words: tuple[str, ...], told: str) -> None:
    status, _, complaint = run(tmp_path, *words)
    assert (status, complaint.splitlines()) == (2, [told])


def test_a_person_is_erased_beside_a_running_gateway(up: Up, tmp_path: Path) -> None:
    _, url, key = up(0)
    bearer = {"Authorization": f"Bearer {key}"}
    body = {"model": "plaudit", "messages": [{"role": "user", "content": "hi"}], "user": "ann"}
    token = httpx2.post(f"{url}/v1/chat/completions", json=body, headers=bearer).headers["plaudit-feedback-token"]
    rated = {"json": {"kind": "rating", "value": "up"}, "headers": {"Authorization": f"Feedback {token}"}}
    assert httpx2.post(f"{url}/v1/feedback", **rated).status_code == 200  # type: ignore[arg-type]
    code, printed, _ = run(tmp_path, "feedback", "withdraw", "ann", "--key", key)
    assert code == 0 and "has withdrawn" in printed and "no snapshot, reward model or adapter used anything of theirs" in printed
    code, printed, _ = run(tmp_path, "feedback", "erase", "ann", "--key", key, "--reason", "she asked")
    assert code == 0 and " is erased\n" in printed
    assert httpx2.post(f"{url}/v1/feedback", **rated).status_code == 410  # type: ignore[arg-type]
    code, _, errors = run(tmp_path, "feedback", "erase", "nobody", "--key", key, "--reason", "she asked")
    assert code == 1 and errors.startswith("plaudit: subject: nothing of 'nobody' was ever recorded here")
