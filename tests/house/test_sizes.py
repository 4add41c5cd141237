"""A file stays under 400 lines, a function under 60, its parameters under 9. The exceptions are named and may only shrink."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CODE = ("commands", "feedback", "deploy", "serving", "trainer", "examples", "benchmarks")
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_PARAMETERS = 8
LONGER_FUNCTIONS = {
    "trainer/ppo.py:train": 120,  # the one training loop, read top to bottom
}


def sources() -> list[Path]:
    return [ROOT / "plaudit.py", *(path for room in CODE for path in sorted((ROOT / room).rglob("*.py")))]


def functions(path: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    names = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    return len([name for name in names if name.arg not in ("self", "cls")])


def is_command(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """A typer command: its parameters are the command line's options."""
    return any(isinstance(item, ast.Call) and getattr(item.func, "attr", "") in ("command", "callback") for item in node.decorator_list)


def test_files_are_short() -> None:
    long = {str(path.relative_to(ROOT)): lines for path in sources() if (lines := path.read_text().count("\n")) > MAX_FILE_LINES}
    assert long == {}


def test_functions_are_short() -> None:
    long = {}
    for path in sources():
        for node in functions(path):
            name = f"{path.relative_to(ROOT)}:{node.name}"
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > LONGER_FUNCTIONS.get(name, MAX_FUNCTION_LINES):
                long[name] = lines
    assert long == {}


def test_functions_take_few_parameters() -> None:
    many = {
        f"{path.relative_to(ROOT)}:{node.name}": parameters(node)
        for path in sources()
        for node in functions(path)
        if parameters(node) > MAX_PARAMETERS and not is_command(node)
    }
    assert many == {}


def test_ppo_and_the_newcomers_path_stay_readable() -> None:
    path = ["README.md", "serving/chat.py", "feedback/events.py", "feedback/sqlite_log.py", "trainer/ppo.py", "deploy/rollout.py"]
    lines = {name: (ROOT / name).read_text().count("\n") for name in path}
    assert lines["trainer/ppo.py"] <= 250
    assert sum(lines.values()) < 1500, lines
