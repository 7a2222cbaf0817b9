"""Charts as Vega-Lite: values to hover over, colours of the page, a table for who cannot see them.

Specifications are made with Altair; the page draws them with the JavaScript it carries inside.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from .parts import cell, data, details, table, tag

if TYPE_CHECKING:
    import altair

HEIGHT = 210
SCALES: Mapping[str, dict[str, Any]] = {
    "from zero": {"zero": True},
    "near": {"zero": False},
    "log": {"type": "log"},
}
Rows = Sequence[Mapping[str, Any]]


def chart(spec: altair.TopLevelMixin, title: str, alt: str, rows: Rows) -> Markup:
    """A chart with its title, a description for screen readers, and its values as a table.

    Args:
        spec: an Altair chart whose width follows the page (`width="container"`).
        title: what is shown, units included.
        alt: what there is to see.
        rows: the values; the keys are the columns.
    """
    drawn = spec.to_dict()
    drawn.pop("config", None)  # the page's own colours and fonts
    head = list(rows[0]) if rows else []
    numbers = table(head, ([cell(row[key]) for key in head] for row in rows))
    return tag(
        "figure",
        tag("figcaption", title),
        tag("div", data(drawn), class_="chart", role="img", aria_label=alt),
        details("values", numbers),
    )


def lines(
    rows: Rows,
    y: str,
    y_title: str,
    *,
    x: str = "layer",
    x_title: str = "layer",
    scale: str = "from zero",
) -> Any:
    """A line per pair with its 95% band; the pairs differ in colour, dash and shape of mark.

    `scale` of the vertical axis: "from zero", "near" (what the values need) or "log".
    """
    import altair as alt

    base = alt.Chart(alt.Data(values=[dict(row) for row in rows])).encode(
        x=alt.X(f"{x}:Q", title=x_title, axis=alt.Axis(tickMinStep=1, format="d", grid=False)),
        color=_pair_colour(rows),
    )
    band = base.mark_area(opacity=0.22).encode(
        y=alt.Y("low:Q", title=y_title, scale=alt.Scale(**SCALES[scale])), y2="high:Q"
    )
    line = base.mark_line(strokeWidth=1.8).encode(y=f"{y}:Q", strokeDash=_pair_dash(rows))
    points = base.mark_point(filled=True, size=42, opacity=1).encode(
        y=f"{y}:Q", shape=alt.Shape("pair:N", legend=None), tooltip=_tooltip(x, x_title, y, y_title)
    )
    return (band + line + points).properties(width="container", height=HEIGHT)


def dots(rows: Rows, y: str, x_title: str) -> Any:
    """Values with their intervals, one row per name in `y`; `pair` and `model` tell the marks."""
    import altair as alt

    kinds = list(dict.fromkeys(row["model"] for row in rows))
    base = alt.Chart(alt.Data(values=[dict(row) for row in rows])).encode(
        y=alt.Y(f"{y}:N", title=None, sort=None, axis=alt.Axis(labelLimit=220)),
        yOffset=alt.YOffset("model:N", sort=kinds),
        color=alt.Color(
            "model:N",
            sort=kinds,
            legend=alt.Legend(title=None, orient="top", labelLimit=260, columns=2),
        ),
    )
    rule = base.mark_rule(strokeWidth=2).encode(
        x=alt.X("low:Q", title=x_title, scale=alt.Scale(zero=True), axis=alt.Axis(tickCount=5)),
        x2="high:Q",
    )
    mark = base.mark_point(filled=True, size=60, opacity=1).encode(
        x="value:Q",
        shape=alt.Shape("model:N", sort=kinds, legend=None),
        tooltip=[
            alt.Tooltip("model:N", title="model"),
            alt.Tooltip(f"{y}:N", title="measure"),
            *_interval_tooltip("value", "mean"),
        ],
    )
    names = len({row[y] for row in rows})
    return (rule + mark).properties(width="container", height=max(90, 20 * names * len(kinds) // 2))


def bars(rows: Rows, x: str, x_title: str, y_title: str) -> Any:
    """Shares in per cent, a group of bars per name in `x`, one bar for each pair."""
    import altair as alt

    order = list(dict.fromkeys(row[x] for row in rows))
    return (
        alt.Chart(alt.Data(values=[dict(row) for row in rows]))
        .mark_bar()
        .encode(
            x=alt.X(f"{x}:N", sort=order, title=x_title, axis=alt.Axis(labelAngle=-45)),
            xOffset=alt.XOffset("pair:N", sort=None),
            y=alt.Y("value:Q", title=y_title),
            color=_pair_colour(rows),
            tooltip=[
                alt.Tooltip("pair:N", title="models"),
                alt.Tooltip(f"{x}:N", title=x_title),
                alt.Tooltip("value:Q", title=y_title, format=".3~g"),
            ],
        )
        .properties(width="container", height=HEIGHT)
    )


def _pair_colour(rows: Rows) -> Any:
    import altair as alt

    several = len({row["pair"] for row in rows}) > 1
    legend = alt.Legend(
        title=None, orient="top", labelLimit=320, columns=1, symbolOpacity=1, symbolType="square"
    )
    if not several:
        return alt.Color("pair:N", sort=None, legend=None)
    return alt.Color("pair:N", sort=None, legend=legend)


def _pair_dash(rows: Rows) -> Any:
    import altair as alt

    return alt.StrokeDash("pair:N", sort=None, legend=None)


def _tooltip(x: str, x_title: str, y: str, y_title: str) -> list[Any]:
    import altair as alt

    return [
        alt.Tooltip("pair:N", title="models"),
        alt.Tooltip(f"{x}:Q", title=x_title),
        *_interval_tooltip(y, y_title),
    ]


def _interval_tooltip(y: str, y_title: str) -> list[Any]:
    import altair as alt

    return [
        alt.Tooltip(f"{y}:Q", title=y_title, format=".4~g"),
        alt.Tooltip("low:Q", title="95% from", format=".4~g"),
        alt.Tooltip("high:Q", title="to", format=".4~g"),
    ]
