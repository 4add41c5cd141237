"""Over-optimisation as a picture: what the reward model says and what people want, over the distance from the base."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GREY, ORANGE, BLUE, GREEN = "#767c85", "#e07b00", "#3b82f6", "#2f9e62"
"""Each is readable on white and on near black."""
INSIDE = {"free": (ORANGE, "neither budget nor stop"), "chosen": (BLUE, "as shipped")}
OUTSIDE = {"first": (ORANGE, "round 1"), "second": (BLUE, "round 2"), "known": (GREEN, "rewarded with gold itself")}


def draw(result: Mapping[str, Any]) -> str:
    """What `make bench-overopt` left, as SVG; the same bytes for the same figures."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.fonttype"] = "none"  # text stays text, which is smaller and can be read aloud
    matplotlib.rcParams["svg.hashsalt"] = "overopt"
    figure = Figure(figsize=(7.6, 4.6), layout="constrained")
    grid = figure.subplots(2, 2, sharex="col")
    for column, (kind, runs) in enumerate((("inside", INSIDE), ("outside", OUTSIDE))):
        for row, (name, unit) in enumerate((("score", "proxy, sd of the base's answers"), ("gain", "gold above the base's"))):
            axes = grid[row][column]
            _lines(axes, result["figures"][kind], runs, name)
            axes.set_ylabel(unit, color=GREY, fontsize=8)
        grid[0][column].set_title(f"optimum {kind} of what was rated", fontsize=9, color=GREY)
        grid[1][column].set_xlabel("distance from the base, sqrt(KL in nats)", color=GREY, fontsize=8)
        for text in grid[0][column].legend(fontsize=7, frameon=False).get_texts():
            text.set_color(GREY)
    figure.patch.set_alpha(0)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()[buffer.getvalue().index("<svg") :]
    return svg.replace("<svg ", '<svg role="img" aria-label="Proxy and gold over the distance from the base" ', 1)


def _lines(axes: Axes, worlds: Sequence[Mapping[str, Any]], runs: Mapping[str, tuple[str, str]], name: str) -> None:
    """One line a world and run, with a dot where the adapter was released."""
    for index, world in enumerate(worlds):
        for run, (colour, label) in runs.items():
            # For gold's own run the proxy is gold, which the other row shows.
            if run == "known" and name == "score":
                axes.plot([], [], color=colour, label=label if index == 0 else None)
                continue
            points = list(_points(world[run], name))
            axes.plot(*zip(*points, strict=True), color=colour, linewidth=1.2, label=label if index == 0 else None)
            released = world[run]["released"]
            if run != "free":
                axes.plot(max(world[run]["kl_nats"][released], 0.0) ** 0.5, world[run][name][released], "o", color=colour, markersize=4)
    axes.tick_params(colors=GREY, labelsize=7, length=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.patch.set_alpha(0)


def _points(curve: Mapping[str, Any], name: str) -> Iterator[tuple[float, float]]:
    """(sqrt(KL), value) of the measured steps; a KL estimated from samples can be a little below 0."""
    for kl, value in zip(curve["kl_nats"], curve[name], strict=True):
        if value is not None:
            yield max(kl, 0.0) ** 0.5, value
