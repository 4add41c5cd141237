"""`plaudit rollouts ...`: adapters on their way to people."""

from __future__ import annotations

import json
import time
from typing import Any

import typer
from rich.table import Table

from commands.ask import UrlOption, asking
from commands.settings import ConfigPath, KeyOption, ReasonOption
from commands.terminal import console, say
from deploy import operations

app = typer.Typer(no_args_is_help=True, help="Adapters on their way to people.")


@app.command("list")
def list_rollouts(key: KeyOption = "", url: UrlOption = "", config_path: ConfigPath = None) -> None:
    """All rollouts and where they stand, oldest first."""
    with asking(config_path, url, key) as ask:
        table = Table("rollout", "adapter", "began (UTC)", "state", "weight", "why")
        for each in ask(operations.LIST_ROLLOUTS)["rollouts"]:
            began = time.strftime("%Y-%m-%d %H:%M", time.gmtime(each["started_ms"] / 1000))
            table.add_row(each["id"], each["adapter"][:16], began, each["state"], f"{each['weight']:.0%}", each["reason"])
        console.print(table)


@app.command("show")
def show_rollout(rollout: str, key: KeyOption = "", url: UrlOption = "", config_path: ConfigPath = None) -> None:
    """One rollout with every verdict, as JSON."""
    with asking(config_path, url, key) as ask:
        console.print_json(json.dumps(ask(operations.SHOW_ROLLOUT, rollout=rollout)))


@app.command("approve")
def approve_rollout(rollout: str, key: KeyOption = "", url: UrlOption = "", config_path: ConfigPath = None) -> None:
    """Let the canary of this rollout answer everybody. Needs another person's key than the one that registered the adapter."""
    with asking(config_path, url, key) as ask:
        say(promoted(ask(operations.APPROVE, rollout=rollout)))


@app.command("stop")
def stop_rollout(
    reason: ReasonOption,
    rollout: str = typer.Argument(operations.RUNNING, help="Its id; default: whichever runs."),
    key: KeyOption = "",
    url: UrlOption = "",
    config_path: ConfigPath = None,
) -> None:
    """End a rollout; stable answers everybody."""
    with asking(config_path, url, key) as ask:
        say(ask(operations.STOP, rollout=rollout, reason=reason)["reason"])


def promoted(done: dict[str, Any]) -> str:
    """What is said after an approval."""
    return f"{done['adapter'][:16]} is stable: {done['reason']}"
