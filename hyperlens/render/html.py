"""Blocks as HTML. Every piece of text is escaped unless it is `Markup` already."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from markupsafe import Markup, escape

from . import charts
from .blocks import Block, Chart, Details, Grid, Heading, Sample, Samples, Table, Text, Verdict
from .format import cell

Content = str | Markup

# Base ranks of tokens by colour: up to which rank, CSS class, words of the legend.
RANKS = (
    (1, "r1", "base rank 1"),
    (10, "r2", "2-10"),
    (199, "r3", "11-199"),
    (math.inf, "r4", "200 or more"),
)


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


def data(value: Any) -> Markup:
    """JSON for the page's script; no text in it can end the element."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False)
    safe = text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    return Markup('<script type="application/json">{}</script>').format(Markup(safe))


def to_html(blocks: Sequence[Block], colours: charts.Colours, *, static: bool = False) -> Markup:
    """Blocks one after another.

    Args:
        blocks: what to show.
        colours: the colour of every series of the page.
        static: draw charts as pictures, for where no script runs, instead of leaving them to the
            page's script.
    """
    parts: list[Markup] = []
    has_legend = False
    for block in blocks:
        if not has_legend and isinstance(block, Samples) and any(one.ranks for one in block.texts):
            parts.append(rank_legend())
            has_legend = True
        parts.append(_element(block, colours, static))
    return join(parts)


def _element(block: Block, colours: charts.Colours, static: bool) -> Markup:
    match block:
        case Verdict():
            return tag("p", block.answer, class_="caution" if block.caution else "verdict")
        case Heading():
            return tag("h3", block.text)
        case Text(role="plain"):
            return tag("p", block.text)
        case Text():
            return tag("p", f"{block.role.capitalize()}: {block.text}", class_=block.role)
        case Table():
            return table(block)
        case Chart():
            return _chart(block, colours, static)
        case Grid():
            drawn = (_chart(one, colours, static) for one in block.charts)
            return tag("div", *drawn, class_="grid")
        case Samples():
            return _samples(block)
        case Details():
            inside = to_html(block.blocks, colours, static=static)
            return tag("details", tag("summary", block.summary), inside)


def table(block: Table) -> Markup:
    """A table that scrolls inside its own box."""
    top = tag("tr", *(tag("th", text, scope="col") for text in block.head))
    body = (
        tag("tr", tag("th", row[0], scope="row"), *(tag("td", text) for text in row[1:]))
        for row in block.rows
    )
    caption = tag("caption", block.caption) if block.caption else ""
    inside = tag("table", caption, tag("thead", top), tag("tbody", *body))
    return tag("div", inside, class_="scroll", tabindex=0)


def _chart(block: Chart, colours: charts.Colours, static: bool) -> Markup:
    title = tag("figcaption", block.title)
    if static:
        return tag("figure", title, Markup(charts.svg(charts.draw(block, colours))))
    spec = charts.draw(block, colours, wide=True).to_dict()
    spec.pop("config", None)  # the page's own colours and fonts
    drawn = tag("div", data(spec), class_="chart", role="img", aria_label=block.alt)
    return tag("figure", title, drawn, _values(block.rows))


def _values(rows: Sequence[Mapping[str, Any]]) -> Markup:
    """The numbers of a chart, for those who cannot see it."""
    head = list(rows[0]) if rows else []
    numbers = Table(head, [[cell(row.get(key, "")) for key in head] for row in rows])
    return tag("details", tag("summary", "values"), table(numbers))


def _samples(block: Samples) -> Markup:
    texts = (
        tag(
            "div",
            tag("h4", one.label),
            tag("p", tag("span", block.prompt, class_="prompt"), _text(one)),
        )
        for one in block.texts
    )
    return tag("div", *texts, class_="texts")


def _text(sample: Sample) -> Markup:
    """The text; with ranks, token by token."""
    if not sample.ranks:
        return escape(sample.text)
    base = sample.base_tokens or [""] * len(sample.ranks)
    return join(map(_token, sample.tokens, sample.ranks, base))


def _token(token: str, rank: int, base_token: str) -> Markup:
    tip = f"base rank {rank:,}"
    if base_token and rank > 1:
        tip += f"; the base's top-1 token is {base_token!r}"
    kind = next(name for most, name, _ in RANKS if rank <= most)
    return tag("span", token, class_=f"t {kind}", title=tip)


def rank_legend() -> Markup:
    """What the colours of tokens mean."""
    return tag(
        "p", *(tag("span", words, class_=f"t {name}") for _, name, words in RANKS), class_="legend"
    )
