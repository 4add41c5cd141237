"""Writes docs/figures.md from what benchmarks measured. `make figures`.

Fresh results in `build/bench/` are copied to `benchmarks/results/`, which is committed; the page shows what lies there.
A quick run concludes nothing, so it is not copied.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.harness import FOLDER, ROOT
from benchmarks.plots import DRAWN

RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "figures.md"


def collect(fresh: Path, kept: Path) -> list[dict[str, Any]]:
    """Copy full runs from `fresh` to `kept` and return everything that is kept, by name."""
    kept.mkdir(parents=True, exist_ok=True)
    for path in sorted(fresh.glob("*.json")):
        if not json.loads(path.read_text(encoding="utf-8")).get("quick", False):
            (kept / path.name).write_bytes(path.read_bytes())
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(kept.glob("*.json"))]


def number(value: object) -> str:
    """Three significant digits of a float, anything else as it is, for a cell of a table."""
    return f"{value:.3g}" if isinstance(value, float) else str(value).replace("|", r"\|")


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Rows that share their names, as Markdown; nothing for none."""
    if not rows:
        return []
    cells = [[number(value) for value in row.values()] for row in rows]
    return ["", *(f"| {' | '.join(row)} |" for row in [list(rows[0]), ["---"] * len(rows[0]), *cells])]


def page(results: list[dict[str, Any]]) -> str:
    """The page's Markdown."""
    lines = ["# Figures", "", "Written by `make figures` from the JSON that `make bench-NAME` leaves; never by hand.", ""]
    for result in results:
        lines += [
            f"## {result['name']}: {'holds' if result['ok'] else 'does not hold'}",
            "",
            "| what | value | bound | ok |",
            "|---|---|---|---|",
        ]
        lines += [
            f"| {number(check['what'])} | {number(check['value'])} | {check['bound']} | {'yes' if check['ok'] else '**no**'} |"
            for check in result["checks"]
        ]
        lines += table(result["figures"].get("table", []))
        control = result["control"]
        used = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
        lines += [
            "",
            f"Control: {control['what']}: {'caught' if control['caught'] else '**not caught**'}. Seed {result['seed']}; {used}.",
            "",
        ]
        if result["name"] in DRAWN:
            lines += [f"![{result['name']}](../benchmarks/results/{result['name']}.svg)", ""]
    return "\n".join(lines)


def main() -> int:
    results = collect(FOLDER, RESULTS)
    for result in results:
        if draw := DRAWN.get(result["name"]):
            (RESULTS / f"{result['name']}.svg").write_text(draw(result), encoding="utf-8")
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(results), encoding="utf-8")
    print(f"{PAGE.relative_to(ROOT)}: {len(results)} benchmarks")
    return 0


if __name__ == "__main__":
    sys.exit(main())
