"""Pictures of what benchmarks left, as SVG: readable on white and on near black, the same bytes for the same figures."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GREY, ORANGE, BLUE, GREEN = "#767c85", "#e07b00", "#3b82f6", "#2f9e62"

Result = Mapping[str, Any]
"""What a benchmark wrote."""


def crossover(result: Result) -> str:
    """For each adapter one dot by P's people and one by Q's; the sides differ in shape, too."""
    colours, markers, gap = {"P": BLUE, "Q": ORANGE}, {"P": "o", "Q": "D"}, 0.8
    panels = {"P": "learned from P's ratings", "Q": "learned from Q's ratings", "shuffled": "P's ratings, shuffled"}
    concierge, smollm2 = (result["figures"].get(policy, []) for policy in ("concierge", "smollm2"))
    places = [float(index) for index in range(len(concierge))] + [len(concierge) + gap + index for index in range(len(smollm2))]
    figure = _figure(7.6, 2.5)
    for axes, (what, title) in zip(figure.subplots(1, 3, sharey=True), panels.items(), strict=True):
        axes.axhline(0.5, color=GREY, linewidth=0.8, linestyle="--")
        for side, colour in colours.items():
            wins = [match[what]["wins"][side]["W"] for match in (*concierge, *smollm2)]
            axes.scatter(places, wins, s=20, color=colour, marker=markers[side], label=f"{side}'s people who rated nothing")
        axes.set_title(title, fontsize=9, color=GREY)
        axes.set_ylim(0, 1)
        ticks = [f"concierge, {len(concierge)} seeds", *["SmolLM2"] * len(smollm2)]
        axes.set_xticks([(len(concierge) - 1) / 2, *places[len(concierge) :]], ticks)
        _plain(axes)
        axes.spines["bottom"].set_visible(False)
    figure.axes[0].set_ylabel("wins against the base", color=GREY, fontsize=8)
    figure.legend(
        *figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8, frameon=False, labelcolor=GREY
    )
    return _svg(figure, "crossover", "Wins of each adapter by both sides' people")


def overopt(result: Result) -> str:
    """What the reward model says and what people want, over the distance from the base."""
    inside = {"free": (ORANGE, "neither budget nor stop"), "chosen": (BLUE, "as shipped")}
    outside = {"first": (ORANGE, "round 1"), "second": (BLUE, "round 2"), "known": (GREEN, "rewarded with gold itself")}
    figure = _figure(7.6, 4.6)
    grid = figure.subplots(2, 2, sharex="col")
    for column, (kind, runs) in enumerate((("inside", inside), ("outside", outside))):
        for row, (name, unit) in enumerate((("score", "proxy, sd of the base's answers"), ("gain", "gold above the base's"))):
            axes = grid[row][column]
            _runs(axes, result["figures"][kind], runs, name)
            axes.set_ylabel(unit, color=GREY, fontsize=8)
            _plain(axes)
        grid[0][column].set_title(f"optimum {kind} of what was rated", fontsize=9, color=GREY)
        grid[1][column].set_xlabel("distance from the base, sqrt(KL in nats)", color=GREY, fontsize=8)
        grid[0][column].legend(fontsize=7, frameon=False, labelcolor=GREY)
    return _svg(figure, "overopt", "Proxy and gold over the distance from the base")


def _runs(axes: Axes, worlds: Sequence[Result], runs: Mapping[str, tuple[str, str]], name: str) -> None:
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


def _points(curve: Result, name: str) -> Iterator[tuple[float, float]]:
    """(sqrt(KL), value) of the measured steps; a KL estimated from samples can be a little below 0."""
    for kl, value in zip(curve["kl_nats"], curve[name], strict=True):
        if value is not None:
            yield max(kl, 0.0) ** 0.5, value


LABEL_METHODS = {"ours": (BLUE, "reward model + PPO"), "dpo": (ORANGE, "DPO (TRL)"), "kto": (GREEN, "KTO (TRL)")}


def labels(result: Result) -> str:
    """What a label buys each method: medians over worlds as lines, each world as a dot."""
    rows = result["figures"]["cells"]
    counts = sorted({int(row["labels"]) for row in rows})
    figure = _figure(5.4, 3.4)
    axes = figure.add_subplot()
    for place, (method, (colour, name)) in enumerate(LABEL_METHODS.items()):
        wins = [[row["wins"] for row in rows if row["method"] == method and row["labels"] == count] for count in counts]
        axes.plot(counts, [median(each) for each in wins], marker="o", markersize=4, color=colour, label=name)
        for count, each in zip(counts, wins, strict=True):
            axes.plot([count * 1.04 ** (place - 1)] * len(each), each, ".", markersize=3, alpha=0.5, color=colour)
    axes.axhline(0.5, linewidth=0.8, color=GREY, linestyle="--")
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.set_xlabel("labels", color=GREY, fontsize=8)
    axes.set_ylabel("wins against the base", color=GREY, fontsize=8)
    _plain(axes)
    axes.legend(fontsize=8, frameon=False, labelcolor=GREY)
    return _svg(figure, "labels", "Wins by the hidden preference over the number of labels")


DRAWN: dict[str, Callable[[Result], str]] = {"crossover": crossover, "labels": labels, "overopt": overopt}
"""By the benchmark's name."""


def _figure(width: float, height: float) -> Figure:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _plain(axes: Axes) -> None:
    axes.tick_params(colors=GREY, which="both", labelsize=7, length=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.patch.set_alpha(0)


def _svg(figure: Figure, name: str, label: str) -> str:
    import matplotlib

    figure.patch.set_alpha(0)
    buffer = io.StringIO()
    # Text stays text, which is smaller and can be read aloud; ids come from the name, not from chance.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()[buffer.getvalue().index("<svg") :]
    return svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
