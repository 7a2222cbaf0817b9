"""The figure of a weight transplant."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from matplotlib.ticker import MaxNLocator

from ...render.plots import GREY, NotebookFigure, plain_frame
from ..directions import INTO_BASE, TOWARDS
from ..layer_sweep.plot import COLOURS, LABELS

if TYPE_CHECKING:
    import matplotlib.figure
    from matplotlib.axes import Axes

STYLES = {"suffix_and_head": ("-", "o"), "suffix": (":", "s")}


def draw(finding: Any) -> matplotlib.figure.Figure:
    """Decisions by number of last blocks, parts alone, and diversity of what is written."""
    panels = [_suffixes, _alone]
    panels += [_written] if finding.at(INTO_BASE, "suffix", "ttr") else []
    figure = NotebookFigure(figsize=(4.7 * len(panels), 4.1), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for ax, panel in zip(axes, panels, strict=True):
        panel(ax, finding)
        plain_frame(ax)
        ax.legend(frameon=False, fontsize=8)
    return figure


def _suffixes(ax: Axes, finding: Any) -> None:
    ax.set_title("changed decisions that ...", loc="left", fontsize=10)
    for direction, metric in TOWARDS.items():
        for kind in STYLES:
            label = LABELS[direction] if kind == "suffix_and_head" else None
            _line(ax, finding.at(direction, kind, metric), direction, kind, label)
    enough = finding.meta["options"]["enough"]
    ax.axhline(enough, color=GREY, lw=0.8, ls="--", label=f"enough: {enough:.0%}")
    ax.set_ylim(-0.03, 1.03)
    ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")
    _blocks_axis(ax)


def _alone(ax: Axes, finding: Any) -> None:
    ax.set_title("... by one part alone", loc="left", fontsize=10)
    names = [name for name, _ in finding.alone(INTO_BASE, "to_tuned")]
    for shift, (direction, metric) in zip((-0.2, 0.2), TOWARDS.items(), strict=True):
        rows = [row for _, row in finding.alone(direction, metric)]
        places = [i + shift for i in range(len(rows))]
        values = [0.0 if math.isnan(row["value"]) else row["value"] for row in rows]
        ax.bar(places, values, width=0.38, color=COLOURS[direction], label=direction)
        for place, row in zip(places, rows, strict=True):
            if math.isfinite(row["low"]):
                ax.vlines(place, row["low"], row["high"], "black", lw=1)
    ax.set_xticks(range(len(names)), [name.removeprefix("block ") for name in names])
    ax.tick_params(axis="x", rotation=90 if len(names) > 8 else 45, labelsize=8)
    ax.set_xlabel("block (0-based), or other part")
    ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")


def _written(ax: Axes, finding: Any) -> None:
    ax.set_title("type-token ratio of greedy text", loc="left", fontsize=10)
    for direction in TOWARDS:
        for kind in STYLES:
            label = direction if kind == "suffix_and_head" else None
            _line(ax, finding.at(direction, kind, "ttr"), direction, kind, label)
    for model, style in (("base", "--"), ("tuned", "-.")):
        (own,) = finding.at("unpatched", model, "ttr")
        ax.axhline(own["value"], color=GREY, ls=style, lw=1, label=f"the {model} model")
    _blocks_axis(ax)


def _blocks_axis(ax: Axes) -> None:
    ax.set_xlabel("last k blocks (dotted: without final norm and unembedding)")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))


def _line(
    ax: Axes, rows: Sequence[Mapping[str, Any]], direction: str, kind: str, label: str | None
) -> None:
    style, marker = STYLES[kind]
    numbers, values = [row["number"] for row in rows], [row["value"] for row in rows]
    ax.plot(numbers, values, ls=style, marker=marker, ms=4, color=COLOURS[direction], label=label)
    if kind == "suffix_and_head":
        low, high = ([row[end] for row in rows] for end in ("low", "high"))
        ax.fill_between(numbers, low, high, color=COLOURS[direction], alpha=0.2, lw=0)
