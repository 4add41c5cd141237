"""`plaudit feedback ...`: what people said."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, get_args

import typer
from rich.table import Table

from commands.settings import ConfigPath, JsonOption, KeyOption, opened, operator, settings_from
from commands.terminal import complain, console, say
from feedback import export, outbox, snapshot
from feedback import tail as tailing
from feedback.errors import ConfigError, InvalidInput
from feedback.events import TYPES, Source, json_schema
from feedback.export import Form
from feedback.importer import import_file
from feedback.partitions import SqliteLogs
from feedback.stats import statistics

DATES = ["%Y-%m-%d", "%Y-%m-%dT%H:%M:%S"]
app = typer.Typer(no_args_is_help=True, help="What people said.")


@app.command("import")
def import_pairs(
    file: Path, source: Annotated[str, typer.Option(help="Where the pairs come from.")], config_path: ConfigPath = None
) -> None:
    """Read preference pairs (chosen/rejected; .jsonl, .jsonl.gz). Good lines are kept, a second import adds nothing."""
    with opened(config_path, "import") as (settings, stores, _):
        result = import_file(file, source, stores.log, stores.subjects, settings.feedback.tenant)
        stores.ingest()
    for line, field, message in result.errors:
        complain(f"line {line}: {field}: {message}")
    say(f"{result.added} pairs added, {result.skipped} were there already, {len(result.errors)} lines refused")
    if result.errors:
        raise typer.Exit(1)


@app.command("export")
def export_snapshot(
    out: Annotated[Path, typer.Option(help="The file to write; .gz packs it.")],
    form: Annotated[Form, typer.Option(help="TRL's preference or unpaired form, or one JSON object an opinion.")] = "preference",
    choices: Annotated[bool, typer.Option("--choices", help="Unpaired: choices too, the chosen answer good, the other one not.")] = False,
    cohort: Annotated[list[str] | None, typer.Option(help="People with at least one of these tags.")] = None,
    source: Annotated[list[str] | None, typer.Option(help="person, simulated or import; default: all.")] = None,
    since: Annotated[datetime | None, typer.Option(formats=DATES, help="Opinions from this moment on, UTC.")] = None,
    until: Annotated[datetime | None, typer.Option(formats=DATES, help="Opinions before this moment, UTC.")] = None,
    key: KeyOption = "",
    config_path: ConfigPath = None,
) -> None:
    """Take a snapshot and write it as a training set; prints the snapshot's digest. Texts lie open in the file. Scope `dataset`."""
    with opened(config_path, "export") as (settings, stores, _):
        by = operator(stores, key, "dataset").owner
        if not snapshot.readable():
            raise ConfigError("snapshots need pyarrow, which is not installed: install plaudit[train]")
        if wrong := set(source or ()) - set(get_args(Source)):
            raise InvalidInput(f"source: '{min(wrong)}' is none of {', '.join(get_args(Source))}", field="source")
        given = {"tenant": settings.feedback.tenant, "cohorts": tuple(cohort or ()), "since_ms": _ms(since) or 0, "until_ms": _ms(until)}
        filters = snapshot.Filters.model_validate(given | ({"sources": tuple(source)} if source else {}))
        taken = snapshot.build(stores.archive, stores.subjects, settings.feedback.data_dir / "snapshots", filters)
        done = export.export(taken, out, form, choices=choices)
        export.record(stores.engine, by, taken, done, form)
    say(f"{done.written} lines in {out} ({form}), from {len(taken.rows)} opinions; snapshot {taken.digest}")
    if done.left_out:
        say("left out: " + ", ".join(f"{count} {why}" for why, count in done.left_out.items()))


@app.command("schema")
def schema() -> None:
    """The JSON Schema of events, as partitions and Kafka's topic hold them."""
    console.print_json(json.dumps(json_schema()))


@app.command("stats")
def stats(as_json: JsonOption = False, config_path: ConfigPath = None) -> None:
    """What the data folder holds: events, opinions, people, what waits and what was set aside. JSON unless in a terminal."""
    with opened(config_path, "stats") as (_, stores, _registry):
        found = statistics(stores)
    if as_json or not console.is_terminal:
        say(found.model_dump_json())
        return
    table = Table("what", "which", "how many")
    for kind, count in sorted(found.events.items()):
        table.add_row("events", kind, str(count))
    for slot, values in found.held.items():
        for value, count in values.items():
            table.add_row("opinions held", f"{slot} {value}", str(count))
    for what, counted in (("opinions from", found.sources), ("interactions of", found.cohorts)):
        for name, count in counted.items():
            table.add_row(what, name, str(count))
    for what, number in (("raters", found.raters), ("set aside as poison", found.poison), ("dead letters", found.dead_letters)):
        table.add_row(what, "", str(number))
    table.add_row("waiting for Kafka", "", "no Kafka" if found.unsent is None else str(found.unsent))
    for what, ms in (("oldest event", found.oldest_ms), ("newest event", found.newest_ms)):
        table.add_row(what, time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(ms / 1000)) if ms is not None else "none", "")
    console.print(table)


@app.command("tail")
def tail(
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until Ctrl-C.")] = False,
    kind: Annotated[list[str] | None, typer.Option("--type", help="Only events of this type, e.g. feedback.given.")] = None,
    last: Annotated[int, typer.Option("-n", min=0, help="How many of the last events to begin with.")] = 10,
    unseal: Annotated[bool, typer.Option("--open", help="Show what people wrote; scope `dataset`.")] = False,
    key: KeyOption = "",
    config_path: ConfigPath = None,
) -> None:
    """This machine's last events, one JSON object a line; sealed texts stay sealed without --open."""
    with opened(config_path, "tail") as (_, stores, _registry):
        if unseal:
            operator(stores, key, "dataset")
        subjects = stores.subjects if unseal else None
        unknown = set(kind or ()) - TYPES
        if unknown:
            raise InvalidInput(f"type: there is no event '{min(unknown)}'; they are {', '.join(sorted(TYPES))}", field="type")
        events, position = tailing.last(stores.logs, last, kind or ())
        for event in events:
            say(tailing.line(event, subjects))
        for each in tailing.follow(stores.logs, position, kind or ()) if follow else ():
            if each is not None:
                say(tailing.line(each, subjects))


@app.command("dead-letters")
def dead_letters(
    resend: Annotated[bool, typer.Option("--resend", help="Let the relay try all of them again.")] = False, config_path: ConfigPath = None
) -> None:
    """What Kafka will not take: where it lies, why, and since when. It stays here until it was sent."""
    paths = SqliteLogs(settings_from(config_path).feedback.data_dir / "log").partitions()
    table, letters = Table("partition", "offset", "event", "since", "why"), outbox.dead_letters(paths)
    for each in letters:
        since = datetime.fromtimestamp(each.at_ms / 1000, UTC).isoformat(timespec="seconds")
        table.add_row(each.partition, str(each.offset), each.event_id, since, each.reason)
    console.print(table)
    if resend:
        for each in letters:
            outbox.send_again(next(path for path in paths if path.stem == each.partition), each.offset)
        say(f"{len(letters)} are sent again by the relay")


def _ms(moment: datetime | None) -> int | None:
    return None if moment is None else int(moment.replace(tzinfo=UTC).timestamp() * 1000)
