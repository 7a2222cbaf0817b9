"""Figures: the right number of marks, for anything a comparison may hold, and no global state."""

import io
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.figure
import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.colors import to_hex
from test_results import (
    NAN,
    VIEWS,
    change_rows,
    keep_rows,
    make_comparison,
    make_identical,
    partial_comparisons,
)

from hyperlens.compare.comparison import Comparison
from hyperlens.render import plots

DEPTHS = [1, 2, 5, 12, 32, 80]


def draw(figure: matplotlib.figure.Figure) -> bytes:
    """Everything is drawn only now; a warning of matplotlib's is an error here."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=50)
    return buffer.getvalue()


def panels(figure: matplotlib.figure.Figure, label: str) -> list[Axes]:
    """The axes whose vertical axis is named so."""
    return [axes for axes in figure.axes if label in axes.get_ylabel()]


def segments(axes: Axes) -> list[tuple[float, float, float]]:
    """(layer, low, high) of the intervals drawn beside bars."""
    found = []
    for lines in axes.collections:
        if isinstance(lines, LineCollection):
            for segment in lines.get_segments():
                (x, low), (_, high) = segment
                found.append((float(x), float(low), float(high)))
    return found


@pytest.mark.parametrize("n_layers", DEPTHS)
def test_every_layer_of_every_view_has_its_marks(n_layers: int) -> None:
    comparison = make_comparison(n_layers)
    figure = plots.plot_layers(comparison)
    draw(figure)
    for view, axes, right in zip(
        VIEWS, panels(figure, "cosine"), panels(figure, "L2"), strict=True
    ):
        for one, metric in ((axes, "cosine"), (right, "l2")):
            rows = comparison.select("drift", metric, view)
            (line,) = one.lines
            assert list(line.get_xdata()) == [row.layer for row in rows]
            assert list(line.get_ydata()) == [row.value for row in rows]
            assert len(one.collections) == 1
    for view, axes, own in zip(
        VIEWS, panels(figure, "PR(tuned)"), panels(figure, "own scale"), strict=True
    ):
        rows = comparison.select("participation_ratio", "delta", view)
        heights = [bar.get_height() for bar in axes.patches]
        assert heights == [row.value for row in rows[:-1]]
        assert own.patches[0].get_height() == rows[-1].value
        assert segments(axes) == [(row.layer, row.low, row.high) for row in rows[:-1]]
        assert segments(own) == [(rows[-1].layer, rows[-1].low, rows[-1].high)]
        assert own.get_title() == f"{rows[-1].value:+.3g}"


def test_the_last_layer_is_set_apart_by_colour_and_axis() -> None:
    figure = plots.plot_layers(make_comparison(12))
    draw(figure)
    for axes, own in zip(panels(figure, "PR(tuned)"), panels(figure, "own scale"), strict=True):
        assert {to_hex(bar.get_facecolor()) for bar in axes.patches} == {plots.GREEN.lower()}
        assert to_hex(own.patches[0].get_facecolor()) == plots.ORANGE.lower()
        low, high = axes.get_ylim()
        assert max(-low, high) < 10, "a large last bar must not flatten the others"


def test_the_grey_line_is_the_running_sum() -> None:
    comparison = make_comparison(12)
    figure = plots.plot_layers(comparison)
    for view, axes in zip(VIEWS, panels(figure, "cumulative"), strict=True):
        values = [r.value for r in comparison.select("participation_ratio", "delta", view)][:-1]
        (line,) = axes.lines
        assert list(line.get_ydata()) == pytest.approx(
            [math.fsum(values[: i + 1]) for i in range(len(values))]
        )
        assert line.get_linestyle() == "-."


@pytest.mark.parametrize("n_layers", [2, 12])
def test_both_zeros_are_at_the_same_height(n_layers: int) -> None:
    figure = plots.plot_layers(make_comparison(n_layers))
    draw(figure)
    for bars, line in zip(panels(figure, "PR(tuned)"), panels(figure, "cumulative"), strict=True):
        heights = [-low / (high - low) for low, high in (bars.get_ylim(), line.get_ylim())]
        assert heights[0] == pytest.approx(heights[1])


def test_across_a_gap_there_is_no_running_sum() -> None:
    comparison = keep_rows(make_comparison(12), lambda row: row.layer in (0, 5, 6, 12))
    figure = plots.plot_layers(comparison)
    assert not panels(figure, "cumulative")
    assert [len(axes.patches) for axes in panels(figure, "PR(tuned)")] == [3, 3, 3]


def test_intervals_are_inside_the_axes_even_beside_their_values() -> None:
    def beside(row: Any) -> Any:
        return row._replace(low=row.value + 30, high=row.value + 40)

    figure = plots.plot_layers(change_rows(make_comparison(5), beside))
    draw(figure)
    for label in ("PR(tuned)", "own scale"):
        for axes in panels(figure, label):
            low, high = axes.get_ylim()
            assert segments(axes)
            assert all(low < a < b < high for _, a, b in segments(axes))


def test_without_intervals_there_are_none() -> None:
    bare = change_rows(make_comparison(5), lambda row: row._replace(low=NAN, high=NAN))
    figure = plots.plot_layers(bare)
    draw(figure)
    assert not any(segments(axes) for axes in figure.axes)
    assert not any(axes.collections for axes in panels(figure, "cosine"))


@pytest.mark.parametrize("name", partial_comparisons())
def test_partial_comparisons_are_drawn(name: str) -> None:
    comparison = partial_comparisons()[name]
    assert draw(plots.plot_layers(comparison)).startswith(b"\x89PNG")
    assert draw(plots.plot_ranks(comparison)).startswith(b"\x89PNG")


def test_only_measured_views_are_drawn() -> None:
    figure = plots.plot_layers(keep_rows(make_comparison(5), lambda row: row.view == "unit_rms"))
    titles = [axes.get_title(loc="left") for axes in figure.axes if axes.get_title(loc="left")]
    assert titles == ["A  Scaled to unit RMS: drift", "B  Scaled to unit RMS: effective dimension"]


def test_what_is_missing_is_said() -> None:
    def texts(comparison: Comparison) -> str:
        figure = plots.plot_layers(comparison)
        inside = [text.get_text() for axes in figure.axes for text in axes.texts]
        return " ".join([*(text.get_text() for text in figure.texts), *inside])

    cases = partial_comparisons()
    assert texts(cases["only drift"]).count("not measured in this view") == 3
    assert texts(cases["only participation_ratio"]).count("not measured in this view") == 3
    assert "not measured in this view" not in texts(cases["only raw"])
    assert texts(cases["last layer"]).count("other layers were not measured") == 3
    assert "No drift and no participation ratio" in texts(cases["nothing"])


@pytest.mark.parametrize("n_layers", [5, 12, 32])
def test_nothing_written_overlaps(n_layers: int) -> None:
    names = ("organisation/" + "model-" * 9, "runs/" + "tuned-" * 9)
    figure = plots.plot_layers(make_comparison(n_layers, names=names))
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    written = [figure._suptitle, figure._supxlabel]  # type: ignore[attr-defined]
    for axes in figure.axes:
        written += [axes.title, axes._left_title, axes.xaxis.label, axes.yaxis.label]  # type: ignore[attr-defined]
        written += [*axes.get_xticklabels(), *axes.get_yticklabels()]
    shown = [one for one in written if one.get_visible() and one.get_text()]
    boxes = [one.get_window_extent(renderer) for one in shown]
    # Ticks outside the limits and labels of an axis drawn by its twin are not on the page.
    page = [
        (one, box)
        for one, box in zip(shown, boxes, strict=True)
        if box.width > 0 and is_drawn(figure, one)
    ]
    for i, (one, box) in enumerate(page):
        assert figure.bbox.contains(box.x0, box.y0), one
        assert figure.bbox.contains(box.x1, box.y1), one
        for other, other_box in page[i + 1 :]:
            assert not box.overlaps(other_box), (one, other)


def is_drawn(figure: matplotlib.figure.Figure, text: Any) -> bool:
    """Whether a text is drawn: of tick labels, only those within the axis' limits."""
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            if text in axis.get_ticklabels():
                low, high = sorted(axis.get_view_interval())
                x, y = text.get_position()
                return axis.get_visible() and low <= (x if axis is axes.xaxis else y) <= high
            if text is axis.label:
                return bool(axis.get_visible())
    return True


@pytest.mark.parametrize("name", ["$x_{", "模型", "a\nb", "\x1b[31m", "\ud800", "x" * 500])
def test_any_name_can_stand_in_the_title(name: str) -> None:
    comparison = make_comparison(2, names=(name, "tuned"))
    for figure in (plots.plot_layers(comparison), plots.plot_ranks(comparison)):
        draw(figure)
        assert figure.get_suptitle().endswith(" → tuned")


def test_identical_models_are_drawn_at_rest() -> None:
    figure = plots.plot_layers(make_identical(5))
    draw(figure)
    for axes in panels(figure, "PR(tuned)"):
        assert {bar.get_height() for bar in axes.patches} == {0.0}


def test_the_histogram_of_ranks() -> None:
    comparison = make_comparison(5)
    figure = plots.plot_ranks(comparison)
    draw(figure)
    (axes,) = figure.axes
    assert [bar.get_height() for bar in axes.patches] == pytest.approx([60, 15, 10, 8, 5, 2])
    assert [label.get_text() for label in axes.get_xticklabels()] == [
        *("1", "2", "3-5", "6-10", "11-20", "21-50"),
    ]
    assert [to_hex(bar.get_facecolor()).upper() for bar in axes.patches] == [
        *(plots.BLUE, plots.GREEN, plots.GREEN, plots.GREEN, plots.ORANGE, plots.ORANGE),
    ]
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == [
        "rank 1: 60.0% [59.0, 61.0]",
        "rank 2-10: 30.0% [29.0, 31.0]",
        "rank > 10: 10.0% [9.0, 11.0]",
        "of which rank ≥ 200: 2.0% [1.0, 3.0]",
    ]
    assert axes.get_title(loc="left").endswith("decisions, teacher-forced")


def test_without_a_histogram_that_is_said() -> None:
    for extras in ({}, {"rank_reordering": {"rank_histogram": []}}):
        figure = plots.plot_ranks(replace(make_comparison(5), extras=extras))
        assert "No histogram of ranks" in figure.texts[0].get_text()


def test_a_notebook_shows_the_figure_by_itself() -> None:
    figure = make_comparison(2).plot()
    assert figure._repr_png_().startswith(b"\x89PNG")  # type: ignore[attr-defined]


def test_pyplot_is_left_alone() -> None:
    code = (
        "import sys; from matplotlib import rcParams as rc\n"
        # Reading the backend would choose one.
        "settings = lambda: {k: rc[k] for k in rc if k != 'backend'}\n"
        "before = settings()\n"
        "from test_results import make_comparison\n"
        "from hyperlens.render.plots import plot_layers, plot_ranks, png\n"
        "for plot in (plot_layers, plot_ranks): png(plot(make_comparison(2)))\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
        "assert settings() == before\n"
    )
    here = Path(__file__).parent
    paths = f"import sys; sys.path[:0] = {[str(here), str(here.parent)]}\n"
    run = subprocess.run(
        [sys.executable, "-c", paths + code], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
