"""Imports go one way: feedback <- deploy <- {serving, trainer} <- commands, plaudit.py, and only the trainer knows torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("feedback", "deploy", "serving", "trainer")
MAY_IMPORT = {
    "feedback": {"feedback"},
    "deploy": {"feedback", "deploy"},
    "serving": {"feedback", "deploy", "serving"},
    "trainer": {"feedback", "deploy", "trainer"},
}
HEAVY = {"torch", "transformers", "peft", "vllm", "accelerate"}


def imported_roots(source: str) -> set[str]:
    """The first name of every module that the source imports, at any depth of nesting."""
    roots: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            roots.add(node.module.split(".")[0])
    return roots


def wrong_arrows(room: str, source: str) -> set[str]:
    """What a file of this room imports and may not."""
    roots = imported_roots(source)
    others = roots & {*ROOMS, "plaudit", "commands", "examples", "benchmarks", "tests"}
    heavy = set() if room == "trainer" else roots & HEAVY
    return (others - MAY_IMPORT[room]) | heavy | (roots & {"vllm"})


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_only_what_lies_below(room: str) -> None:
    found = {str(path.relative_to(ROOT)): wrong_arrows(room, path.read_text()) for path in sorted((ROOT / room).rglob("*.py"))}
    assert {path: arrows for path, arrows in found.items() if arrows} == {}


@pytest.mark.parametrize(
    ("room", "line", "caught"),
    [
        ("feedback", "from deploy.registry import Registry", {"deploy"}),
        ("serving", "import trainer.ppo", {"trainer"}),
        ("deploy", "def f():\n    import torch", {"torch"}),
        ("trainer", "import torch", set()),
        ("trainer", "import vllm", {"vllm"}),
    ],
)
def test_the_check_catches_what_it_must(room: str, line: str, caught: set[str]) -> None:
    assert wrong_arrows(room, line) == caught


def test_settings_and_services_load_without_torch() -> None:
    code = (
        "import sys, plaudit, serving.app, serving.config, deploy.config, deploy.controller, feedback.stores, trainer.config\n"
        f"heavy = {sorted(HEAVY)!r}\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
