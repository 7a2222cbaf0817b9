"""Where the inside changed: drift and effective dimension, layer by layer, in three views."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from ...results.comparison import Comparison
from ..charts import chart, lines
from ..parts import details, grid, heading, join, pair_name, paragraph, table, tag
from ..words import layer_table, with_interval

ORDER = 30
TITLE = "Where did the inside change?"
READS = "comparison"

VIEWS = {
    "raw": ("Raw residual stream", "What the blocks wrote."),
    "unit_rms": ("Scaled to unit RMS", "Every vector at the same length: directions only."),
    "final_norm": (
        "After the final norm",
        "What the unembedding sees; Hugging Face's hidden_states[-1] is this at the last layer.",
    ),
}
LAYER = "layer (0 = embedding, l = output of block l − 1)"
DRAWN = (
    ("drift", "relative_l2", "relative L2 distance", "of the streams, as a share of the length"),
    ("drift", "cosine", "cosine", "of the two streams"),
    ("participation_ratio", "delta", "Δ effective dimension", "tuned − base, dimensions"),
)


def body(results: Sequence[Comparison]) -> Markup:
    """A row of charts for every view, then the table of each pair."""
    parts = [
        paragraph(
            "Both models read the same texts. Effective dimension is the participation ratio "
            "tr(Σ)²/‖Σ‖² of the stream's covariance: how many directions share its variance. "
            "Bands are 95% intervals over sequences; those of the dimension are for the "
            "distribution the texts come from, so they may lie to one side of the line."
        )
    ]
    for view, (title, meaning) in VIEWS.items():
        charts = [_chart(results, view, title, which) for which in DRAWN]
        if any(charts):
            parts += [heading(title), paragraph(meaning), grid(*filter(None, charts))]
    for result in results:
        if rows := layer_table(result):
            parts += [tag("p", pair_name(result), class_="pairs"), table(rows[0], rows[1:])]
        numbers = _dimensions(result)
        if numbers:
            head = ["layer", "view", "base", "tuned", "tuned − base [95%]"]
            parts.append(details("effective dimension at every layer", table(head, numbers)))
    return join(parts)


def _chart(
    results: Sequence[Comparison], view: str, title: str, which: tuple[str, str, str, str]
) -> Markup | None:
    probe, metric, what, of = which
    rows: list[dict[str, Any]] = [
        {
            "pair": pair_name(result),
            "layer": row.layer,
            "value": row.value,
            "low": row.low,
            "high": row.high,
            "tokens": row.n,
        }
        for result in results
        for row in result.select(probe, metric, view)
    ]
    if not rows:
        return None
    ends = [row for row in rows if row["layer"] in (0, max(r["layer"] for r in rows))]
    alt = f"{what}, {title.lower()}, by layer: " + "; ".join(
        f"{row['pair']}: {row['value']:.3g} at layer {row['layer']}" for row in ends
    )
    spec: Any = lines(
        rows, "value", what, x_title=LAYER, scale="near" if metric == "cosine" else "from zero"
    )
    return chart(spec, f"{what} {of}", alt, rows)


def _dimensions(result: Comparison) -> list[list[str]]:
    found = []
    for view in VIEWS:
        by_metric = {
            metric: {row.layer: row for row in result.select("participation_ratio", metric, view)}
            for metric in ("base", "tuned", "delta")
        }
        for layer, delta in by_metric["delta"].items():
            sides = [by_metric[m].get(layer) for m in ("base", "tuned")]
            cells = [with_interval(row) if row else "n/a" for row in sides]
            found.append([str(layer), view, *cells, with_interval(delta)])
    return found
