"""`plaudit backup` and `restore`: a copy of the data folder, and the data folder from a copy."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from commands.settings import ConfigPath, KeyOption, opened, operator, settings_from
from commands.terminal import complain, say
from deploy import lineage
from deploy.registry import Registry
from feedback.backup import backup
from feedback.restore import restore
from feedback.stores import Stores

app = typer.Typer()


@app.command("backup")
def make_backup(
    folder: Annotated[Path, typer.Argument(help="A folder that is empty or does not exist.")],
    without_keys: Annotated[
        bool, typer.Option("--without-keys", help="Leave out keys/, which opens everything; keep it elsewhere.")
    ] = False,
    without_registry: Annotated[
        bool, typer.Option("--without-registry", help="Where registry.url is a server's: back that up with its own tool.")
    ] = False,
    key: KeyOption = "",
    config_path: ConfigPath = None,
) -> None:
    """Copy the data folder while everything goes on. Scope `keys`, because the copy holds every key."""
    with opened(config_path, "backup") as (_, stores, _registry):
        made = backup(stores, folder, operator(stores, key, "keys").owner, keys=not without_keys, registry=not without_registry)
    size = sum(entry.size_bytes for entry in made.files.values())
    say(f"{len(made.files)} files, {size} bytes in {folder}" + (", without keys/: keep that too, elsewhere" if without_keys else ""))


@app.command("restore")
def restore_backup(
    folder: Annotated[Path, typer.Argument(help="A backup.")],
    replace: Annotated[bool, typer.Option("--replace", help="A data folder that is there gives its newer events and is deleted.")] = False,
    erased: Annotated[list[Path] | None, typer.Option(help="A list of erasures (erased.jsonl) that was kept elsewhere.")] = None,
    keys: Annotated[Path | None, typer.Option(help="The folder keys/, for a backup without it.")] = None,
    key: KeyOption = "",
    config_path: ConfigPath = None,
) -> None:
    """Make the data folder from a backup and erase again who was erased since. Stop everything first. Scope `keys`, as in the backup."""
    settings = settings_from(config_path)

    def again(stores: Stores, erasures: Mapping[str, int]) -> int:
        return lineage.replay(stores, Registry(stores.engine, settings.feedback.tenant), settings.erasure, erasures)

    done = restore(
        folder, settings, lambda stores: operator(stores, key, "keys").owner, again, replace=replace, lists=erased or (), keys=keys
    )
    for problem in done.problems:
        complain(f"the replaced folder: {problem}")
    say(f"{done.files} files restored to {settings.feedback.data_dir}; {done.newer} newer events, {len(done.erased)} erasures made again")
