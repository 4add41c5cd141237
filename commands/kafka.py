"""`plaudit kafka ...`: a broker for one machine; and the two processes that carry events to Kafka and from there into the archive."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from typing import Annotated

import typer

from commands.settings import ConfigPath, settings_from
from commands.terminal import Steps, complain, say
from feedback.archive import Archive
from feedback.errors import ConfigError, NotDurable, PlauditError
from feedback.partitions import SqliteLogs
from feedback.readers import GroupReader
from feedback.relay import Relay
from feedback.stores import claim_name, member_name

QUIET_S = 5.0

app = typer.Typer(no_args_is_help=True, help="A Kafka broker for one machine.")


@app.callback()
def group() -> None:
    """Keeps `up` a command of its own while the group has no other."""


@app.command("up")
def up(
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port on 127.0.0.1; 0 takes the one of the last start, or a free one.")] = 0,
    config_path: ConfigPath = None,
) -> None:
    """Run one Kafka node on 127.0.0.1 until Ctrl-C; its data stay in `kafka` below the data folder."""
    from deploy.broker import Broker

    broker = Broker(settings_from(config_path).feedback.data_dir / "kafka", port)
    try:
        with Steps() as steps:
            broker.start(steps)
        say(f'Kafka listens. Set kafka.bootstrap = "{broker.bootstrap}"; Ctrl-C ends it.')
        raise typer.Exit(broker.wait())
    finally:
        broker.stop()


def relay(
    once: Annotated[bool, typer.Option("--once", help="End when nothing waits any more.")] = False,
    config_path: ConfigPath = None,
) -> None:
    """Carry every partition of the data folder to Kafka, those of dead processes and later ones too; until Ctrl-C."""
    settings = settings_from(config_path)
    if settings.kafka.bootstrap is None:
        raise ConfigError("kafka.bootstrap is not set, so there is nowhere to carry events to", field="kafka.bootstrap")
    with closing(Relay(settings.feedback.data_dir / "log", settings.kafka)) as carrying:
        try:
            carrying.check()
        except NotDurable as exc:
            complain(f"plaudit: {exc.message}")
        say(f"Carrying {settings.feedback.data_dir / 'log'} to {settings.kafka.topic} at {settings.kafka.bootstrap}; Ctrl-C ends it.")
        while not (once and carrying.pending() == 0):
            time.sleep(0.1)
        say(f"{carrying.sent} events sent, {carrying.dead_letters()} dead letters")


def archive(
    once: Annotated[bool, typer.Option("--once", help="End when nothing new has come for a while.")] = False,
    config_path: ConfigPath = None,
) -> None:
    """Feed the archive: from Kafka as one of the readers, which share its partitions, or else from the partitions here; until Ctrl-C."""
    settings = settings_from(config_path)
    data_dir = settings.feedback.data_dir
    name, _ = claim_name(data_dir / "readers", "archive")
    with closing(Archive(data_dir / "archive.sqlite")) as kept:
        if settings.kafka.bootstrap is None:
            _follow(lambda: kept.ingest(SqliteLogs(data_dir / "log")), once)
            return
        with closing(GroupReader(kept, settings.kafka, member_name(data_dir, name))) as reader:
            told = ""
            try:
                reader.check()
            except NotDurable as exc:
                told = exc.field or exc.message
                complain(f"plaudit: {exc.message}")
            say(f"Reading {settings.kafka.topic} at {settings.kafka.bootstrap} as {name}; Ctrl-C ends it.")
            _follow(reader.catch_up, once, told)


def _follow(catch_up: Callable[[], int], once: bool, told: str = "") -> None:
    """Store what comes. A failure that lasts is told once; `told` names one that was told already."""
    total, quiet = 0, time.monotonic()
    while not (once and time.monotonic() - quiet > QUIET_S):
        try:
            if (new := catch_up()) > 0:
                total, quiet = total + new, time.monotonic()
            told = ""
        except ConfigError:
            raise
        except PlauditError as exc:
            if told != (exc.field or exc.message):
                complain(f"plaudit: {exc.message}")
            told, quiet = exc.field or exc.message, time.monotonic()
            time.sleep(1.0)
        time.sleep(0.1)
    say(f"{total} new events")
