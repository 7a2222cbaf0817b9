"""The figure of a layer sweep."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...render.plots import BLUE, GREY, LAYER_LABEL, ORANGE, NotebookFigure, plain_frame
from ..directions import INTO_BASE, INTO_TUNED, TOWARDS

if TYPE_CHECKING:
    import matplotlib.figure

COLOURS = {INTO_BASE: BLUE, INTO_TUNED: ORANGE}
LABELS = {
    INTO_BASE: "become the tuned model's (tuned into base)",
    INTO_TUNED: "become the base's again (base into tuned)",
}
EFFECTS = {"state": BLUE, "stack": ORANGE, "interaction": GREY}


def draw(finding: Any) -> matplotlib.figure.Figure:
    """Decisions brought about, effects of the 2 x 2, and diversity of what is written."""
    panels = [_decisions]
    panels += [_effects] if finding.extras["effects"] else []
    panels += [_written] if finding.at(INTO_BASE, "ttr") else []
    figure = NotebookFigure(figsize=(4.4 * len(panels), 3.9), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for ax, panel in zip(axes, panels, strict=True):
        panel(ax, finding)
        ax.set_xlabel(LAYER_LABEL)
        ax.xaxis.get_major_locator().set_params(integer=True)
        plain_frame(ax)
        ax.legend(frameon=False, fontsize=8)
    return figure


def _decisions(ax: Any, finding: Any) -> None:
    ax.set_title("changed decisions that ...", loc="left", fontsize=10)
    for direction, metric in TOWARDS.items():
        _line(ax, finding.at(direction, metric), COLOURS[direction], LABELS[direction])
        for name in finding.activations[1:]:
            rows = finding.at(direction, metric, name)
            label = "placebos" if (direction, name) == (INTO_BASE, "other_text") else None
            ax.plot(*_points(rows), color=COLOURS[direction], ls=":", lw=1, label=label)
    ax.set_ylim(-0.03, 1.03)
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")


def _effects(ax: Any, finding: Any) -> None:
    ax.set_title("2 x 2 of every cut: effect on them", loc="left", fontsize=10)
    for name, colour in EFFECTS.items():
        where = {"state": "before the cut", "stack": "after the cut"}.get(name)
        _line(ax, finding.effect(name), colour, name + (f" {where}" if where else ""))
    ax.axhline(0, color=GREY, lw=0.8)


def _written(ax: Any, finding: Any) -> None:
    ax.set_title("type-token ratio of greedy text", loc="left", fontsize=10)
    for direction, colour in COLOURS.items():
        _line(ax, finding.at(direction, "ttr"), colour, direction)
        rows = finding.at(direction, "ttr", "rotation")
        if rows:
            ax.plot(*_points(rows), color=colour, ls=":", lw=1, label=f"{direction}, rotated")
    for model, style in (("base", "--"), ("tuned", "-.")):
        own = finding.unpatched(model, "ttr")
        ax.axhline(own["value"], color=GREY, ls=style, lw=1, label=f"the {model} model")


def _points(rows: Any) -> tuple[list[int], list[float]]:
    return [row["layer"] for row in rows], [row["value"] for row in rows]


def _line(ax: Any, rows: Any, colour: str, label: str) -> None:
    layers, values = _points(rows)
    ax.plot(layers, values, color=colour, marker="o", ms=4, label=label)
    low, high = ([row[end] for row in rows] for end in ("low", "high"))
    ax.fill_between(layers, low, high, color=colour, alpha=0.2, lw=0)
