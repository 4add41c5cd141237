"""`plaudit keys ...`: who may do what."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from commands.settings import ConfigPath, opened
from commands.terminal import say
from feedback.keys import SCOPES

app = typer.Typer(no_args_is_help=True, help="Who may do what.")


@app.command("create")
def create_key(
    owner: Annotated[str, typer.Option(help="Whose key it is.")],
    scopes: Annotated[str, typer.Option(help="Comma-separated: " + ",".join(SCOPES))],
    person: Annotated[bool, typer.Option(help="The owner is a person; approvals need such a key.")] = False,
    config_path: ConfigPath = None,
) -> None:
    """Make an API key. Its secret is shown once."""
    with opened(config_path, "operator") as (_, stores, _registry):
        wanted: Any = tuple(scope.strip() for scope in scopes.split(",") if scope.strip())
        key, secret = stores.api_keys.create(owner, wanted, person=person)
        say(f"key {key.id} of '{owner}': {secret}")
