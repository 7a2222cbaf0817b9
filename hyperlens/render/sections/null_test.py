"""Is it more than any change of that size would do: the tuned model beside placebos."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from ...results.result import Result
from ..charts import chart, lines
from ..parts import details, grid, join, notes, pair_name, paragraph, preformatted, table, tag
from ..words import number

ORDER = 50
TITLE = "Is it more than a random change would do?"
READS = "null_test"
LOADS = "hyperlens.experiments.null_test_finding:NullTestResult"

DRAWN = (
    ("relative_l2", "raw", "relative L2 distance", "of the raw streams"),
    ("delta", "raw", "Δ effective dimension", "of the raw stream, dimensions"),
    ("delta", "final_norm", "Δ effective dimension", "after the final norm, dimensions"),
)


def body(results: Sequence[Any]) -> Markup:
    """Headline of every pair beside its placebos, and the layers."""
    parts = [
        paragraph(
            "Any change of the weights moves the stream and reorders ranks. Placebos are the base "
            "plus the same change with the entries of each tensor shuffled: the same size, nothing "
            "learned. Above or below every placebo: not what a random change of this size does. "
            "With so few placebos this is no p value."
        )
    ]
    for result in results:
        parts += [tag("p", pair_name(result), class_="pairs"), notes(result)]
        rows = [
            [
                words,
                f"{number(row['tuned'])} {unit}".strip(),
                f"{number(row['placebo_low'])} to {number(row['placebo_high'])}",
                verdict,
            ]
            for words, unit, row, verdict in result.headline()
        ]
        count = len(result.extras["placebo_seeds"])
        head = ["at the last layer and the output", "tuned", f"{count} placebos, range", ""]
        parts.append(table(head, rows))
        parts.append(grid(*(_chart(result, *which) for which in DRAWN)))
        parts.append(details("In words", preformatted(result.summary())))
    return join(parts)


def _chart(result: Result, metric: str, view: str, what: str, of: str) -> Markup:
    found = sorted(result.select(metric=metric, view=view), key=lambda row: row["layer"])
    rows = [
        {
            "pair": pair,
            "layer": row["layer"],
            "value": row[value],
            "low": row[low],
            "high": row[high],
        }
        for pair, value, low, high in (
            ("tuned", "tuned", "tuned", "tuned"),
            ("placebos (mean and range)", "placebo_mean", "placebo_low", "placebo_high"),
        )
        for row in found
    ]
    last = found[-1]
    alt = (
        f"{what} {of} by layer; at the last one {last['tuned']:.3g} for the tuned model and "
        f"{last['placebo_low']:.3g} to {last['placebo_high']:.3g} for placebos"
    )
    return chart(lines(rows, "value", what), f"{what} {of}", alt, rows)
