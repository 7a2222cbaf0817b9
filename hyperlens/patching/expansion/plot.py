"""The figure of an expansion that is taken away, or brought about."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from ...render.plots import BLUE, GREEN, GREY, ORANGE, VERMILION, NotebookFigure, plain_frame
from .finding import NAMES
from .interventions import ADDING, REMOVING, VARIANCE_CONTROL

if TYPE_CHECKING:
    import matplotlib.figure
    from matplotlib.axes import Axes

STYLES = {
    "base_directions": (BLUE, "o"),
    "new_directions": (VERMILION, "s"),
    "base_spectrum": (GREEN, "D"),
    "tuned_spectrum": (ORANGE, "^"),
    "tuned_covariance": ("#CC79A7", "v"),
}


def draw(finding: Any) -> matplotlib.figure.Figure:
    """Changed decisions over the dimension that is left or made, and diversity of greedy text."""
    has_text = math.isfinite(finding.value("none", 0, "base", "ttr"))
    panels = [("A  The tuned model, its expansion taken away", REMOVING, "to_tuned"),
              ("B  The base model, expanded", ADDING, "to_tuned")]  # fmt: skip
    panels += [("C  Diversity of greedy text", tuple(NAMES), "ttr")] if has_text else []
    figure = NotebookFigure(figsize=(4.6 * len(panels), 5.2), layout="constrained")
    figure.suptitle(
        f"{finding.meta['base']['name']} → {finding.meta['tuned']['name']}",
        fontsize=12,
        fontweight="bold",
        parse_math=False,
    )
    for axes, (title, ways, metric) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
    ):
        axes.set_title(title, loc="left", fontsize=10)
        for way in ways:
            _draw_way(axes, finding, way, metric)
        _draw_models(axes, finding, metric)
        axes.set_xlabel("dimension of the last block's output\n(participation ratio, naive)")
        plain_frame(axes)
    figure.axes[0].set_ylabel("changed decisions that are the tuned model's (share)")
    if has_text:
        figure.axes[2].set_ylabel("type-token ratio")
    named: dict[str, Any] = {}
    for axes in figure.axes:
        handles, labels = axes.get_legend_handles_labels()
        named |= dict(zip(labels, handles, strict=True))
    figure.legend(
        list(named.values()),
        list(named),
        loc="outside lower center",
        ncols=3,
        frameon=False,
        fontsize=9,
    )
    return figure


def _draw_way(axes: Axes, finding: Any, way: str, metric: str) -> None:
    """The way itself, filled, with intervals, and its control, hollow, at the same doses."""
    colour, mark = STYLES[way]
    for arm, filled in (("itself", True), (VARIANCE_CONTROL[way], False)):
        rows = [
            (finding.value(way, dose, arm, "dimension"), row)
            for dose in finding.doses(way)
            if (row := finding.at(way, dose, arm, metric)) is not None
        ]
        if not rows:
            continue
        x, y = [at for at, _ in rows], [row["value"] for _, row in rows]
        spread = [[max(0.0, row["value"] - row["low"]) for _, row in rows],
                  [max(0.0, row["high"] - row["value"]) for _, row in rows]]  # fmt: skip
        axes.errorbar(
            x, y, yerr=spread if filled else None, color=colour, marker=mark, ms=5, lw=1.2,
            ls="-" if filled else ":", mfc=colour if filled else "white", capsize=2,
            label=NAMES[way] if filled else None,
        )  # fmt: skip


def _draw_models(axes: Axes, finding: Any, metric: str) -> None:
    for side, style in (("base", "--"), ("tuned", "-.")):
        at = finding.value("none", 0, side, "dimension")
        value = finding.value("none", 0, side, metric)
        axes.axvline(at, color=GREY, ls=style, lw=0.8)
        axes.plot([at], [value], marker="*", ms=12, color="black", ls=style,
                  label=f"the {side} model as it is")  # fmt: skip
    axes.plot([], [], color=GREY, marker="o", mfc="white", ls=":", label="hollow: the control")
