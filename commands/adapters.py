"""`plaudit adapters ...`: which adapter may answer whom."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from commands.settings import ConfigPath, KeyOption, ReasonOption, opened, operator
from commands.terminal import console, say
from deploy import overrides, rollout, signing

app = typer.Typer(no_args_is_help=True, help="Which adapter may answer whom.")


@app.command("list")
def list_adapters(config_path: ConfigPath = None) -> None:
    """All adapters and where they stand."""
    with opened(config_path, "operator") as (_, _stores, registry):
        table = Table("adapter", "kind", "state", "registered by", "why")
        for each in registry.adapters():
            table.add_row(each.id[:16], each.kind, each.state, each.registered_by, each.reason)
        console.print(table)


@app.command("show")
def show_adapter(adapter: str, config_path: ConfigPath = None) -> None:
    """Manifest, attestations and rollouts of one adapter, as JSON."""
    with opened(config_path, "operator") as (_, _stores, registry):
        record = registry.adapter(adapter)
        found = {
            "adapter": record.model_dump(mode="json"),
            "manifest": record.manifest.model_dump(mode="json"),
            "attestations": [each.model_dump(mode="json") for each in registry.attestations(record.id)],
            "rollouts": [each.model_dump(mode="json") for each in registry.rollouts(record.id)],
        }
        console.print_json(json.dumps(found))


@app.command("promote")
def promote(adapter: str, key: KeyOption = "", config_path: ConfigPath = None) -> None:
    """Approve the canary that waits for it. Needs another person's key than the one that registered it."""
    with opened(config_path, "operator") as (settings, stores, registry):
        done = rollout.approve(registry, settings.rollout, adapter, operator(stores, key, "adapters:promote"))
        say(f"{done.adapter[:16]} is stable: {done.reason}")


@app.command("override")
def override_gate(adapter: str, gate: str, reason: ReasonOption, key: KeyOption = "", config_path: ConfigPath = None) -> None:
    """Let one adapter pass one gate whatever it says. Needs a person's key with the scope for it; every verdict shows it."""
    with opened(config_path, "operator") as (settings, stores, registry):
        by = operator(stores, key, overrides.SCOPE)
        overrides.override(registry, adapter, gate, reason, by, two_people=settings.rollout.two_people)
        record = registry.adapter(adapter)
        say(f"{gate} is overridden for {record.id[:16]}, which is '{record.state}'")


@app.command("rollback")
def rollback(reason: ReasonOption, key: KeyOption = "", config_path: ConfigPath = None) -> None:
    """`previous` answers again."""
    with opened(config_path, "operator") as (_, stores, registry):
        seen = registry.alias("stable")
        say(f"{registry.rollback(operator(stores, key, 'adapters:promote').owner, reason, seen)[:16]} is stable again")


@app.command("stop")
def stop_rollout(reason: ReasonOption, key: KeyOption = "", config_path: ConfigPath = None) -> None:
    """End the running rollout; stable answers everybody."""
    with opened(config_path, "operator") as (_, stores, registry):
        say(rollout.stop(registry, reason, operator(stores, key, "adapters:promote")).reason)


@app.command("sign")
def sign_adapter(
    adapter: str,
    private_key: Annotated[Path, typer.Option(help="PEM file of an elliptic-curve key; docs/operate.md says how to make one.")],
    config_path: ConfigPath = None,
) -> None:
    """Write the OpenSSF signature of an adapter beside its folder, for replicas with `engine.adapter_public_key`."""
    with opened(config_path, "operator") as (_, _stores, registry):
        say(f"signed: {signing.sign(registry.adapter(adapter).path, private_key)}")
