"""Figures of a comparison: change along the layers, and where the tuned model's words come from.

Figures stand on their own: pyplot is not imported and no backend is chosen. Colours are those of
Okabe and Ito, told apart by colour-blind readers; line styles and hatches carry the same in print.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import SubplotSpec
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from ..compare.comparison import Comparison
from ..results.rows import Row

BLUE, VERMILION, GREEN, ORANGE = "#0072B2", "#D55E00", "#009E73", "#E69F00"
GREY = "#6E6E6E"

VIEW_TITLES = {
    "raw": "Raw residual stream",
    "unit_rms": "Scaled to unit RMS",
    "final_norm": "After the final norm",
}
LAYER_LABEL = "layer (0 = embedding, l = output of block l-1)"

# How the paper's Figure 4 parts ranks: up to which rank, colour, hatch, name, share of the table.
BUCKETS = (
    (1, BLUE, "", "rank 1", "rank_1"),
    (10, GREEN, "//", "rank 2-10", "rank_2_10"),
    (math.inf, ORANGE, "xx", "rank > 10", "rank_gt_10"),
)


class NotebookFigure(Figure):
    """A figure that notebooks show even where pyplot was never imported."""

    def _repr_png_(self) -> bytes:
        return png(self)


def png(figure: Figure, dpi: int = 144) -> bytes:
    """A figure as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def plot_layers(comparison: Comparison) -> Figure:
    """Figure 5 of arXiv 2605.22579, one row per measured view.

    Left: mean cosine and mean L2 distance of the two streams. Right: change of effective
    dimension; layer L has its own axis, so that it flattens no other layer.
    """
    views = measured_views(comparison)
    if not views:
        return _sentence("No drift and no participation ratio was measured.")
    layout = ConstrainedLayoutEngine(h_pad=0.07)
    figure = NotebookFigure(figsize=(13, 1.3 + 3.3 * len(views)), layout=layout)
    figure.suptitle(_models(comparison), fontsize=13, fontweight="bold", parse_math=False)
    grid = figure.add_gridspec(len(views), 2, width_ratios=(1, 1.35))
    for i, view in enumerate(views):
        _draw_drift(figure.add_subplot(grid[i, 0]), comparison, view)
        _draw_dimension(figure, grid[i, 1], comparison, view)
    panels = [axes for axes in figure.axes if axes.get_title(loc="left")]
    for letter, axes in zip("ABCDEF", panels, strict=False):
        axes.set_title(f"{letter}  {axes.get_title(loc='left')}", loc="left", fontsize=11)
    figure.supxlabel(
        "Bands and vertical segments: 95% intervals over sequences. Those of the effective "
        "dimension are for the ratio of the distribution the texts come from, with the\n"
        "resemblance of tokens within a sequence taken out: they may lie to one side of a bar. "
        "Grey box at the last layer: the range of all other layers, on its scale.",
        fontsize=8, color=GREY,
    )  # fmt: skip
    return figure


def measured_views(comparison: Comparison) -> list[str]:
    """The views that drift or dimension was measured in, raw first."""
    wanted = (("drift", "cosine"), ("drift", "l2"), ("participation_ratio", "delta"))
    found = {row.view for metric in wanted for row in _finite(comparison, *metric)}
    return [view for view in VIEW_TITLES if view in found]


def _draw_drift(axes: Axes, comparison: Comparison, view: str) -> None:
    axes.set_title(f"{VIEW_TITLES[view]}: drift", loc="left")
    cosine = _finite(comparison, "drift", "cosine", view)
    l2 = _finite(comparison, "drift", "l2", view)
    _layer_axis(axes, comparison.n_layers)
    if not cosine and not l2:
        return _say(axes, "not measured in this view")
    _draw_line(axes, cosine, BLUE, "o-")
    lowest = _limits(cosine)[0]
    # Room above 1, where most layers of most pairs lie.
    margin = 0.06 * (1.0 - lowest) + 1e-3
    axes.set_ylim(lowest - margin, 1.0 + margin)
    label_axis(axes, "mean cosine (circles, solid)", BLUE)
    right = axes.twinx()
    _draw_line(right, l2, VERMILION, "s--")
    right.set_ylim(0.0, 1.08 * _limits(l2)[1] or 1.0)
    unit = "residual units" if view == "raw" else "normed units"
    label_axis(right, f"mean L2 distance, {unit}\n(squares, dashed)", VERMILION)
    return None


def _draw_line(axes: Axes, rows: Sequence[Row], color: str, style: str) -> None:
    layers = [row.layer for row in rows]
    # Markers shrink with depth, so that those of 80 layers do not become a caterpillar.
    size = max(2.0, min(5.0, 120 / max(1, len(rows))))
    axes.plot(layers, [row.value for row in rows], style, color=color, markersize=size, lw=1.4)
    lows = [row.low if _has_interval(row) else row.value for row in rows]
    highs = [row.high if _has_interval(row) else row.value for row in rows]
    if any(map(_has_interval, rows)):
        axes.fill_between(layers, lows, highs, color=color, alpha=0.22, lw=0)


def _draw_dimension(figure: Figure, place: SubplotSpec, comparison: Comparison, view: str) -> None:
    rows = _finite(comparison, "participation_ratio", "delta", view)
    last = comparison.n_layers
    earlier, final = [r for r in rows if r.layer < last], [r for r in rows if r.layer == last]
    inner = place.subgridspec(1, 2, width_ratios=(4.2, 1))
    axes = figure.add_subplot(inner[0] if final else place)
    axes.set_title(f"{VIEW_TITLES[view]}: effective dimension", loc="left")
    _layer_axis(axes, last - 1 if final else last)
    axes.set_ylabel("ΔPR = PR(tuned) - PR(base)\n(dimensions)")
    if earlier:
        _draw_bars(axes, earlier, GREEN)
        _draw_cumulative(axes, earlier)
    else:
        _say(axes, "other layers were not measured" if final else "not measured in this view")
    if final:
        _draw_last(figure.add_subplot(inner[1]), final[0], earlier)


def _draw_bars(axes: Axes, rows: Sequence[Row], color: str, hatch: str = "") -> None:
    layers, values = [row.layer for row in rows], [row.value for row in rows]
    axes.bar(layers, values, width=0.8, color=color, hatch=hatch, edgecolor="white", lw=0.3)
    axes.axhline(0.0, color="black", lw=0.8)
    # Segments from low to high, not error bars: an interval need not contain its value.
    for row in filter(_has_interval, rows):
        axes.vlines(row.layer, row.low, row.high, "black", lw=min(1.2, 40 / len(rows)))
    axes.set_ylim(*_around_zero(rows))


def _draw_cumulative(axes: Axes, rows: Sequence[Row]) -> None:
    """The paper's grey dash-dot line; across a gap in the layers there is nothing to add up."""
    layers = [row.layer for row in rows]
    if layers != list(range(len(layers))):
        return
    sums = list(accumulate(row.value for row in rows))
    right = axes.twinx()
    right.plot(layers, sums, "-.", color=GREY, lw=1.4)
    label_axis(right, "cumulative ΔPR (dash-dot)", GREY)
    # Both zeros at the same height, or a bar above zero would stand beside a sum below it.
    bar_low, bar_high = axes.get_ylim()
    reach = max(map(abs, sums)) or 1.0
    scale = max(abs(bar_low), abs(bar_high))
    below = max(-bar_low / scale, -1.1 * min(sums) / reach)
    above = max(bar_high / scale, 1.1 * max(sums) / reach)
    axes.set_ylim(-below * scale, above * scale)
    right.set_ylim(-below * reach, above * reach)


def _draw_last(axes: Axes, final: Row, earlier: Sequence[Row]) -> None:
    _draw_bars(axes, [final], ORANGE, hatch="//")
    if earlier:
        low, high = min(r.value for r in earlier), max(r.value for r in earlier)
        axes.axhspan(low, high, color=GREY, alpha=0.3, lw=0)
        axes.set_ylim(*_around_zero([final, *(r._replace(low=math.nan) for r in earlier)]))
    axes.set_xlim(final.layer - 0.9, final.layer + 0.9)
    axes.set_xticks([final.layer])
    axes.set_xlabel("last layer")
    axes.yaxis.tick_right()
    axes.yaxis.set_label_position("right")
    axes.set_ylabel("ΔPR, own scale (dimensions)")
    axes.spines[["top", "left"]].set_visible(False)
    axes.set_title(f"{final.value:+.3g}", fontsize=10)


def plot_ranks(comparison: Comparison) -> Figure:
    """Figure 4 of arXiv 2605.22579: the base model's rank of every token the tuned model picks.

    Bins widen with rank; the shares of the paper's buckets stand in the legend.
    """
    bins = comparison.extras.get("rank_reordering", {}).get("rank_histogram", [])
    total = sum(one["count"] for one in bins)
    if not total:
        return _sentence("No histogram of ranks was measured (probe rank_reordering).")
    figure = NotebookFigure(figsize=(max(7.0, 1.5 + 0.55 * len(bins)), 4.6), layout="constrained")
    figure.suptitle(_models(comparison), fontsize=13, fontweight="bold", parse_math=False)
    axes = figure.add_subplot()
    shares = [100 * one["count"] / total for one in bins]
    styles = [next(b for b in BUCKETS if one["low"] <= b[0]) for one in bins]
    for i, (share, (_, color, hatch, _, _)) in enumerate(zip(shares, styles, strict=True)):
        axes.bar(i, share, width=0.85, color=color, hatch=hatch, edgecolor="white", lw=0.3)
        if share:
            label = f"{share:.1f}" if share >= 0.05 else "<0.1"
            axes.text(i, share, label, ha="center", va="bottom", fontsize=8)
    axes.set_xticks(range(len(bins)), [_bin_label(one) for one in bins], rotation=45, ha="right")
    axes.set_xlabel("base model's rank of the token the tuned model puts first")
    axes.set_ylabel("share of next-token decisions (%)")
    axes.set_ylim(0, 1.1 * max(shares))
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(f"{total:,.0f} decisions, teacher-forced", loc="left", fontsize=9, color=GREY)
    handles = [
        Patch(fc=color, hatch=hatch, ec="white", label=name + _share(comparison, metric))
        for _, color, hatch, name, metric in BUCKETS
    ]
    deep = _share(comparison, "rank_ge_200")
    if deep:
        handles.append(Patch(fc="none", ec="none", label=f"of which rank ≥ 200{deep}"))
    axes.legend(handles=handles, frameon=False)
    return figure


def _bin_label(one: Mapping[str, Any]) -> str:
    low, high = int(one["low"]), int(one["high"])
    return f"{low:,}" if low == high else f"{low:,}-{high:,}"


def _share(comparison: Comparison, metric: str) -> str:
    for row in _finite(comparison, "rank_reordering", metric):
        ends = f" [{100 * row.low:.1f}, {100 * row.high:.1f}]" if _has_interval(row) else ""
        return f": {100 * row.value:.1f}%{ends}"
    return ""


def _finite(comparison: Comparison, probe: str, metric: str, view: str | None = None) -> list[Row]:
    return [row for row in comparison.select(probe, metric, view) if math.isfinite(row.value)]


def _has_interval(row: Row) -> bool:
    return math.isfinite(row.low) and math.isfinite(row.high)


def _limits(rows: Sequence[Row]) -> tuple[float, float]:
    """Least and greatest of values and interval ends; (0, 0) of nothing."""
    ends = [row.value for row in rows]
    ends += [end for row in rows if _has_interval(row) for end in (row.low, row.high)]
    return min(ends, default=0.0), max(ends, default=0.0)


def _around_zero(rows: Sequence[Row]) -> tuple[float, float]:
    low, high = _limits(rows)
    low, high = min(low, 0.0), max(high, 0.0)
    margin = 0.08 * (high - low) or 1.0
    return low - margin, high + margin


def _layer_axis(axes: Axes, end: int) -> None:
    axes.set_xlim(-0.6, end + 0.6)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12))
    axes.set_xlabel(LAYER_LABEL)
    plain_frame(axes)


def plain_frame(axes: Axes) -> None:
    """No lid, and faint lines behind the data to read values by."""
    axes.spines["top"].set_visible(False)
    axes.grid(axis="y", lw=0.4, alpha=0.5)
    axes.set_axisbelow(True)


def label_axis(axes: Axes, text: str, color: str) -> None:
    """A vertical axis in the colour of what is read off it."""
    axes.set_ylabel(text, color=color)
    axes.tick_params(axis="y", colors=color)
    axes.spines["top"].set_visible(False)


def _say(axes: Axes, sentence: str) -> None:
    axes.set_yticks([])
    axes.text(0.5, 0.5, sentence, transform=axes.transAxes, ha="center", color=GREY)


def _sentence(sentence: str) -> Figure:
    figure = NotebookFigure(figsize=(8, 1.5))
    figure.text(0.5, 0.5, sentence, ha="center", va="center")
    return figure


def _models(comparison: Comparison) -> str:
    names = (_short(comparison.meta.get(side, {}).get("name", side)) for side in ("base", "tuned"))
    return " → ".join(names)


def _short(name: object, width: int = 45) -> str:
    # The default font draws Latin scripts; a name in another one must not spoil the figure.
    text = " ".join(str(name).split()).encode("latin-1", "replace").decode("latin-1")
    text = "".join(c if c.isprintable() else "?" for c in text)
    return text if len(text) <= width else text[: width // 2 - 1] + "…" + text[-width // 2 :]
