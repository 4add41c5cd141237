"""The whole service through a real Kafka, and the commands around it, as processes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest
from test_commands import SETTINGS, run, start
from waiting import until

from deploy import broker
from deploy.broker import Broker
from feedback.archive import Archive
from feedback.config import KafkaSettings
from feedback.kafka_topic import Topic, connected, library

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings(r"ignore:\w+ is deprecated. Use files:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning"),
    pytest.mark.usefixtures("sockets_collected"),
]


def said_by(process: subprocess.Popen[str], what: str) -> str:
    """The line that holds this; everything it printed before is skipped."""
    assert process.stdout is not None
    for line in process.stdout:
        if what in line:
            return line
    raise AssertionError(process.stderr and process.stderr.read())


@contextmanager
def up(folder: Path) -> Iterator[tuple[str, str]]:
    """Address and the admin's key."""
    process = start(folder, "up")
    try:
        said_by(process, "shown this once")
        assert process.stdout is not None
        key = process.stdout.readline().strip()
        yield said_by(process, "answers at").split()[3], key
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=20)[1] == ""
        assert process.returncode == 130
    finally:
        process.kill()
        process.communicate()


def configured(folder: Path, policy: Path, kafka: Broker, topic: str) -> None:
    (folder / "plaudit.toml").write_text(
        SETTINGS.format(policy=policy, port=0)
        + f'[feedback]\nack = "broker"\nack_timeout_s = 20\n[kafka]\nbootstrap = "{kafka.bootstrap}"\ntopic = "{topic}"\n'
        f'group = "{topic}"\nsession_timeout_s = 2\n'
    )


def test_what_is_said_goes_through_kafka_and_counts(kafka: Broker, tmp_path: Path, tiny_policy: Path) -> None:
    configured(tmp_path, tiny_policy, kafka, "service")
    with up(tmp_path) as (url, key):
        body = {"model": "plaudit", "messages": [{"role": "user", "content": "hello"}]}
        reply = httpx2.post(f"{url}/v1/chat/completions", json=body, headers={"Authorization": f"Bearer {key}"}, timeout=30)
        token = {"Authorization": f"Feedback {reply.headers['plaudit-feedback-token']}"}
        given = httpx2.post(f"{url}/v1/feedback", json={"kind": "rating", "value": "up"}, headers=token, timeout=30)
        assert (given.status_code, given.json()["durable"]) == (200, "broker")
        archive = Archive(tmp_path / "data/archive.sqlite")
        until(lambda: archive.counts().get("held:rating") == 1)
        archive.close()
        measured = httpx2.get(f"{url}/metrics", headers={"Authorization": f"Bearer {key}"}).text
        assert "plaudit_relay_pending 0.0" in measured and "plaudit_dead_letters 0.0" in measured
    assert run(tmp_path, "feedback", "dead-letters")[0] == 0
    # Everything again, by the two processes alone, into an archive that was lost.
    for file in (tmp_path / "data").glob("archive.sqlite*"):
        file.unlink()
    code, printed, errors = run(tmp_path, "relay", "--once")
    assert (code, errors) == (0, "") and "0 dead letters" in printed
    code, printed, errors = run(tmp_path, "archive", "--once")
    assert (code, errors) == (0, "") and "new events" in printed and int(printed.splitlines()[-1].split()[0]) >= 3
    stats = json.loads(run(tmp_path, "feedback", "stats")[1])
    assert stats["held"] == {"rating": {"up": 1}} and (stats["unsent"], stats["dead_letters"]) == (0, 0)


def test_a_compacted_topic_is_refused_at_the_start(kafka: Broker, tmp_path: Path, tiny_policy: Path) -> None:
    configured(tmp_path, tiny_policy, kafka, "compacted")
    admin = connected(library().KafkaAdminClient, KafkaSettings(bootstrap=kafka.bootstrap))
    admin.create_topics({"compacted": {"num_partitions": 1, "configs": {"cleanup.policy": "compact"}}}, wait_for_metadata=True)
    admin.close()
    for words in (("up",), ("relay",), ("archive",)):
        code, _, errors = run(tmp_path, *words)
        assert code == 2 and "cleanup.policy is compact, it must be delete" in errors and len(errors.splitlines()) == 1


def test_kafka_up_keeps_its_port_and_its_data(kafka: Broker, tmp_path: Path) -> None:
    """The fixture says whether a broker can run here; this one is the command's own. The second start is killed and leaves it behind."""
    bootstraps = []
    for turn in range(3):
        process = start(tmp_path, "kafka", "up")
        try:
            bootstraps.append(said_by(process, "kafka.bootstrap").split('"')[1])
            settings = KafkaSettings(bootstrap=bootstraps[-1], topic="kept", partitions=1)
            admin = connected(library().KafkaAdminClient, settings)
            assert ("kept" in admin.list_topics()) == (turn > 0)
            admin.close()
            topic = Topic(settings)
            topic.check()
            topic.close()
            process.send_signal(signal.SIGKILL if turn == 1 else signal.SIGINT)
            errors = process.communicate(timeout=40)[1]
            assert (process.returncode, errors) == (-signal.SIGKILL if turn == 1 else 130, "")
            assert (tmp_path / "data/kafka/kafka.pid").exists() == (turn == 1)
        finally:
            process.kill()
            process.communicate()
    assert len(set(bootstraps)) == 1
    code, _, errors = run(tmp_path, "kafka", "up", "--port", str(kafka.port))
    assert code == 2 and f"port {kafka.port} of 127.0.0.1 is taken" in errors


def test_without_java_and_maven_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert broker.missing() == "java and mvn not found; install a Java 17 runtime and Maven"
    code, _, errors = run(tmp_path, "kafka", "up")
    assert code == 2 and errors.startswith("plaudit: Kafka cannot run here: java and mvn not found") and len(errors.splitlines()) == 1
    tests = tmp_path / "test_it.py"
    tests.write_text("def test_it(kafka):\n    pass\n")
    root = Path(__file__).parents[2]
    monkeypatch.setenv("PYTHONPATH", str(root / "tests"))  # beside its conftest lies what that imports
    for ci, outcome in (("", "1 skipped"), ("true", "1 error")):
        monkeypatch.setenv("CI", ci)
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(root), "--confcutdir", str(root)]
        done = subprocess.run(
            [*command, "-c", str(root / "pyproject.toml"), "-p", "tests.conftest", str(tests)],
            cwd=root,
            capture_output=True,
            text=True,
            check=False,
        )
        assert outcome in done.stdout, done.stdout + done.stderr
