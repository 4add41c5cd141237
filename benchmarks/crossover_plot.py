"""The crossover as a picture: for each adapter one dot by P's people and one by Q's."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

GREY, COLOURS, MARKERS = "#767c85", {"P": "#3b82f6", "Q": "#e07b00"}, {"P": "o", "Q": "D"}
"""Each is readable on white and on near black; the sides differ in shape, too."""
PANELS = {"P": "learned from P's ratings", "Q": "learned from Q's ratings", "shuffled": "P's ratings, shuffled"}
GAP = 0.8
"""Between the policies, in dots."""


def draw(result: Mapping[str, Any]) -> str:
    """What `make bench-crossover` left, as SVG; the same bytes for the same figures."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.fonttype"] = "none"  # text stays text, which is smaller and can be read aloud
    matplotlib.rcParams["svg.hashsalt"] = "crossover"
    concierge, smollm2 = (result["figures"].get(policy, []) for policy in ("concierge", "smollm2"))
    places = [float(index) for index in range(len(concierge))] + [len(concierge) + GAP + index for index in range(len(smollm2))]
    figure = Figure(figsize=(7.6, 2.5), layout="constrained")
    for axes, (what, title) in zip(figure.subplots(1, 3, sharey=True), PANELS.items(), strict=True):
        axes.axhline(0.5, color=GREY, linewidth=0.8, linestyle="--")
        for side in COLOURS:
            wins = [match[what]["wins"][side]["W"] for match in (*concierge, *smollm2)]
            axes.scatter(places, wins, s=20, color=COLOURS[side], marker=MARKERS[side], label=f"{side}'s people who rated nothing")
        axes.set_title(title, fontsize=9, color=GREY)
        axes.set_ylim(0, 1)
        axes.set_xticks(
            [(len(concierge) - 1) / 2, *places[len(concierge) :]], [f"concierge, {len(concierge)} seeds", *["SmolLM2"] * len(smollm2)]
        )
        axes.tick_params(colors=GREY, labelsize=7, length=0)
        axes.spines[["top", "right", "bottom"]].set_visible(False)
        axes.spines["left"].set_color(GREY)
        axes.patch.set_alpha(0)
    figure.axes[0].set_ylabel("wins against the base", color=GREY, fontsize=8)
    legend = figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    for text in legend.get_texts():
        text.set_color(GREY)
    figure.patch.set_alpha(0)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()[buffer.getvalue().index("<svg") :]
    return svg.replace("<svg ", '<svg role="img" aria-label="Wins of each adapter by both sides\' people" ', 1)
