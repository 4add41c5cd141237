"""`plaudit adapters ...`: which adapter may answer whom."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from commands.ask import UrlOption, asking
from commands.rollouts import promoted
from commands.settings import ConfigPath, KeyOption, ReasonOption, opened, settings_from
from commands.terminal import console, say
from deploy import operations, signing
from deploy.manifest import read_manifest
from deploy.store import AdapterStore

app = typer.Typer(no_args_is_help=True, help="Which adapter may answer whom.")


@app.command("list")
def list_adapters(key: KeyOption = "", url: UrlOption = "", config_path: ConfigPath = None) -> None:
    """All adapters and where they stand."""
    with asking(config_path, url, key) as ask:
        table = Table("adapter", "kind", "state", "registered by", "why")
        for each in ask(operations.LIST_ADAPTERS)["adapters"]:
            table.add_row(each["id"][:16], each["kind"], each["state"], each["registered_by"], each["reason"])
        console.print(table)


@app.command("show")
def show_adapter(adapter: str, key: KeyOption = "", url: UrlOption = "", config_path: ConfigPath = None) -> None:
    """Manifest, attestations and rollouts of one adapter, as JSON."""
    with asking(config_path, url, key) as ask:
        console.print_json(json.dumps(ask(operations.SHOW_ADAPTER, adapter=adapter)))


@app.command("aliases")
def list_aliases(
    limit: Annotated[int, typer.Option("-n", min=1, max=operations.MOST, help="How many moves.")] = 20,
    key: KeyOption = "",
    url: UrlOption = "",
    config_path: ConfigPath = None,
) -> None:
    """Where `stable`, `canary` and `previous` point, and their last moves, as JSON."""
    with asking(config_path, url, key) as ask:
        console.print_json(json.dumps(ask(operations.ALIASES, limit=limit)))


@app.command("register")
def register_adapter(
    folder: Annotated[Path, typer.Argument(help="An adapter with its manifest.json.")],
    key: KeyOption = "",
    url: UrlOption = "",
    config_path: ConfigPath = None,
) -> None:
    """Copy an adapter's folder into the store and make it a candidate."""
    settings = settings_from(config_path)
    with asking(config_path, url, key) as ask:
        data_dir, adapter = settings.feedback.data_dir, read_manifest(folder).adapter_id
        AdapterStore(settings.deploy.resolved(data_dir), data_dir / "adapters").put(folder)
        done = ask(operations.REGISTER, adapter=adapter)
        say(f"{done['id'][:16]} is '{done['state']}': registered by {done['registered_by']}")


@app.command("promote")
def promote(adapter: str, key: KeyOption = "", url: UrlOption = "", config_path: ConfigPath = None) -> None:
    """Approve the canary that waits for it. Needs another person's key than the one that registered it."""
    with asking(config_path, url, key) as ask:
        say(promoted(ask(operations.APPROVE_ADAPTER, adapter=adapter)))


@app.command("override")
def override_gate(
    adapter: str, gate: str, reason: ReasonOption, key: KeyOption = "", url: UrlOption = "", config_path: ConfigPath = None
) -> None:
    """Let one adapter pass one gate whatever it says. Needs a person's key with the scope for it; every verdict shows it."""
    with asking(config_path, url, key) as ask:
        done = ask(operations.OVERRIDE, adapter=adapter, gate=gate, reason=reason)
        say(f"{gate} is overridden for {done['id'][:16]}, which is '{done['state']}'")


@app.command("rollback")
def rollback(
    reason: ReasonOption,
    expect: Annotated[str, typer.Option(help="The adapter to take back; default: whichever is stable now.")] = "",
    key: KeyOption = "",
    url: UrlOption = "",
    config_path: ConfigPath = None,
) -> None:
    """`previous` answers again."""
    with asking(config_path, url, key) as ask:
        seen = expect or ask(operations.ALIASES, limit=1)["stable"] or ""
        say(f"{ask(operations.ROLLBACK, reason=reason, expect=seen)['stable'][:16]} is stable again")


@app.command("stop")
def stop_rollout(reason: ReasonOption, key: KeyOption = "", url: UrlOption = "", config_path: ConfigPath = None) -> None:
    """End the running rollout, as `plaudit rollouts stop` does; stable answers everybody."""
    with asking(config_path, url, key) as ask:
        say(ask(operations.STOP, rollout=operations.RUNNING, reason=reason)["reason"])


@app.command("sign")
def sign_adapter(
    adapter: str,
    private_key: Annotated[Path, typer.Option(help="PEM file of an elliptic-curve key; docs/operate.md says how to make one.")],
    config_path: ConfigPath = None,
) -> None:
    """Write the OpenSSF signature of an adapter beside its folder, for replicas with `engine.adapter_public_key`."""
    with opened(config_path, "operator") as (_, _stores, registry):
        say(f"signed: {signing.sign(registry.adapter(adapter).path, private_key)}")
