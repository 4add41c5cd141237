"""`plaudit keys ...`: who may do what."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.table import Table

from commands.settings import ConfigPath, JsonOption, KeyOption, ReasonOption, opened, operator
from commands.terminal import console, say
from feedback.clock import wall_ms
from feedback.keys import SCOPES
from feedback.stores import token_keys
from feedback.tokens import rotate

DAY_MS = 24 * 3600 * 1000
app = typer.Typer(no_args_is_help=True, help="Who may do what.")


@app.command("create")
def create_key(
    owner: Annotated[str, typer.Option(help="Whose key it is.")],
    scopes: Annotated[str, typer.Option(help="Comma-separated: " + ",".join(SCOPES))],
    key: KeyOption = "",
    person: Annotated[bool, typer.Option(help="The owner is a person; approvals need such a key.")] = False,
    expires_days: Annotated[int | None, typer.Option(min=1, max=3650, help="Refused after so many days; default: never.")] = None,
    origins: Annotated[str, typer.Option(help="Comma-separated web origins; browsers may use it from these alone.")] = "",
    config_path: ConfigPath = None,
) -> None:
    """Make an API key. Its secret is shown once."""
    with opened(config_path, "operator") as (_, stores, _registry):
        by = operator(stores, key, "keys").owner
        wanted: Any = _listed(scopes)
        expires_ms = None if expires_days is None else wall_ms() + expires_days * DAY_MS
        made, secret = stores.api_keys.create(owner, wanted, by=by, person=person, origins=_listed(origins), expires_ms=expires_ms)
        say(f"key {made.id} of '{owner}': {secret}")


@app.command("list")
def list_keys(
    key: KeyOption = "",
    as_json: JsonOption = False,
    config_path: ConfigPath = None,
) -> None:
    """All keys without their secrets, oldest first."""
    with opened(config_path, "operator") as (_, stores, _registry):
        operator(stores, key, "keys")
        table = Table("key", "owner", "person", "scopes", "origins", "state")
        for each in stores.api_keys.list():
            if as_json:
                say(each.model_dump_json())
            person = "yes" if each.person else ""
            table.add_row(each.id, each.owner, person, ", ".join(each.scopes), ", ".join(each.origins), each.state(wall_ms()))
        if not as_json:
            console.print(table)


@app.command("disable")
def disable_key(key_id: str, reason: ReasonOption, key: KeyOption = "", config_path: ConfigPath = None) -> None:
    """The key is refused from now on."""
    with opened(config_path, "operator") as (_, stores, _registry):
        stores.api_keys.disable(key_id, by=operator(stores, key, "keys").owner, reason=reason)
        say(f"key {key_id} is disabled")


@app.command("rotate-tokens")
def rotate_tokens(key: KeyOption = "", config_path: ConfigPath = None) -> None:
    """A new key mints feedback tokens; the one before still opens what it minted, older ones are dropped."""
    with opened(config_path, "operator") as (settings, stores, _registry):
        rotate(token_keys(settings), stores.engine, operator(stores, key, "keys").owner)
        say("a new key mints feedback tokens; those of the key before are accepted until they expire or the next rotation")


def _listed(text: str) -> tuple[str, ...]:
    return tuple(each.strip() for each in text.split(",") if each.strip())
