"""The figure of the norm question."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ...render.plots import BLUE, GREEN, GREY, ORANGE, VERMILION, NotebookFigure, plain_frame
from .finding import STEPS, SWAPPED

if TYPE_CHECKING:
    import matplotlib.figure
    from matplotlib.axes import Axes

COLOURS = dict(zip(STEPS, (BLUE, ORANGE, GREEN, VERMILION, GREY), strict=True))


def draw(finding: Any) -> matplotlib.figure.Figure:
    """How the change comes about step by step, the 2 x 2, and what swaps change."""
    figure = NotebookFigure(figsize=(14, 4.2), layout="constrained")
    figure.suptitle(
        f"{finding.meta['base']['name']} → {finding.meta['tuned']['name']}",
        fontsize=12,
        fontweight="bold",
        parse_math=False,
    )
    steps, cells, swaps = figure.subplots(1, 3, width_ratios=(1.3, 1, 1.1))
    _draw_steps(steps, finding)
    _draw_cells(cells, finding)
    _draw_swaps(swaps, finding)
    return figure


def _draw_steps(axes: Axes, finding: Any) -> None:
    axes.set_title("A  From raw to after the norm", loc="left", fontsize=10)
    at = 0.0
    for place, (name, words) in enumerate(STEPS.items()):
        row = finding.dimension(name)
        start = 0.0 if name == "change" else at
        axes.barh(place, row["value"], left=start, color=COLOURS[name], height=0.6, label=words)
        ends = [[abs(row["value"] - row["low"])], [abs(row["high"] - row["value"])]]
        if row["low"] == row["low"]:
            axes.errorbar(start + row["value"], place, xerr=ends, color="black", capsize=2, lw=1)
        at = start + row["value"]
    axes.set_yticks(range(len(STEPS)), list(STEPS.values()), fontsize=8)
    axes.invert_yaxis()
    axes.axvline(0, color=GREY, lw=0.8)
    axes.set_xlabel("change of dimension, tuned − base (segments: 95%)")
    axes.spines[["top", "right"]].set_visible(False)


def _draw_cells(axes: Axes, finding: Any) -> None:
    axes.set_title("B  Either stream through either norm", loc="left", fontsize=10)
    for norm, colour, mark in (("base", BLUE, "o"), ("tuned", VERMILION, "s")):
        rows = [finding.dimension(f"{stream}_stream_{norm}_norm") for stream in ("base", "tuned")]
        _segments(axes, [0, 1], rows, colour, mark, f"the {norm} model's norm")
    raw = [finding.dimension(f"raw_{stream}") for stream in ("base", "tuned")]
    _segments(axes, [0, 1], raw, GREY, "^", "raw, no norm")
    axes.set_xticks([0, 1], ["base stream", "tuned stream"])
    axes.set_xlim(-0.25, 1.25)
    axes.set_ylabel("dimension (participation ratio)")
    axes.legend(frameon=False, fontsize=8)
    plain_frame(axes)


def _draw_swaps(axes: Axes, finding: Any) -> None:
    axes.set_title("C  Changed decisions that a swap moves", loc="left", fontsize=10)
    for place, (name, (metric, _)) in enumerate(SWAPPED.items()):
        row = finding.decided(name, metric)
        colour = VERMILION if name.startswith("norm") else BLUE
        axes.barh(place, row["value"], color=colour, height=0.6)
        if row["low"] == row["low"]:
            axes.plot([row["low"], row["high"]], [place, place], color="black", lw=1.2)
    labels = [words.replace(" with ", "\nwith ") for _, words in SWAPPED.values()]
    axes.set_yticks(range(len(SWAPPED)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.02)
    axes.set_xlabel("share that become the other model's choice")
    axes.spines[["top", "right"]].set_visible(False)


def _segments(
    axes: Axes, x: list[int], rows: list[Mapping[str, Any]], colour: str, mark: str, label: str
) -> None:
    values = [row["value"] for row in rows]
    axes.plot(x, values, color=colour, marker=mark, lw=1.4, label=label)
    for place, row in zip(x, rows, strict=True):
        if row["low"] == row["low"]:
            axes.plot([place, place], [row["low"], row["high"]], color=colour, lw=1.2)
