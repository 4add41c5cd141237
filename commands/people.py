"""`plaudit feedback erase` and `withdraw`: a person's data goes, or stays and trains nothing any more."""

from __future__ import annotations

from typing import Annotated

import typer

from commands.feedback import app
from commands.settings import ConfigPath, KeyOption, ReasonOption, opened, operator
from commands.terminal import complain, say
from deploy import lineage
from deploy.lineage import Affected
from feedback import erasure, export
from feedback.erasure import Asker

Subject = Annotated[str, typer.Argument(help="The id that the application uses, or the pseudonym s_...")]


@app.command("erase")
def erase_person(subject: Subject, reason: ReasonOption, key: KeyOption = "", config_path: ConfigPath = None) -> None:
    """Erase everything of a person and act on the adapters that learned from them (erasure.policy). Repeat it where it broke off."""
    with opened(config_path, "operator") as (settings, stores, registry):
        by = operator(stores, key, "erase").owner
        asker = Asker(erasure.named(stores, subject), by)
        outcome = lineage.erase(stores, registry, settings.erasure, asker, reason)
        exported = export.made_from(stores.engine, outcome.affected.snapshots)
    say(f"{outcome.affected.subject} is erased")
    _tell(outcome.affected, outcome.done)
    for file in exported:
        say(f"export {file}: delete it and its copies, it holds what this person asked or read")
    if not outcome.complete:
        complain("snapshots could not be read here, because pyarrow is not installed; a running `plaudit trainer` finishes it")
        raise typer.Exit(1)


@app.command("withdraw")
def withdraw_person(
    subject: Subject,
    key: KeyOption,
    reason: ReasonOption = "asked for",
    config_path: ConfigPath = None,
) -> None:
    """Nothing of a person trains from now on; it stays recorded."""
    with opened(config_path, "operator") as (_, stores, registry):
        by, who = operator(stores, key, "erase").owner, erasure.named(stores, subject)
        erasure.withdraw(stores, who, by, reason)
        used = lineage.affected(stores, registry, who)
    say(f"{who} has withdrawn: no snapshot from now on holds anything of theirs")
    _tell(used, dict.fromkeys(used.adapters, "left as it is"))


def _tell(used: Affected, done: dict[str, str]) -> None:
    for what, ids in (("snapshot", used.snapshots), ("reward model", used.reward_models), ("cycle", used.cycles)):
        for each in ids:
            say(f"{what} {each}")
    for adapter, outcome in done.items():
        say(f"adapter {adapter}: {outcome}")
    if not used.snapshots:
        say("no snapshot, reward model or adapter used anything of theirs")
