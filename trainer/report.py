"""What became of an adapter, for people: who rated, what they preferred, what changed, what did not. One HTML file and its gist."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from deploy.records import AdapterRecord
from deploy.registry import Registry
from feedback import files
from feedback.errors import NotFound

LIMITS = (
    "Behaviour carries the preferences of whoever rated; the table above says who that was.",
    "Learning from ratings changes behaviour, not facts; the facts above were compared, nothing else was.",
    "A reward model does not notice over-optimisation where nobody has rated; a second round that rates these answers does.",
)
STEP_PLOTS = (
    ("score", "Proxy reward", "sd of the base's answers"),
    ("stop_score", "Other raters' reward model", "sd of the base's answers"),
    ("kl_nats", "KL to the reference", "nats a reply"),
    ("reply_tokens", "Length", "tokens a reply"),
)
FIGURES = ("length", "finished", "on_topic", "repetition", "refusal")
"""Of the evaluation, with base and candidate."""


def report_of(record: AdapterRecord, registry: Registry, data_dir: Path, target: Path) -> str:
    """Write the report of a trained adapter and return its gist for a terminal. Raises NotFound where it was not trained here."""
    training = registry.attestations(record.id, "training")
    evaluation = registry.attestations(record.id, "evaluation")
    if not training or not evaluation:
        raise NotFound(f"adapter {record.id[:16]} ({record.kind}) has no training and no evaluation to report on", field="adapter")
    folder = data_dir / "cycles" / str(training[-1].body["cycle"])
    metrics = [json.loads(line) for line in _read(folder / "metrics.jsonl").splitlines()]
    reward: Any = json.loads(_read(folder / "reward.json"))
    details: Any = json.loads(_read(folder / "details.json"))
    rollouts = registry.rollouts(record.id)
    told: dict[str, Any] = {
        "adapter": record,
        "manifest": record.manifest,
        "evaluation": evaluation[-1].body,
        "figures": FIGURES,
        "reward": reward,
        "preferences": preferences(reward["tastes"]),
        "details": details,
        "rollouts": rollouts,
        "people": [row["reason"] for rollout in rollouts for row in rollout.verdicts if row["name"] == "wins"],
        "metrics": metrics,
        "plots": plots_of(folder, reward, details),
        "stopped_because": training[-1].body.get("stopped_because"),
        "alarms": training[-1].body.get("warnings", []),
        "ensemble": reward.get("family") == "ensemble",
        "seconds": training[-1].body.get("seconds"),
        "simulated": reward["simulated_raters"],
        "limits": LIMITS,
    }
    page, gist = (_rendered(name, told) for name in ("report.html", "report.txt"))
    target.parent.mkdir(parents=True, exist_ok=True)
    files.replace(target, page.encode())
    return gist


def _rendered(name: str, told: dict[str, Any]) -> str:
    templates = jinja2.Environment(
        loader=jinja2.ChoiceLoader([jinja2.PackageLoader("trainer"), jinja2.PackageLoader("deploy")]),
        autoescape=name.endswith(".html"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return templates.get_template(name).render(told)


def preferences(tastes: Sequence[dict[str, Any]]) -> list[tuple[str, list[str], list[str]]]:
    """For each cohort what it surely likes and dislikes, the strongest first."""
    sure = sorted((taste for taste in tastes if taste["low"] > 0 or taste["high"] < 0), key=lambda taste: -abs(taste["correlation"]))
    cohorts = dict.fromkeys(taste["cohort"] for taste in tastes)
    liked = {cohort: [taste["what"] for taste in sure if taste["cohort"] == cohort and taste["low"] > 0] for cohort in cohorts}
    disliked = {cohort: [taste["what"] for taste in sure if taste["cohort"] == cohort and taste["high"] < 0] for cohort in cohorts}
    return [(cohort, liked[cohort], disliked[cohort]) for cohort in cohorts if liked[cohort] or disliked[cohort]]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as exc:
        raise NotFound(f"report: {path} cannot be read: {exc.strerror}") from exc


def plots_of(folder: Path, reward: dict[str, Any], details: dict[str, Any]) -> list[str]:
    """Every plot for which the cycle left figures."""
    runs = {"candidate": folder / "metrics.jsonl"} | {_run(path.parent): path for path in sorted(folder.glob("seed-*/metrics.jsonl"))}
    steps = {name: [json.loads(line) for line in _read(path).splitlines()] for name, path in runs.items()}
    found = []
    for name, title, unit in STEP_PLOTS:
        lines = {
            run: ([row["step"] for row in rows], [row[name] for row in rows])
            for run, rows in steps.items()
            if rows and rows[0].get(name) is not None
        }
        if lines:
            found.append(plot(title, "PPO step", unit, lines))
    if positions := details.get("kl", {}).get("by_position"):
        by_position = {"": (list(range(1, len(positions) + 1)), positions)}
        found.append(plot("KL by token position", "token of the reply", "nats a token", by_position, marker=""))
    if curve := (reward.get("calibration") or {}).get("curve"):
        foretold, chosen, _ = zip(*curve, strict=True)
        lines = {"held-out choices": (list(foretold), list(chosen)), "exactly right": ([0.0, 1.0], [0.0, 1.0])}
        found.append(plot("Reward model: calibration", "chance foretold for side a", "share that chose a", lines))
    return found


def _run(folder: Path) -> str:
    """What the words beside the plots call this run of PPO."""
    return f"seed {json.loads(_read(folder / 'ppo.json'))['seed']}"


Line = tuple[Sequence[float], Sequence[float]]


def plot(title: str, across: str, up: str, lines: Mapping[str, Line], marker: str = "o") -> str:
    """Lines by name as inline SVG, in the page's text colour, so that it reads in light and dark. A second line is dashed."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.6, 2.2), layout="constrained")
    axes = figure.add_subplot()
    for index, (name, (x, y)) in enumerate(lines.items()):
        axes.plot(x, y, marker=marker, markersize=3, linewidth=1.5, linestyle="--" if index else "-", label=name)
    if len(lines) > 1:
        axes.legend(fontsize="x-small", frameon=False)
    axes.set(title=title, xlabel=across, ylabel=up)
    axes.spines[["top", "right"]].set_visible(False)
    figure.patch.set_alpha(0)
    axes.patch.set_alpha(0)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()[buffer.getvalue().index("<svg") :]
    return re.sub(r"#000000|black", "currentColor", svg).replace("<svg ", f'<svg role="img" aria-label="{title}" ', 1)
