"""`plaudit audit ...`: who did what."""

from __future__ import annotations

import json
import time

import typer
from rich.table import Table

from commands.settings import ConfigPath, JsonOption, KeyOption, opened, operator
from commands.terminal import complain, console, say
from feedback import audit

app = typer.Typer(no_args_is_help=True, help="Who did what, hash-chained.")


@app.command("verify")
def verify(key: KeyOption = "", config_path: ConfigPath = None) -> None:
    """Walk the whole chain; exit status 1 with the first record that is not what was written."""
    with opened(config_path, "operator") as (_, stores, _registry):
        operator(stores, key, "audit")
        head, fault = audit.verify(stores.engine)
        if fault is not None:
            complain(f"plaudit: audit: record {fault.row} is bad: {fault.reason}; the {head.rows} before it are as they were written")
            raise typer.Exit(1)
        say(f"{head.rows} records, each as it was written; head {head.digest}")


@app.command("list")
def list_records(
    key: KeyOption = "",
    as_json: JsonOption = False,
    config_path: ConfigPath = None,
) -> None:
    """All records, oldest first."""
    with opened(config_path, "operator") as (_, stores, _registry):
        operator(stores, key, "audit")
        if as_json:
            for row in audit.read(stores.engine):
                say(json.dumps(row))
            return
        table = Table("record", "when (UTC)", "who", "what", "on", "why")
        for row in audit.read(stores.engine):
            when = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(row["at_ms"] / 1000))
            table.add_row(str(row["id"]), when, row["actor"], row["action"], row["subject"][:16], row["reason"])
        console.print(table)
