"""`plaudit feedback ...`: what people said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from commands.settings import ConfigPath, opened
from commands.terminal import complain, console, say

app = typer.Typer(no_args_is_help=True, help="What people said.")


@app.command("import")
def import_pairs(
    file: Path, source: Annotated[str, typer.Option(help="Where the pairs come from.")], config_path: ConfigPath = None
) -> None:
    """Read preference pairs (chosen/rejected; .jsonl, .jsonl.gz). Good lines are kept, a second import adds nothing."""
    from feedback.importer import import_file

    with opened(config_path, "import") as (settings, stores, _):
        result = import_file(file, source, stores.log, stores.subjects, settings.feedback.tenant)
        stores.ingest()
    for line, field, message in result.errors:
        complain(f"line {line}: {field}: {message}")
    say(f"{result.added} pairs added, {result.skipped} were there already, {len(result.errors)} lines refused")
    if result.errors:
        raise typer.Exit(1)


@app.command("stats")
def stats(config_path: ConfigPath = None) -> None:
    """How many events of each kind, and how many opinions are held."""
    with opened(config_path, "stats") as (_, stores, _registry):
        console.print_json(json.dumps(stores.archive.counts()))
