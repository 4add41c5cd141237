"""Docs are tested: what the code offers, the docs name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest
from prometheus_client import REGISTRY
from pydantic import BaseModel
from typer.main import get_command

import plaudit
from commands.settings import Settings
from deploy.gates import gates
from deploy.guards import GUARDRAILS, SAMPLE_RATIO
from feedback import events

ROOT = Path(__file__).resolve().parents[2]
DOCS = "\n".join(path.read_text() for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))])
README = (ROOT / "README.md").read_text()
ROOMS = ("commands", "serving", "feedback", "trainer", "deploy", "examples")


def test_readme_shows_every_file_of_the_rooms() -> None:
    files = [path for room in ROOMS for path in (ROOT / room).glob("*.py") if path.name != "__init__.py"]
    missing = [str(path.relative_to(ROOT)) for path in files if not re.search(rf"\b{re.escape(path.name)}\b", README)]
    assert missing == []


def test_readme_shows_no_file_that_is_gone() -> None:
    names = set(re.findall(r"^[│ ├└─]+([a-z_0-9]+\.py)\b", README, flags=re.M))
    present = {path.name for path in ROOT.rglob("*.py") if ".venv" not in path.parts}
    assert names, "the README has no tree"
    assert names - present == set()


def sections() -> list[tuple[str, type[BaseModel]]]:
    return [
        (name, field.annotation)
        for name, field in Settings.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
    ]


@pytest.mark.parametrize(("section", "model"), sections(), ids=lambda value: value if isinstance(value, str) else "")
def test_every_setting_is_documented_as_the_code_has_it(section: str, model: type[BaseModel]) -> None:
    assert len(model.model_fields) <= 20
    rows = [
        f"| `{section}.{key}` | `{field.get_default(call_default_factory=True)}` | {field.description} |"
        for key, field in model.model_fields.items()
    ]
    told = (ROOT / "docs" / "settings.md").read_text().splitlines()
    assert [row for row in rows if row not in told] == []


def test_every_event_is_documented() -> None:
    kinds = {value for kind in get_args(events.Event) for value in get_args(kind.model_fields["type"].annotation)}
    assert {kind for kind in kinds if f"`{kind}`" not in DOCS} == set()


def test_every_gate_and_guardrail_is_documented() -> None:
    names = [*(gate.name for gate in gates()), *(each.name for each in GUARDRAILS), SAMPLE_RATIO]
    assert [name for name in names if f"`{name}`" not in DOCS] == []


def test_every_command_is_documented() -> None:
    def names(command: object, prefix: str) -> list[str]:
        inner = getattr(command, "commands", None)
        return [prefix] if inner is None else [name for key, value in inner.items() for name in names(value, f"{prefix} {key}")]

    missing = [name for name in names(get_command(plaudit.app), "plaudit") if name not in DOCS]
    assert missing == []


def test_every_metric_is_documented() -> None:
    import trainer.metrics  # noqa: F401  (both register theirs)

    names = {metric.name for metric in REGISTRY.collect() if metric.name.startswith("plaudit")}
    assert names
    assert {name for name in names if name not in DOCS} == set()


def test_no_address_of_a_registry_in_the_lock() -> None:
    lock = (ROOT / "requirements.lock").read_text()
    assert "//" not in lock
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[^\s]+", line) for line in lock.splitlines())
