"""Which parts' weights bring about what the other model does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from ..charts import chart, dots, lines
from ..parts import (
    conclusions,
    details,
    grid,
    join,
    notes,
    pair_name,
    paragraph,
    preformatted,
    share,
    table,
    tag,
)
from ..words import number

ORDER = 132
TITLE = "Whose weights does it take?"
READS = "patch_weights"
LOADS = "hyperlens.patching.weights:WeightsResult"

TOWARDS = {
    "tuned into base": ("to_tuned", "changed decisions that become the tuned model's"),
    "base into tuned": ("to_base", "changed decisions that become the base's again"),
}
KINDS = {
    "suffix": "blocks alone",
    "suffix_and_head": "with final norm and unembedding",
}


def body(results: Sequence[Any]) -> Markup:
    """Pair after pair."""
    parts = [
        paragraph(
            "Whole parts of one model's weights stand in the other: its last k blocks, with and "
            "without the final norm and the unembedding, and every part alone. Unlike an "
            "activation, a block's weights carry nothing of what happened before it."
        )
    ]
    for result in results:
        parts.append(tag("p", pair_name(result), class_="pairs"))
        parts += [conclusions(result), notes(result)]
        parts.append(grid(*_charts(result)))
        for direction, (metric, what) in TOWARDS.items():
            parts.append(
                details(
                    f"{direction}, every number of blocks", _table(result, direction, metric, what)
                )
            )
        parts.append(details("In words", preformatted(result.summary())))
    return join(parts)


def _charts(result: Any) -> list[Markup]:
    drawn = []
    for direction, (metric, what) in TOWARDS.items():
        rows = _along(result, direction, metric)
        alt = f"{direction}: share of {what}, by how many last blocks moved"
        drawn.append(_lines(rows, "share", f"{direction}: {what}", alt))
    alone = [
        {"part": name, "model": direction} | {key: row[key] for key in ("value", "low", "high")}
        for direction, (metric, _) in TOWARDS.items()
        for name, row in result.alone(direction, metric)
    ]
    title = "the same, by one part that moves alone"
    drawn.append(chart(dots(alone, "part", "share"), title, title, alone))
    for direction in TOWARDS:
        rows = _along(result, direction, "ttr")
        if rows:
            (base,), (tuned,) = (result.at("unpatched", side, "ttr") for side in ("base", "tuned"))
            title = (
                f"{direction}: type-token ratio of greedy text (the base model "
                f"{number(base['value'])}, the tuned model {number(tuned['value'])})"
            )
            drawn.append(_lines(rows, "TTR", title, f"{title}, by how many last blocks moved"))
    return drawn


def _along(result: Any, direction: str, metric: str) -> list[dict[str, Any]]:
    return [
        {"pair": words} | {key: row[key] for key in ("number", "value", "low", "high")}
        for kind, words in KINDS.items()
        for row in result.at(direction, kind, metric)
    ]


def _lines(rows: list[dict[str, Any]], y: str, title: str, alt: str) -> Markup:
    return chart(lines(rows, "value", y, x="number", x_title="last k blocks"), title, alt, rows)


def _table(result: Any, direction: str, metric: str, what: str) -> Markup:
    columns = [result.at(direction, kind, metric) for kind in KINDS]
    rows = [
        [str(first["number"]), *map(share, (first, second))]
        for first, second in zip(*columns, strict=True)
    ]
    return table(["last k blocks", *KINDS.values()], rows, what)
