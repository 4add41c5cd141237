"""What a process needs to record and to read: log, archive, people's keys, tokens, API keys, opened from the settings."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import os
import secrets
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import structlog
from cryptography.fernet import Fernet
from sqlalchemy import Engine

from feedback.archive import Archive
from feedback.clock import HybridClock, wall_ms
from feedback.config import Settings
from feedback.database import open_database
from feedback.errors import ConfigError, NotDurable
from feedback.events import Event
from feedback.files import new_file, sync
from feedback.keys import ApiKeys
from feedback.partitions import SqliteLogs, prune
from feedback.readers import GroupReader
from feedback.relay import Relay
from feedback.sqlite_log import SqliteLog
from feedback.subjects import Subjects
from feedback.tokens import Tokens

MAX_PARTITIONS = 256
MAX_OFFSET = 2**63 - 1

log = structlog.get_logger(__name__)


@dataclass
class Stores:
    """Everything durable that one process uses. `close` releases it; nothing durable depends on that."""

    settings: Settings
    engine: Engine
    clock: HybridClock
    log: SqliteLog
    logs: SqliteLogs
    archive: Archive
    subjects: Subjects
    tokens: Tokens
    api_keys: ApiKeys
    relay: Relay | None
    _claim: int
    reader: GroupReader | None = None
    """With Kafka: this process's membership among the archive's readers, where it has one."""

    async def record_feedback(self, events: Sequence[Event]) -> tuple[list[Event], Literal["local", "broker"]]:
        """Append, and with `ack = "broker"` wait for Kafka too. Raises NotDurable while Kafka is away: the events then lie on this
        machine and get there later, so the same Idempotency-Key finds them."""
        stored = await self.log.append(events)
        return stored, await self._confirm(stored)

    async def confirm(self, stored: Sequence[Event]) -> Literal["local", "broker"]:
        """The same for a repeated request, whose events were found in the log: it may ask after a 503. Raises NotDurable."""
        await asyncio.to_thread(self.logs.sync)
        return await self._confirm(stored)

    async def _confirm(self, stored: Sequence[Event]) -> Literal["local", "broker"]:
        if self.settings.feedback.ack == "local" or self.relay is None:
            return "local"
        await self.relay.delivered(stored, self.settings.feedback.ack_timeout_s)
        return "broker"

    def start_reading(self) -> None:
        """With Kafka: make this process one of those who feed the archive. Raises ConfigError where the topic would lose events; a broker
        that is away is met again by `ingest`."""
        kafka = self.settings.kafka
        if kafka.bootstrap is None or self.reader is not None:
            return
        self.reader = GroupReader(self.archive, kafka, member_name(self.settings.feedback.data_dir, self.log.partition))
        try:
            self.reader.check()
        except NotDurable as exc:
            log.warning("archive.waits", problem=exc.message)

    def ingest(self) -> int:
        """Bring the archive up to date; how many events were new.

        Embedded, whoever calls this reads the partitions of this machine. With Kafka the archive has one source, the topic, and is fed by
        the members of its consumer group (`start_reading`): the others find it as those have left it, and are given 0.
        """
        if self.settings.kafka.bootstrap is None:
            return self.archive.ingest(self.logs)
        return self.reader.catch_up() if self.reader is not None else 0

    def expire(self, now_ms: int | None = None) -> int:
        """Delete interactions that nobody rated within `feedback.unrated_expiry_days` from the archive, and rows of that age from every
        partition of this machine, also of processes that are gone: the archive has them by then. How many interactions. Once an hour
        is enough."""
        now_ms = wall_ms() if now_ms is None else now_ms
        days = self.settings.feedback.unrated_expiry_days
        self.ingest()
        expired = self.archive.expire(now_ms, days)
        kafka, positions = self.settings.kafka.bootstrap is not None, self.archive.positions()
        for path in self.logs.partitions():
            # With Kafka the archive reads what was sent, which lies in the topic for at least as long.
            archived = MAX_OFFSET if kafka else positions.get(path.stem, 0)
            prune(path, archived, now_ms - days * 24 * 3600 * 1000, only_sent=kafka)
        return expired

    def close(self) -> None:
        if self.relay is not None:
            self.relay.close()
        if self.reader is not None:
            self.reader.close()
        self.logs.close()  # before the log, which empties its write-ahead log where nobody else has it open
        self.log.close()
        self.archive.close()
        self.engine.dispose()
        os.close(self._claim)


def open_stores(settings: Settings, process: str = "gateway", upgrade: Callable[[Engine], None] | None = None) -> Stores:
    """Open or create everything in the data folder. Raises ConfigError, or NotDurable where the disk will not take it.

    The process writes partition `log/<process>.sqlite`, or `<process>-1`, ... where others of its kind are running. `upgrade` brings the
    registry's database up to date before anything reads it.
    """
    data_dir = settings.feedback.data_dir
    if settings.feedback.ack == "broker" and settings.kafka.bootstrap is None:
        raise ConfigError('feedback.ack = "broker" needs kafka.bootstrap, which is not set', field="kafka.bootstrap")
    try:
        kek, pseudonym = _keys(data_dir / "keys")
        name, claim = claim_name(data_dir / "log", process)
        path = data_dir / "log" / f"{name}.sqlite"
    except OSError as exc:
        raise ConfigError(f"feedback.data_dir {data_dir} cannot be used: {exc.strerror}", field="feedback.data_dir") from exc
    engine = open_database(settings.registry.resolved(data_dir))
    if upgrade is not None:
        upgrade(engine)
    subjects = Subjects(engine, kek, pseudonym)
    logs = SqliteLogs(data_dir / "log")
    clock = HybridClock()
    archive = Archive(data_dir / "archive.sqlite")
    clock.observe(max(logs.last_stamp(), archive.as_of()))
    embedded = settings.kafka.bootstrap is None  # with Kafka the archive's positions are the topic's
    partition = SqliteLog(path, clock, archive.positions().get(path.stem, 1) if embedded else 1)
    return Stores(
        settings=settings,
        engine=engine,
        clock=clock,
        log=partition,
        logs=logs,
        archive=archive,
        subjects=subjects,
        tokens=Tokens(token_keys(settings)),
        api_keys=ApiKeys(engine),
        relay=Relay(data_dir / "log", settings.kafka, own=path) if settings.kafka.bootstrap else None,
        _claim=claim,
    )


def claim_name(folder: Path, process: str) -> tuple[str, int]:
    """The first of `<process>`, `<process>-1`, ... that no living process has in this folder, and the lock that says so."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(MAX_PARTITIONS):
        name = process if number == 0 else f"{process}-{number}"
        descriptor = os.open(folder / f"{name}.lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel frees it when the process dies
        except BlockingIOError:
            os.close(descriptor)
            continue
        return name, descriptor
    raise ConfigError(f"{MAX_PARTITIONS} processes named '{process}' use {folder} already", field="process")


def member_name(data_dir: Path, name: str) -> str:
    """What a process is called in the consumer group: the same after a restart, and nobody else's on any machine."""
    where = hashlib.sha256(str(data_dir.resolve()).encode()).hexdigest()[:8]
    return f"{socket.gethostname()}-{where}-{name}"


def _keys(folder: Path) -> tuple[bytes, bytes]:
    """Key-encryption key and pseudonym key; made, like the token keys, at the first start."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    kek = _key_file(folder / "kek", secrets.token_bytes(32))
    pseudonym = _key_file(folder / "pseudonym", secrets.token_bytes(32))
    _key_file(folder / "token.keys", Fernet.generate_key() + b"\n")
    if len(pseudonym) < 32:
        raise ConfigError(f"{folder / 'pseudonym'} has {len(pseudonym)} bytes, it must have at least 32", field="keys")
    return kek, pseudonym


def token_keys(settings: Settings) -> Path:
    """The file of the keys that feedback tokens are minted with."""
    return settings.feedback.data_dir / "keys" / "token.keys"


def _key_file(path: Path, new: bytes) -> bytes:
    """The file's content. Where it is missing, `new` is written, unless another process is faster: then both use its content."""
    if not path.exists():
        temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
        with new_file(temporary) as file:
            file.write(new)
        with contextlib.suppress(FileExistsError):
            os.link(temporary, path)  # a rename would replace the other process's key
        temporary.unlink()
        sync(path.parent)
    return path.read_bytes()
