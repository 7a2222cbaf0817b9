"""Any finding without a section of its own: its summary, figure and table."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from ..results.result import Result
from .parts import cell, details, heading, join, pair_name, picture, preformatted, table


def body(results: Sequence[Result]) -> Markup:
    """One finding after another."""
    return join(one(result) for result in results)


def one(result: Result) -> Markup:
    """Words, figure, and the table for who wants to look things up."""
    from .plots import png

    rows = ([cell(row[column]) for column in result.columns] for row in result.table)
    return join(
        [
            heading(pair_name(result)),
            preformatted(result.summary()),
            picture(png(result.plot(), dpi=110), f"{result.name}: {result.summary()[:300]}"),
            details("every number", table(result.columns, rows)),
        ]
    )
