"""`plaudit adapters card` and `diff`: what is known about an adapter, on a page, for the Hub, and beside another one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from commands import adapters
from commands.ask import Ask, UrlOption, asking
from commands.settings import ConfigPath, KeyOption, Settings, settings_from
from commands.terminal import console, say
from deploy.card import Card
from deploy.differences import differences
from deploy.operations import SHOW_CARD
from deploy.pages import HUB_NAME, model_card, page
from examples import NAMES, load
from feedback import files


@adapters.app.command("card")
def card(
    adapter: str,
    out: Annotated[Path | None, typer.Option(help="Folder of both files; default: cards/ADAPTER in the data folder.")] = None,
    base_model: Annotated[str | None, typer.Option(help="The base's name on the Hub; default: policy.base where that is one.")] = None,
    license_id: Annotated[str, typer.Option("--license", help="As the Hub writes it, e.g. apache-2.0.")] = "unknown",
    url: UrlOption = "",
    key: KeyOption = "",
    config_path: ConfigPath = None,
) -> None:
    """Write an adapter's page (card.html) and the model card that the Hub wants (README.md)."""
    settings = settings_from(config_path)
    with asking(config_path, url, key) as ask:
        found = _card(ask, adapter)
    folder = out or settings.feedback.data_dir / "cards" / found.name
    readme = model_card(found, base_model=base_model or _on_the_hub(settings), license=license_id)
    folder.mkdir(parents=True, exist_ok=True)
    files.replace(folder / "README.md", readme.encode())
    files.replace(folder / "card.html", page(found).encode())
    say(f"card: {folder / 'card.html'}, for the Hub: {folder / 'README.md'}")


@adapters.app.command("diff")
def diff(a: str, b: str, url: UrlOption = "", key: KeyOption = "", config_path: ConfigPath = None) -> None:
    """Two adapters side by side: manifests, raters and tastes, figures, verdicts, answers to the same prompts."""
    with asking(config_path, url, key) as ask:
        left, right = _card(ask, a), _card(ask, b)
    for part in differences(left, right):
        table = Table("", left.name, right.name, title=part.title, title_justify="left", show_lines=part.title == "Answers")
        for row in part.rows:
            table.add_row(*row)
        console.print(table)


def _card(ask: Ask, adapter: str) -> Card:
    return Card.model_validate(ask(SHOW_CARD, adapter=adapter))


def _on_the_hub(settings: Settings) -> str | None:
    base = settings.policy.base
    if base in NAMES:
        return load(base).hub_name
    return base if HUB_NAME.fullmatch(base) and not Path(base).exists() else None
