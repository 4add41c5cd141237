"""A real Apache Kafka broker on loopback, where java and mvn are there."""

from __future__ import annotations

import base64
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]
LIBS = ROOT / "build" / "kafka" / "libs"


def why_not() -> str | None:
    """Why there can be no broker here."""
    missing = [tool for tool in ("java", "mvn") if shutil.which(tool) is None]
    return f"{' and '.join(missing)} not installed" if missing else None


def fetch() -> None:
    """Download the broker's jars once, about 43 MB."""
    if not (LIBS / ".complete").exists():
        command = ["mvn", "-q", "-B", "-f", str(ROOT / "deploy/kafka/pom.xml"), "dependency:copy-dependencies", f"-DoutputDirectory={LIBS}"]
        subprocess.run(command, check=True, capture_output=True, timeout=240)
        (LIBS / ".complete").touch()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Broker:
    """One node that is broker and controller. `stop` and `start` keep its data and port."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port, controller = folder, free_port(), free_port()
        self.bootstrap = f"127.0.0.1:{self.port}"
        self._properties = folder / "server.properties"
        self._process: subprocess.Popen[bytes] | None = None
        self._properties.write_text(
            f"process.roles=broker,controller\nnode.id=1\ncontroller.quorum.voters=1@127.0.0.1:{controller}\n"
            f"listeners=PLAINTEXT://127.0.0.1:{self.port},CONTROLLER://127.0.0.1:{controller}\n"
            f"advertised.listeners=PLAINTEXT://{self.bootstrap}\ncontroller.listener.names=CONTROLLER\n"
            "listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT\n"
            f"log.dirs={folder / 'data'}\nnum.partitions=3\noffsets.topic.replication.factor=1\n"
            "transaction.state.log.replication.factor=1\ntransaction.state.log.min.isr=1\n"
            "share.coordinator.state.topic.replication.factor=1\ngroup.initial.rebalance.delay.ms=0\n"
        )
        cluster = base64.urlsafe_b64encode(os.urandom(16)).decode().rstrip("=")
        self._java("kafka.tools.StorageTool", "format", "-t", cluster, "-c", str(self._properties)).wait(60)

    def start(self) -> None:
        self._process = self._java("kafka.Kafka", str(self._properties), memory="-Xmx512m")
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            if self._process.poll() is not None:
                break
            time.sleep(0.1)
        raise RuntimeError(f"Kafka did not start: {(self.folder / 'kafka.out').read_text()[-2000:]}")

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _java(self, *arguments: str, memory: str = "-Xmx128m") -> subprocess.Popen[bytes]:
        with (self.folder / "kafka.out").open("ab") as out:
            return subprocess.Popen(["java", memory, "-cp", f"{LIBS}/*", *arguments], stdout=out, stderr=out)


@contextmanager
def running(folder: Path) -> Iterator[Broker]:
    fetch()
    broker = Broker(folder)
    try:
        broker.start()
        yield broker
    finally:
        broker.stop()
