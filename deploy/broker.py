"""A real Apache Kafka broker for one machine and for the tests: one KRaft node on loopback, its jars from Maven Central.

It is for trying Kafka on a laptop. Its one copy of everything lies on this machine's disk; production brings its own cluster.
"""

from __future__ import annotations

import base64
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from deploy import process
from feedback.errors import ConfigError, NotDurable

ROOT = Path(__file__).resolve().parents[1]
LIBS = ROOT / "build" / "kafka" / "libs"
POM = ROOT / "deploy" / "kafka" / "pom.xml"
FETCH_S, START_S, STOP_S = 300.0, 60.0, 20.0

Progress = Callable[[str, float], None]


def missing() -> str | None:
    """What a broker needs and this machine lacks, with the next step."""
    tools = [tool for tool in ("java", "mvn") if shutil.which(tool) is None]
    return f"{' and '.join(tools)} not found; install a Java 17 runtime and Maven" if tools else None


def fetch(progress: Progress) -> Path:
    """The folder of the broker's jars, fetched once (about 43 MB). Raises ConfigError where java or mvn is missing or Maven fails."""
    if (lacking := missing()) is not None:
        raise ConfigError(f"Kafka cannot run here: {lacking}", field="kafka")
    if LIBS.is_dir():
        return LIBS
    progress("Kafka's jars", 0.0)
    LIBS.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=LIBS.parent) as folder:
        into = Path(folder) / "libs"
        command = ["mvn", "-q", "-B", "-f", str(POM), "dependency:copy-dependencies", f"-DoutputDirectory={into}"]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=FETCH_S)
        except subprocess.CalledProcessError as exc:
            raise ConfigError(f"Maven could not fetch Kafka: {(exc.stdout + exc.stderr).strip()[-300:]}", field="kafka") from exc
        except subprocess.TimeoutExpired as exc:
            raise ConfigError(f"Maven did not fetch Kafka within {FETCH_S:g} s; is its repository reachable?", field="kafka") from exc
        with contextlib.suppress(OSError):  # another process was faster, and its jars are the same
            into.rename(LIBS)
    progress("Kafka's jars", 1.0)
    return LIBS


class Broker:
    """One node that is broker and controller. Its folder keeps data, ports and the log `kafka.out` over restarts.

    `properties` are added to the node's own, or replace them.
    """

    def __init__(self, folder: Path, port: int = 0, properties: Mapping[str, str] | None = None) -> None:
        self.folder = folder.resolve()
        known = _read(self.folder / "server.properties")
        self.port = port or _port_in(known.get("listeners", "")) or process.free_port()
        self.bootstrap = f"127.0.0.1:{self.port}"
        self._extra = dict(properties or {})
        self._pid_file = self.folder / "kafka.pid"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, progress: Progress = lambda what, share: None) -> None:
        """Returns once it takes connections. Raises ConfigError where it cannot run here or the port is taken, NotDurable where it ends."""
        libs = fetch(progress)
        self.folder.mkdir(parents=True, exist_ok=True)
        process.end_left_over(self._pid_file, "Kafka node")
        if (taken := process.port_taken(self.port)) is not None:
            raise ConfigError(f"port {self.port} of 127.0.0.1 is taken ({taken}); choose another one with --port", field="port")
        path = self.folder / "server.properties"
        path.write_text("".join(f"{name}={value}\n" for name, value in self._properties().items()))
        progress("Kafka starts", 0.1)
        if not (self.folder / "data" / "meta.properties").exists():
            formatting = self._java(libs, "-Xmx128m", "kafka.tools.StorageTool", "format", "-t", cluster_id(), "-c", str(path))
            if formatting.wait(START_S) != 0:
                raise NotDurable(f"Kafka could not format {self.folder / 'data'}: {self._said()}")
        self._process = self._java(libs, "-Xmx512m", "kafka.Kafka", str(path))
        process.remember(self._pid_file, self._process.pid)
        started = time.monotonic()
        while not self._listens():
            if self._process.poll() is not None:
                raise NotDurable(f"Kafka ended while it started: {self._said()}")
            waited = time.monotonic() - started
            if waited > START_S:
                self.kill()
                raise NotDurable(f"Kafka did not listen on {self.bootstrap} within {START_S:g} s: {self._said()}")
            progress("Kafka starts", min(0.95, 0.1 + waited / 10))
            time.sleep(0.1)
        progress("Kafka starts", 1.0)

    def wait(self) -> int:
        """Until the node ends by itself; its exit status."""
        return self._process.wait() if self._process is not None else 0

    def stop(self) -> None:
        """End it cleanly; one that does not end within 20 s is killed, which costs it a check of its logs at the next start."""
        if self._process is not None:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_S)
            self.kill()

    def kill(self) -> None:
        """kill -9."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
            self._pid_file.unlink(missing_ok=True)

    def signal(self, number: signal.Signals) -> None:
        """Pause it with SIGSTOP, let it go on with SIGCONT."""
        if self._process is not None:
            self._process.send_signal(number)

    def _properties(self) -> dict[str, str]:
        controller = process.free_port()
        loopback = "127.0.0.1"
        return {
            "process.roles": "broker,controller",
            "node.id": "1",
            "controller.quorum.voters": f"1@{loopback}:{controller}",
            "listeners": f"PLAINTEXT://{self.bootstrap},CONTROLLER://{loopback}:{controller}",
            "advertised.listeners": f"PLAINTEXT://{self.bootstrap}",
            "controller.listener.names": "CONTROLLER",
            "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT",
            "log.dirs": str(self.folder / "data"),
            # A misspelt topic is refused instead of made with settings that lose events.
            "auto.create.topics.enable": "false",
            "offsets.topic.replication.factor": "1",
            "offsets.topic.num.partitions": "4",
            "transaction.state.log.replication.factor": "1",
            "transaction.state.log.min.isr": "1",
            "share.coordinator.state.topic.replication.factor": "1",
            "group.initial.rebalance.delay.ms": "0",
            "group.min.session.timeout.ms": "1000",
            # After kill -9 the node may not register before the session of its former life is over.
            "broker.session.timeout.ms": "3000",
            "broker.heartbeat.interval.ms": "500",
            **self._extra,
        }

    def _listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def _said(self) -> str:
        return (self.folder / "kafka.out").read_text(errors="replace").strip()[-600:]

    def _java(self, libs: Path, memory: str, *arguments: str) -> subprocess.Popen[bytes]:
        with (self.folder / "kafka.out").open("ab") as out:
            # A group of its own: Ctrl-C at the terminal reaches Plaudit alone, which then ends the node.
            return subprocess.Popen(
                ["java", memory, "-cp", f"{libs}/*", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )


def _read(path: Path) -> dict[str, str]:
    """The properties of an earlier start."""
    if not path.exists():
        return {}
    return dict(line.split("=", 1) for line in path.read_text().splitlines() if "=" in line)


def _port_in(listeners: str) -> int:
    first = listeners.split(",")[0].rpartition(":")[2]
    return int(first) if first.isdigit() else 0


def cluster_id() -> str:
    """A new one: 16 bytes in url-safe base64. The first is 0, because Kafka's own tool takes an id that begins with `-` for an option."""
    return base64.urlsafe_b64encode(b"\0" + os.urandom(15)).decode().rstrip("=")
