"""Plaudit's command line: starts and supervises processes, and speaks to the rooms. `plaudit --help` lists the commands."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from commands import adapters, audit, backup, cards, feedback, kafka, keys, learning, people, rollouts  # noqa: F401  (cards, people add verbs)
from commands.settings import ConfigPath, opened, policy_folder, settings_from
from commands.terminal import Steps, complain, console, say
from feedback.clock import wall_ms
from feedback.errors import ConfigError, Conflict, NotDurable, PlauditError
from feedback.keys import ON_THIS_MACHINE, SCOPES, ApiKey
from feedback.stores import Stores
from serving.config import GatewaySettings

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False, help=__doc__)
for name, group in (
    ("adapters", adapters),
    ("audit", audit),
    ("feedback", feedback),
    ("kafka", kafka),
    ("keys", keys),
    ("rollouts", rollouts),
):
    app.add_typer(group.app, name=name)
for group in (backup, learning):
    app.add_typer(group.app)
app.command()(kafka.relay)
app.command()(kafka.archive)


@app.command()
def up(config_path: ConfigPath = None) -> None:
    """Gateway, controller, archive and replica agent in one process, the model server beside it; until Ctrl-C."""
    from serving.service import Service

    with opened(config_path, "gateway") as (settings, stores, registry):
        if stores.log.partition != "gateway":
            raise Conflict(
                f"feedback.data_dir {settings.feedback.data_dir}: another `plaudit up` runs on it; stop that one or choose another folder"
            )
        _first_key(stores)
        gateway = GatewaySettings(
            server=settings.server,
            record=settings.record,
            comparison=settings.comparison,
            policy=settings.policy,
            feedback=settings.feedback,
            limits=settings.limits,
            erasure=settings.erasure,
            rollout=settings.rollout,
        )
        service = Service(stores, registry, gateway, settings.engine, settings.rollout, settings.gates, settings.webhooks)
        service.prepare(policy_folder(settings))
        with Steps() as steps:
            status = asyncio.run(
                service.run(lambda what, share: steps(f"model server: {what}" if what != "ready" else what, share), _ready)
            )
    raise typer.Exit(status)


def _ready(url: str) -> None:
    say(f"Plaudit answers at {url} (chat page, POST {url}/v1/chat/completions)")


def _first_key(stores: Stores) -> None:
    """An admin's key where no key could make another one: at the first start, and after the last such key was disabled or expired."""
    first = stores.api_keys.count() == 0
    why = "First start" if first else "No valid key with the scope 'keys' is left"

    def show(key: ApiKey, secret: str) -> None:
        try:
            say(f"{why}: the admin's key {key.id} is shown this once:\n  {secret}")
        except OSError as exc:
            told = f"the admin's key could not be shown on standard output ({exc.strerror}) and was not made"
            raise NotDurable(f"{told}; start again where the output is kept") from exc

    if first or not any("keys" in each.scopes and each.state(wall_ms()) == "valid" for each in stores.api_keys.list()):
        stores.api_keys.create("admin", SCOPES, by="first start" if first else ON_THIS_MACHINE, person=True, show=show)


@app.command()
def demo(
    policy: Annotated[str, typer.Option(help="smollm2 or concierge")] = "smollm2",
    stay: Annotated[bool | None, typer.Option(help="Keep serving at the end; default: in a terminal.")] = None,
    through_kafka: Annotated[bool, typer.Option("--kafka", help="Start a Kafka broker and send every event through it.")] = False,
) -> None:
    """Turn the whole ring once with simulated raters: chat, ratings, training, canary, approval, report."""
    from examples.ring import Ring

    steps = Steps()
    ring = Ring(policy, Path("data"), steps, say, kafka=through_kafka)
    try:
        with steps:
            closed = asyncio.run(ring.turn())
        if closed and (sys.stdin.isatty() if stay is None else stay):
            say("Ctrl-C stops it.")
            ring.wait()
    finally:
        ring.stop()
    raise typer.Exit(0 if closed else 1)


@app.command()
def report(
    adapter: str, config_path: ConfigPath = None, out: Annotated[Path | None, typer.Option(help="Default: data/reports.")] = None
) -> None:
    """Write the report of an adapter, one self-contained HTML file, and print its gist."""
    from trainer.report import report_of

    with opened(config_path, "report") as (settings, _, registry):
        record = registry.adapter(adapter)
        target = out or settings.feedback.data_dir / "reports" / f"{record.id}.html"
        say(report_of(record, registry, settings.feedback.data_dir, target))
        say(f"report: {target}")


@app.command("settings")
def show_settings(config_path: ConfigPath = None) -> None:
    """The effective settings as JSON, secrets masked."""
    console.print_json(settings_from(config_path).model_dump_json())


def main(run: Callable[[], object] | None = None) -> None:
    """The entry point: one line for every error that we raise on purpose and for a wrong command line, no traceback."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    os.environ.setdefault("TQDM_DISABLE", "1")  # libraries' bars would break into our own progress
    try:
        status = run() if run else app(standalone_mode=False, prog_name="plaudit")
    except typer.TyperException as error:
        complain(_told(error))
        sys.exit(2)
    except PlauditError as error:
        complain(f"plaudit: {' '.join(error.message.splitlines())}")
        sys.exit(2 if isinstance(error, ConfigError) else 1)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(status if isinstance(status, int) else 0)


def _told(error: typer.TyperException) -> str:
    """What is wrong with a command line, and where it is explained; a group without a verb gets its help."""
    said, context = error.format_message(), getattr(error, "ctx", None)
    if not said.strip() or "\n" in said.strip():
        return said
    return f"plaudit: {said.rstrip('.')}; see `{context.command_path if context else 'plaudit'} --help`"


if __name__ == "__main__":
    main()
