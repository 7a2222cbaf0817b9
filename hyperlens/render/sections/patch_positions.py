"""At which layer, and from which token, a changed decision comes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from markupsafe import Markup

from ..charts import chart
from ..parts import (
    conclusions,
    details,
    grid,
    join,
    notes,
    pair_name,
    paragraph,
    preformatted,
    tag,
)
from ..words import plain

ORDER = 131
TITLE = "From which token does a changed decision come?"
READS = "patch_positions"
LOADS = "hyperlens.patching.positions:PositionsResult"

DIRECTIONS = {
    "tuned into base": "tuned into base: what brings the decision about",
    "base into tuned": "base into tuned: what undoes it",
}
EVERY = -1
CELL = 22


def body(results: Sequence[Any]) -> Markup:
    """Pair after pair."""
    parts = [
        paragraph(
            "At one decision per text that tuning changed, the residual of one model at one token "
            "and layer is put into the other. Colour: how far the logit difference (tuned "
            "model's top-1 token less base's) moves, from the target's (0) to the source's (1). "
            "The column “all” patches every position up to the decision. Hover for the interval "
            "and for the share of decisions that become the source's."
        )
    ]
    for result in results:
        parts.append(tag("p", pair_name(result), class_="pairs"))
        parts += [conclusions(result), notes(result)]
        parts.append(grid(*(_map(result, way, words) for way, words in DIRECTIONS.items())))
        example = result.extras["example"]
        text = f"{example['before']}{''.join(example['tokens'])}"
        top_1 = [f"“{plain(example[side])}”" for side in ("base_top_1", "tuned_top_1")]
        goes_on = f" goes on with {top_1[0]} (base) or {top_1[1]} (tuned)."
        parts.append(paragraph("One of the texts, “", plain(text), "”,", goes_on))
        parts.append(grid(*(_text(result, way, words) for way, words in DIRECTIONS.items())))
        parts.append(details("In words", preformatted(result.summary())))
    return join(parts)


def _map(result: Any, direction: str, words: str) -> Markup:
    recovered = {
        (row["layer"], row["offset"]): row["value"]
        for row in result.select(direction=direction, metric="recovered")
    }
    rows = [
        {
            "layer": row["layer"],
            "position": "all" if row["offset"] == EVERY else str(row["offset"]),
            "moved": row["value"],
            "low": row["low"],
            "high": row["high"],
            "recovered": recovered[row["layer"], row["offset"]],
        }
        for row in result.select(direction=direction, metric="moved")
    ]
    order = [*map(str, result.offsets), "all"]
    alt = f"{words}: {_said(result, direction)}"
    hover = {"moved": "moved", "low": "95% from", "high": "to", "recovered": "become the source's"}
    return chart(_heat(rows, order, "tokens before the last one", hover), words, alt, rows)


def _said(result: Any, direction: str) -> str:
    layer = result.arrival(direction)
    if layer is None:
        return "the last token alone carries no majority of decisions at any layer"
    return f"from layer {layer} on the last token alone carries most decisions"


def _text(result: Any, direction: str, words: str) -> Markup:
    rows = list(_cells(result, direction))
    order = list(dict.fromkeys(row["position"] for row in rows))
    hover = {"moved": "moved", "top_1": "then the model's top-1 token is"}
    title = f"that text, {direction}"
    return chart(_heat(rows, order, "token", hover), title, f"{words}, in that text", rows)


def _cells(result: Any, direction: str) -> Iterator[dict[str, Any]]:
    example = result.extras["example"]
    tokens = dict(zip(result.offsets, example["tokens"], strict=True))
    for offset, token in tokens.items():
        for one in example["cells"]:
            if one["direction"] == direction and one["offset"] == offset:
                yield {
                    "layer": one["layer"],
                    # A token may come twice: its place keeps the columns apart.
                    "position": f"{plain(token)} ({-offset})",
                    "moved": one["moved"],
                    "top_1": plain(one["top_1"]),
                }


def _heat(
    rows: Sequence[dict[str, Any]], order: Sequence[str], x_title: str, hover: dict[str, str]
) -> Any:
    import altair as alt

    height = CELL * len({row["layer"] for row in rows})
    texts = {"choice"}
    tooltip = [alt.Tooltip("layer:O"), alt.Tooltip("position:N")] + [
        alt.Tooltip(f"{key}:N", title=title)
        if key in texts
        else alt.Tooltip(f"{key}:Q", title=title, format=".3~f")
        for key, title in hover.items()
    ]
    return (
        alt.Chart(alt.Data(values=[dict(row) for row in rows]))
        .mark_rect()
        .encode(
            x=alt.X("position:N", sort=list(order), title=x_title, axis=alt.Axis(labelLimit=90)),
            y=alt.Y("layer:O", sort="descending", title="layer"),
            color=alt.Color(
                "moved:Q",
                title="moved",
                scale=alt.Scale(scheme="redblue", domain=[-1, 1], reverse=True, clamp=True),
            ),
            tooltip=tooltip,
        )
        .properties(width="container", height=height)
    )
