"""What sections are built of. Every piece of text is escaped unless it is `Markup` already."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from markupsafe import Markup, escape

from .words import number, percent, plain

Content = str | Markup


def tag(name: str, *content: Content, **attributes: object) -> Markup:
    """An element; `class_` is the class, underscores in names are hyphens, None leaves one out."""
    given = (
        Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), value)
        for key, value in attributes.items()
        if value is not None
    )
    return Markup("<{0}{1}>{2}</{0}>").format(Markup(name), Markup("").join(given), join(content))


def join(content: Iterable[Content]) -> Markup:
    """Pieces one after another, plain text escaped."""
    return Markup("").join(escape(piece) for piece in content)


def paragraph(*content: Content) -> Markup:
    """A paragraph."""
    return tag("p", *content)


def note(*content: Content) -> Markup:
    """What a reader should not overlook."""
    return tag("p", *content, class_="note")


def notes(*results: Any) -> Markup:
    """What to know of these results' data and limits, each once, a paragraph a note."""
    lines = dict.fromkeys(line for result in results for line in result.meta.get("notes", []))
    return join(paragraph("Note: ", plain(line)) for line in lines)


def conclusions(result: Any) -> Markup:
    """What a finding's intervals allow to say, a paragraph a point."""
    return tag("div", *(tag("p", said) for said in result.conclusions()), class_="note")


def heading(text: str) -> Markup:
    """A heading inside a section."""
    return tag("h3", text)


def preformatted(text: str) -> Markup:
    """Text whose columns are spaces."""
    return tag("pre", text, tabindex=0)


def table(head: Sequence[Content], rows: Iterable[Sequence[Content]], caption: str = "") -> Markup:
    """A table that scrolls inside its own box; the first column names the rows."""
    top = tag("tr", *(tag("th", cell, scope="col") for cell in head))
    body = (
        tag("tr", tag("th", row[0], scope="row"), *(tag("td", cell) for cell in row[1:]))
        for row in rows
    )
    inside = join([tag("caption", caption) if caption else "", tag("thead", top)])
    return tag("div", tag("table", inside, tag("tbody", *body)), class_="scroll", tabindex=0)


def details(summary: str, *content: Content) -> Markup:
    """What only some readers want to see."""
    return tag("details", tag("summary", summary), *content)


def grid(*content: Content) -> Markup:
    """Pieces side by side where there is room."""
    return tag("div", *content, class_="grid")


def picture(png: bytes, alt: str) -> Markup:
    """A figure, on white in the dark too: its own colours are made for that."""
    data = base64.b64encode(png).decode("ascii")
    image = Markup('<img alt="{}" src="data:image/png;base64,{}">').format(alt, data)
    return tag("figure", image, class_="picture")


def data(value: Any) -> Markup:
    """JSON for the page's script; no text in it can end the element."""
    text = json.dumps(_finite(value), ensure_ascii=True, allow_nan=False)
    safe = text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    return Markup('<script type="application/json">{}</script>').format(Markup(safe))


def interval(row: Mapping[str, Any], unit: str = "") -> str:
    """`value [low, high] unit` of a row of a finding's table."""
    value, low, high = (float(row[key]) for key in ("value", "low", "high"))
    if not math.isfinite(low) or not math.isfinite(high):
        return f"{number(value)} {unit}".strip()
    scale = max(abs(value), abs(low), abs(high))
    ends = ", ".join(number(end, scale) for end in (low, high))
    return f"{number(value, scale)} [{ends}] {unit}".strip()


def share(row: Mapping[str, Any]) -> str:
    """A share and, where there is one, its interval, in per cent; no end is below none or over all.

    Args:
        row: `value`, `low` and `high`, of 1; NaN ends where there is no interval.
    """
    if not math.isfinite(row["low"]):
        return percent(row["value"])
    ends = max(row["low"], 0.0), min(row["high"], 1.0)
    return f"{percent(row['value'])} [{percent(ends[0])}, {percent(ends[1])}]"


def p_in_words(p: float) -> str:
    """A p value, or nothing where there is no test."""
    if math.isnan(p):
        return ""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def pair_name(result: Any) -> str:
    """`base → tuned` of a comparison or finding, or its own title, on one line."""
    if title := result.meta.get("title"):
        return plain(title)
    sides = (plain(result.meta.get(side, {}).get("name", side)) for side in ("base", "tuned"))
    return " → ".join(sides)


def cell(value: object) -> str:
    """Any value of a table."""
    return number(value) if isinstance(value, float) else plain(value)


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity; null stands for them."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return value
