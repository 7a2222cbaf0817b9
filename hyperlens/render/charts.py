"""Charts as Altair draws them: described once as a block, shown on pages, in notebooks, in files.

Colours: the base model is grey, controls are a light grey band (further kinds in one chart have
other pale colours), each tuned model has one colour on a whole page, taken from those of Okabe and
Ito, which colour-blind readers tell apart. Dashes and shapes of marks carry the same.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .blocks import Axis, Block, Chart, Grid, Role, flat

if TYPE_CHECKING:
    import altair

HEIGHT = 210
WIDTH = 340
# Of a line with more values than this only the line is drawn.
MOST_MARKS = 60
GREY = "#808890"
CONTROLS = ("#a9b0b8", "#c9ae79", "#a99bc4")
TUNED = ("#d55e00", "#0072b2", "#009e73", "#8a6d00", "#cc79a7")
# A legend has two columns where all of its names are at most so long.
SHORT_NAME = 24
OTHER = ("#cc79a7", "#56b4e9", "#e69f00", "#5b8c00", "#7b61c4", "#b04a4a", "#00857c", "#999999")

Colours = Mapping[str, str]


def _altair() -> Any:
    """Imported late, and untyped: what it accepts is wider than its types say."""
    import altair

    return altair


def colours(blocks: Sequence[Block]) -> Colours:
    """One colour for every series of these blocks, by its role."""
    roles: dict[str, Role] = {}
    controls: dict[str, str] = {}
    for block in flat(blocks):
        if isinstance(block, Chart):
            beside = [name for name in block.series if block.roles.get(name) == "control"]
            for i, name in enumerate(beside):
                controls.setdefault(name, CONTROLS[i % len(CONTROLS)])
            for name in (*block.series, *(one.name for one in block.references)):
                roles.setdefault(name, block.roles.get(name, "tuned"))
            for one in block.references:
                roles[one.name] = one.role
    tuned = [name for name, role in roles.items() if role == "tuned"]
    other = [name for name, role in roles.items() if role == "other"]
    return {
        **{name: GREY for name, role in roles.items() if role == "base"},
        **{name: CONTROLS[0] for name, role in roles.items() if role == "control"},
        **controls,
        **{name: TUNED[i % len(TUNED)] for i, name in enumerate(tuned)},
        **{name: OTHER[i % len(OTHER)] for i, name in enumerate(other)},
    }


def figure(blocks: Sequence[Block], title: str = "") -> altair.TopLevelMixin | None:
    """All charts of some blocks as one figure, those in details left out; None without any.

    Charts of a grid stand side by side, everything else below each other.
    """
    alt = _altair()
    chosen = colours(blocks)
    rows: list[Any] = []
    for block in blocks:
        if isinstance(block, Chart):
            rows.append(draw(block, chosen, titled=True))
        elif isinstance(block, Grid):
            beside: Any = alt.hconcat(*(draw(one, chosen, titled=True) for one in block.charts))
            # One legend for the row, unless its charts show different series: their colours would
            # be mixed up in a shared scale.
            same = len({_names_in(one) for one in block.charts}) == 1
            rows.append(beside if same else beside.resolve_scale(color="independent"))
    if not rows:
        return None
    whole: Any = rows[0]
    if len(rows) > 1:
        whole = alt.vconcat(*rows).resolve_scale(color="independent")
    return whole.properties(title=title) if title else whole  # type: ignore[no-any-return]


def _names_in(chart: Chart) -> tuple[str, ...]:
    """Everything that has a colour of its own in a chart."""
    return (*chart.series, *(one.name for one in chart.references))


# Marks that stand for one row; Vega describes a line and a band by their first row alone.
MARK = re.compile(
    r'<(?P<kind>path|rect)(?P<inside> aria-label="(?P<label>[^"]*)"[^>]*'
    r'aria-roledescription="(?:point|bar|rect mark)"[^>]*?)/>'
)
NAMED_TWICE = re.compile(r"series: (?P<name>.*?); of: (?P=name)")


def svg(chart: altair.TopLevelMixin) -> str:
    """A figure as SVG without a background, so that it suits light and dark pages.

    Marks tell their values to a pointer that rests on them, without a script.
    """
    import vl_convert

    spec: Any = chart.to_dict()
    spec["background"] = "transparent"
    spec["config"] = {**spec.get("config", {}), **QUIET}
    return MARK.sub(_with_title, vl_convert.vegalite_to_svg(spec))


def _with_title(mark: re.Match[str]) -> str:
    label = NAMED_TWICE.sub(r"of: \g<name>", mark["label"])
    return f"<{mark['kind']}{mark['inside']}><title>{label}</title></{mark['kind']}>"


def png(chart: altair.TopLevelMixin, scale: float = 2.0) -> bytes:
    """A figure as PNG on white."""
    import vl_convert

    return vl_convert.vegalite_to_png(chart.to_dict(), scale=scale)


# Readable on white and on black alike.
QUIET: dict[str, Any] = {
    "view": {"stroke": None},
    "axis": {
        **dict.fromkeys(("labelColor", "titleColor"), "#808890"),
        **dict.fromkeys(("gridColor", "domainColor", "tickColor"), "#80889055"),
        "titleFontWeight": "normal",
    },
    "legend": {"labelColor": "#808890"},
    "title": {"color": "#808890"},
}


def draw(
    block: Chart, chosen: Colours | None = None, *, titled: bool = False, wide: bool = False
) -> Any:
    """One chart.

    Args:
        block: what it shows.
        chosen: the colour of each series; None chooses them for this chart alone.
        titled: put the title into the chart; a page sets it as text.
        wide: take the width of the page instead of one of its own.
    """
    chosen = colours([block]) if chosen is None else chosen
    kinds = {"lines": _lines, "dots": _dots, "bars": _bars, "points": _points, "heatmap": _heatmap}
    whole = kinds[block.kind](block, chosen)
    height = HEIGHT
    if block.kind == "dots":
        n_rows = len({row[block.y.key] for row in block.rows}) * max(1, len(block.series))
        height = max(90, 11 * n_rows + 30)
    whole = whole.properties(width="container" if wide else WIDTH, height=height)
    return whole.properties(title=block.title) if titled else whole


def _data(rows: Sequence[Mapping[str, Any]]) -> Any:
    alt = _altair()
    return alt.Data(values=[{key: _finite(value) for key, value in row.items()} for row in rows])


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity; null stands for them."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _scale(axis: Axis) -> Any:
    alt = _altair()
    return {
        "zero": alt.Scale(zero=True),
        "data": alt.Scale(zero=False),
        "log": alt.Scale(type="log"),
        "share": alt.Scale(domain=[0, 1], clamp=True),
    }[axis.scale]


def _x(of: Axis, **more: Any) -> Any:
    alt = _altair()
    if of.is_category:
        look = alt.Axis(labelAngle=-45, labelLimit=160)
        return alt.X(f"{of.key}:N", title=of.title, sort=None, axis=look)
    return alt.X(f"{of.key}:Q", title=of.title, scale=_scale(of), **more)


def _y(axis: Axis, key: str = "") -> Any:
    alt = _altair()
    if axis.is_category:
        look = alt.Axis(labelLimit=240)
        return alt.Y(f"{axis.key}:N", title=axis.title or None, sort=None, axis=look)
    return alt.Y(f"{key or axis.key}:Q", title=axis.title, scale=_scale(axis))


def _colour(block: Chart, chosen: Colours) -> Any:
    alt = _altair()
    # A line to compare with may be that of a series.
    names = list(dict.fromkeys([*block.series, *(one.name for one in block.references)]))
    legend: Any = None
    if len(names) > 1:
        legend = alt.Legend(
            title=None,
            orient="top",
            labelLimit=320,
            columns=2 if max(map(len, names)) <= SHORT_NAME else 1,
            symbolOpacity=1,
            symbolType="square",
        )
    scale = alt.Scale(domain=names, range=[chosen[name] for name in names])
    return alt.Color("series:N", scale=scale, sort=names, legend=legend)


def _tooltip(block: Chart) -> list[Any]:
    alt = _altair()
    shown = [alt.Tooltip("series:N", title="of")] if block.series else []
    for axis in (block.x, block.y):
        kind = "N" if axis.is_category else "Q"
        form = {} if axis.is_category else {"format": ",.4~g"}
        shown.append(alt.Tooltip(f"{axis.key}:{kind}", title=axis.title or axis.key, **form))
    # The band of a control is the range of its values, no interval.
    if any(
        "low" in row and block.roles.get(row.get("series", "")) != "control" for row in block.rows
    ):
        shown.append(alt.Tooltip("low:Q", title="95% from", format=",.4~g"))
        shown.append(alt.Tooltip("high:Q", title="to", format=",.4~g"))
    return shown


def _has_intervals(block: Chart) -> bool:
    return any("low" in row for row in block.rows)


def _lines(block: Chart, chosen: Colours) -> Any:
    """A line for each series with its band; controls are a band with a thin line."""
    alt = _altair()
    controls = [name for name in block.series if block.roles.get(name) == "control"]
    whole_numbers = all(float(row[block.x.key]).is_integer() for row in block.rows)
    ticks = (
        alt.Axis(tickMinStep=1, format="d", grid=False) if whole_numbers else alt.Axis(grid=False)
    )
    base = alt.Chart(_data(block.rows)).encode(
        x=_x(block.x, axis=ticks), color=_colour(block, chosen)
    )
    is_control = alt.FieldOneOfPredicate(field="series", oneOf=controls)
    layers = []
    if block.references:
        layers += _references(block, chosen)
    if _has_intervals(block):
        # The band of a control is what the others are compared with: stronger than an interval.
        opacity = alt.condition(is_control, alt.value(0.45), alt.value(0.2))
        layers.append(base.mark_area().encode(y=_y(block.y, "low"), y2="high:Q", opacity=opacity))
    if controls:  # a thin line as well: a narrow band would hardly be seen
        middle = base.transform_filter(is_control).mark_line(strokeWidth=1)
        layers.append(middle.encode(y=_y(block.y)))
    drawn = base.transform_filter(~is_control) if controls else base
    dashes = alt.StrokeDash("series:N", sort=block.series, legend=None)
    layers.append(drawn.mark_line(strokeWidth=1.8).encode(y=_y(block.y), strokeDash=dashes))
    shapes = alt.Shape("series:N", sort=block.series, legend=None)
    # Of hundreds of values the marks would hide the line: there they only answer the pointer.
    shown = 1 if len({row[block.x.key] for row in block.rows}) <= MOST_MARKS else 0
    layers.append(
        drawn.mark_point(filled=True, size=42, opacity=shown).encode(
            y=_y(block.y), shape=shapes, tooltip=_tooltip(block)
        )
    )
    return alt.layer(*layers)


def _references(block: Chart, chosen: Colours) -> list[Any]:
    """A line and a band across the chart: at a height, or in "dots", whose values lie across."""
    alt = _altair()
    rows = [
        {"series": one.name, "value": one.value, "low": one.low, "high": one.high}
        for one in block.references
    ]
    base = alt.Chart(_data(rows)).encode(color=_colour(block, chosen))
    band, rule = base.mark_rect(opacity=0.12), base.mark_rule(strokeWidth=1.6, strokeDash=[5, 3])
    if block.kind == "dots":
        low = alt.X("low:Q", title=block.x.title, scale=_scale(block.x))
        return [band.encode(x=low, x2="high:Q"), rule.encode(x="value:Q")]
    return [
        band.encode(y=alt.Y("low:Q", title=block.y.title), y2="high:Q"),
        rule.encode(y="value:Q"),
    ]


def _dots(block: Chart, chosen: Colours) -> Any:
    """Values with their intervals across, one row for each category, series side by side."""
    alt = _altair()
    base = alt.Chart(_data(block.rows)).encode(
        y=_y(block.y), yOffset=alt.YOffset("series:N", sort=block.series),
        color=_colour(block, chosen),
    )  # fmt: skip
    layers = _references(block, chosen) if block.references else []
    if _has_intervals(block):
        axis = alt.X(
            "low:Q", title=block.x.title, scale=_scale(block.x), axis=alt.Axis(tickCount=5)
        )
        layers.append(base.mark_rule(strokeWidth=2).encode(x=axis, x2="high:Q"))
    shapes = alt.Shape("series:N", sort=block.series, legend=None)
    layers.append(
        base.mark_point(filled=True, size=60, opacity=1).encode(
            x=_x(block.x, axis=alt.Axis(tickCount=5)), shape=shapes, tooltip=_tooltip(block)
        )
    )
    return alt.layer(*layers)


def _bars(block: Chart, chosen: Colours) -> Any:
    alt = _altair()
    return (
        alt.Chart(_data(block.rows))
        .mark_bar()
        .encode(
            x=_x(block.x),
            xOffset=alt.XOffset("series:N", sort=block.series),
            y=_y(block.y),
            color=_colour(block, chosen),
            tooltip=_tooltip(block),
        )
    )


def _points(block: Chart, chosen: Colours) -> Any:
    """One point for each series at x and y, with both intervals where the rows have them."""
    alt = _altair()
    base = alt.Chart(_data(block.rows)).encode(color=_colour(block, chosen))
    layers: list[Any] = []
    if any("x_low" in row for row in block.rows):
        layers.append(base.mark_rule().encode(x="x_low:Q", x2="x_high:Q", y=_y(block.y)))
    if _has_intervals(block):
        layers.append(base.mark_rule().encode(x=_x(block.x), y="low:Q", y2="high:Q"))
    shapes = alt.Shape("series:N", sort=block.series, legend=None)
    layers.append(
        base.mark_point(filled=True, size=90, opacity=1).encode(
            x=_x(block.x), y=_y(block.y), shape=shapes, tooltip=_tooltip(block)
        )
    )
    return alt.layer(*layers)


def _heatmap(block: Chart, chosen: Colours) -> Any:
    """The number `value` over two ordered axes, 0 in the neutral colour."""
    alt = _altair()
    largest = max((abs(row["value"]) for row in block.rows if row["value"] is not None), default=1)
    negative = any(row["value"] < 0 for row in block.rows)
    scale = alt.Scale(
        scheme="blueorange" if negative else "oranges",
        domain=[-largest if negative else 0, largest],
    )
    look = {"sort": None, "axis": alt.Axis(labelAngle=0, labelOverlap=True)}
    return (
        alt.Chart(_data(block.rows))
        .mark_rect()
        .encode(
            x=alt.X(f"{block.x.key}:O", title=block.x.title, **look),
            y=alt.Y(f"{block.y.key}:O", title=block.y.title, **look),
            color=alt.Color("value:Q", scale=scale, legend=alt.Legend(title=None)),
            tooltip=[
                alt.Tooltip(f"{block.x.key}:N", title=block.x.title),
                alt.Tooltip(f"{block.y.key}:N", title=block.y.title),
                alt.Tooltip("value:Q", format=",.4~g"),
                *(
                    [alt.Tooltip("low:Q", title="95% from"), alt.Tooltip("high:Q", title="to")]
                    if _has_intervals(block)
                    else []
                ),
                *([alt.Tooltip("text:N", title="top")] if "text" in block.rows[0] else []),
            ],
        )
    )
