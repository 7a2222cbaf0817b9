"""Is it real: how much of the last layer's change is the block's, and how much the reading's."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from ...results.audit import audit
from ...results.comparison import Comparison
from ..parts import join, pair_name, paragraph, table
from ..words import number, signed

ORDER = 40
TITLE = "Is it the block, or the way it is read?"
READS = "comparison"

QUANTITIES = {
    "participation_ratio": "Δ effective dimension (dimensions)",
    "drift": "L2 distance (the norm changes its scale)",
}


def body(results: Sequence[Comparison]) -> Markup | None:
    """The parts that the paper's reading of layer L is the sum of."""
    rows = []
    for result in results:
        for one in audit(result):
            form = signed if one.quantity == "participation_ratio" else number
            rows.append(
                [
                    pair_name(result),
                    QUANTITIES[one.quantity],
                    form(one.total),
                    form(one.block),
                    *(signed(part) for part in (one.norm, one.sinks, one.bos)),
                    signed(one.terminal_jump),
                ]
            )
    if not rows:
        return None
    head = [
        "models",
        "at the last layer",
        "as usually read",
        "= block's raw output",
        "+ final norm",
        "+ attention sinks",
        "+ BOS",
        "raw, since the layer before",
    ]
    return join(
        [
            paragraph(
                "The last hidden state of Hugging Face models is taken after the final norm, and "
                "all others before it; scripts also count BOS and attention sinks, a few tokens "
                "with huge norms. So a jump at the last layer may be made by the reading. Here "
                "the number as usually read is taken apart: only the block's raw output is the "
                "block's work, and only what is new since the layer before is the last block's."
            ),
            table(head, rows),
        ]
    )
