"""The norm question: how much of a terminal expansion is block, and how much final norm."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from ..parts import (
    conclusions,
    details,
    heading,
    interval,
    join,
    notes,
    pair_name,
    paragraph,
    picture,
    preformatted,
    share,
    table,
)
from ..words import number

ORDER = 136
TITLE = "Is the expansion in the block, or in the final norm?"
READS = "patch_norm"
LOADS = "hyperlens.patching.norm:NormResult"

CELLS = {
    "raw": ("raw_base", "raw_tuned"),
    "every vector scaled to one length": ("unit_rms_base", "unit_rms_tuned"),
    "after the base model's norm": ("base_stream_base_norm", "tuned_stream_base_norm"),
    "after the tuned model's norm": ("base_stream_tuned_norm", "tuned_stream_tuned_norm"),
    "raw, one block earlier": ("before_base", "before_tuned"),
}
EFFECTS = {
    "raw_change": "the stream itself, raw",
    "rescaling": "scaling every vector to one length",
    "weighting": "reading it through a norm's weights",
    "weights": "the change of the norm's weights",
    "change": "sum: after each model's own norm",
    "stream": "2 x 2: effect of the stream",
    "interaction": "2 x 2: interaction of stream and weights",
    "jump_as_read": "what the last layer seems to add, read after the norm",
    "jump_raw": "what the last block adds, raw on both sides",
}
SWAPS = {
    "norm into base": "the base model with the tuned model's norm",
    "stream into base": "the base model with the tuned model's stream",
    "norm into tuned": "the tuned model with the base model's norm",
    "stream into tuned": "the tuned model with the base model's stream",
}


def body(results: Sequence[Any]) -> Markup:
    """Pair after pair."""
    intro = paragraph(
        "The paper reads its last layer after the final norm, and all others raw. Here either "
        "model's last output is read through either model's norm. That tells three things apart: "
        "what the blocks put out, what any norm does by scaling every vector to one length, and "
        "what tuning changed in the norm's weights."
    )
    return join([intro, *(part for result in results for part in _one(result))])


def _one(result: Any) -> Iterator[Markup]:
    from ..plots import png

    pair = pair_name(result)
    yield heading(pair)
    yield conclusions(result)
    yield notes(result)
    yield picture(
        png(result.plot(), dpi=110),
        f"{pair}: the change of dimension from raw to after the norm in steps, the dimension of "
        "either stream after either norm, and the decisions that a swapped norm changes",
    )
    cells = (
        [words, *(_both(result.dimension(name)) for name in names)]
        for words, names in CELLS.items()
    )
    yield details("every dimension", table(["dimension [95%], naive", "base", "tuned"], cells))
    effects = ([words, _both(result.dimension(name))] for name, words in EFFECTS.items())
    yield details("steps and effects", table(["tuned − base, dimensions", ""], effects))
    swaps = (
        [words, *(share(result.decided(name, metric)) for metric in ("to_tuned", "to_base"))]
        for name, words in SWAPS.items()
    )
    head = ["changed decisions that are", "the tuned model's", "the base model's"]
    yield details("decisions", table(head, swaps))
    yield details("In words", preformatted(result.summary()))


def _both(row: Mapping[str, Any]) -> str:
    return f"{interval(row)}, naive {number(row['naive'])}"
