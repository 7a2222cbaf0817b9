"""What a result is presented with: blocks, built once from its rows and shown in three ways.

`terminal`, `page` (also for notebooks) and `charts` turn blocks into plain text, HTML and figures.
Numbers are text already when they enter a block (see `format`), so that all three show the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from .format import MISSING

Role = Literal["base", "tuned", "control", "other"]
"""What a series of a chart stands for: the base model is grey everywhere, each tuned model has one
colour on the whole page, controls are a light grey band, and anything else has a colour of its own.
"""

Scale = Literal["zero", "data", "log", "share"]
"""Of an axis: from zero on, only what the data need, logarithmic, or from 0 to 1."""


@dataclass(frozen=True)
class Verdict:
    """An answer in plain words with the number that decides it.

    Attributes:
        topic: what it is about, in a word or two, such as "output" or "real?".
        answer: one sentence.
        caution: whether it warns rather than answers, such as "not to be concluded: ...".
    """

    topic: str
    answer: str
    caution: bool = False


@dataclass(frozen=True)
class Heading:
    """A heading inside a result."""

    text: str


@dataclass(frozen=True)
class Text:
    """A paragraph; `note` is for what a reader should know of the data, `warning` for dangers."""

    text: str
    role: Literal["plain", "note", "warning"] = "plain"


@dataclass(frozen=True)
class Table:
    """A table of text whose first column names the rows.

    Attributes:
        head: the names of the columns.
        rows: as many cells each.
        caption: what a reader needs to know to read it.
        joins: whether tables of several results are joined by their first column on a page, their
            other columns side by side; else they stand below each other.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    joins: bool = False


@dataclass(frozen=True)
class Axis:
    """One axis of a chart: the key of the rows it shows, and what it is called."""

    key: str
    title: str
    scale: Scale = "data"
    is_category: bool = False


@dataclass(frozen=True)
class Reference:
    """A line to compare with, and its interval as a band; "dots" have it across their values."""

    name: str
    value: float
    low: float
    high: float
    role: Role = "other"


@dataclass(frozen=True)
class Chart:
    """A chart described by its values; `charts.draw` makes it.

    Attributes:
        kind: "lines" (`low` and `high` of the rows are a band), "dots" (categories down, values
            across, intervals as rules), "bars", "points" (x against y) or "heatmap" (the number
            `value` over x and y).
        title: what is shown, units included.
        alt: what there is to see, for those who cannot see it.
        rows: the values: keys of both axes, `series`, and `low` and `high` where there are any.
        x, y: the axes.
        roles: series name to its role; "tuned" where nothing is said.
        references: lines to compare with.
    """

    kind: Literal["lines", "dots", "bars", "points", "heatmap"]
    title: str
    alt: str
    rows: Sequence[Mapping[str, Any]]
    x: Axis
    y: Axis
    roles: Mapping[str, Role] = field(default_factory=dict)
    references: Sequence[Reference] = ()

    @property
    def series(self) -> list[str]:
        """The series, in the order of the rows."""
        return list(dict.fromkeys(str(row["series"]) for row in self.rows if "series" in row))


@dataclass(frozen=True)
class Sample:
    """One text of a model; with ranks its tokens are coloured by them.

    Attributes:
        label: whose text it is.
        text: the text.
        tokens: its tokens as text.
        ranks: the base model's rank of each token, 1 for its top-1 token.
        base_tokens: the base model's own top-1 token in each place, where it is known.
    """

    label: str
    text: str
    tokens: Sequence[str] = ()
    ranks: Sequence[int] = ()
    base_tokens: Sequence[str] = ()


@dataclass(frozen=True)
class Samples:
    """Texts side by side after the same prompt."""

    prompt: str
    texts: Sequence[Sample]


@dataclass(frozen=True)
class Grid:
    """Charts side by side where there is room."""

    charts: Sequence[Chart]


@dataclass(frozen=True)
class Details:
    """What only some readers want to see: folded away on the page, left out in the terminal."""

    summary: str
    blocks: Sequence[Block]


Block = Verdict | Heading | Text | Table | Chart | Samples | Grid | Details


def joined(named: Sequence[tuple[str, Sequence[Block]]]) -> list[Block]:
    """The blocks of several results of one kind as one list.

    Where all results have the same blocks in the same order, texts that are equal stand once,
    charts share their axes, and tables that can be joined have the results side by side. Other
    blocks stand below each other under the result's name. Results whose blocks differ in kind
    follow one another whole.

    Args:
        named: the label of each result, and its blocks.
    """
    if len(named) == 1:
        return list(named[0][1])
    if len({tuple(map(_shape, blocks)) for _, blocks in named}) > 1:
        return [block for name, blocks in named for block in (Heading(name), *blocks)]
    names = [name for name, _ in named]
    found: list[Block] = []
    for same in zip(*(blocks for _, blocks in named), strict=True):
        found += _join(names, list(same))
    return found


def _shape(block: Block) -> tuple[Any, ...]:
    """What two blocks must share to be joined."""
    kind = type(block).__name__
    if isinstance(block, Chart):
        return kind, block.kind, block.x.key, block.y.key
    if isinstance(block, Heading):
        return kind, block.text
    if isinstance(block, Grid):
        return kind, tuple(map(_shape, block.charts))
    if isinstance(block, Details):
        return kind, tuple(map(_shape, block.blocks))
    return (kind,)


def _join(names: list[str], same: list[Any]) -> list[Block]:
    first = same[0]
    if all(block == first for block in same):
        return [first]
    if isinstance(first, Chart):
        return [_chart(names, same)]
    if isinstance(first, Grid):
        charts = zip(*(grid.charts for grid in same), strict=True)
        return [Grid([_chart(names, list(of_one)) for of_one in charts])]
    if isinstance(first, Table) and first.joins:
        return [_table(names, same)]
    if isinstance(first, Details):
        inner = joined([(n, d.blocks) for n, d in zip(names, same, strict=True)])
        return [Details(first.summary, inner)]
    if isinstance(first, Verdict):
        return [replace(v, topic=f"{v.topic}, {n}") for n, v in zip(names, same, strict=True)]
    if isinstance(first, Text):
        return [
            replace(text, text=f"{name}: {text.text}")
            for name, text in zip(names, same, strict=True)
        ]
    return [block for name, one in zip(names, same, strict=True) for block in (Heading(name), one)]


def _chart(names: Sequence[str], charts: Sequence[Chart]) -> Chart:
    """One chart with all series; one that is the same in several, such as a base, stands once.

    A series that has the same name in two results but other numbers gets the result's name too.
    """
    meanings: dict[str, set[str]] = {}
    for chart in charts:
        for series in chart.series:
            rows = [row for row in chart.rows if row.get("series") == series]
            meanings.setdefault(series, set()).add(repr(rows))
    unclear = {series for series, found in meanings.items() if len(found) > 1}
    named = [_renamed(chart, unclear, name) for name, chart in zip(names, charts, strict=True)]
    rows = list({repr(row): row for chart in named for row in chart.rows}.values())
    roles = {name: role for chart in named for name, role in chart.roles.items()}
    references = dict.fromkeys(one for chart in named for one in chart.references)
    alts = dict.fromkeys(chart.alt for chart in named)
    return replace(
        named[0], rows=rows, roles=roles, references=tuple(references), alt="; ".join(alts)
    )


def _renamed(chart: Chart, unclear: set[str], of: str) -> Chart:
    names = {series: f"{series} of {of}" for series in chart.series if series in unclear}
    rows = [
        {**row, "series": names.get(str(row["series"]), row["series"])} if "series" in row else row
        for row in chart.rows
    ]
    roles = {names.get(series, series): role for series, role in chart.roles.items()}
    return replace(chart, rows=rows, roles=roles)


def _table(names: Sequence[str], tables: Sequence[Table]) -> Table:
    """Tables side by side; columns that are the same in all of them stand once."""
    keys = list(dict.fromkeys(row[0] for table in tables for row in table.rows))
    columns: dict[tuple[str, tuple[str, ...]], str] = {}
    for name, table in zip(names, tables, strict=True):
        cells = {row[0]: row for row in table.rows}
        for i, title in enumerate(table.head[1:], start=1):
            column = tuple(cells[key][i] if key in cells else MISSING for key in keys)
            columns.setdefault((title, column), name)
    titles = [title for title, _ in columns]
    head = [
        title if titles.count(title) == 1 else f"{title} ({columns[title, cells]})"
        for title, cells in columns
    ]
    rows = [[key, *(cells[i] for _, cells in columns)] for i, key in enumerate(keys)]
    captions = dict.fromkeys(table.caption for table in tables if table.caption)
    return Table([tables[0].head[0], *head], rows, " ".join(captions), joins=True)


def flat(blocks: Sequence[Block]) -> list[Block]:
    """Every block, those inside details and grids included."""
    found: list[Block] = []
    for block in blocks:
        found.append(block)
        if isinstance(block, Details):
            found += flat(block.blocks)
        elif isinstance(block, Grid):
            found += block.charts
    return found
