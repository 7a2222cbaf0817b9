"""MAUVE of two sets of texts on the page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from ..parts import details, heading, join, notes, pair_name, paragraph, picture, table
from ..words import number

ORDER = 25
TITLE = "How near are the texts to others?"
READS = "mauve"
LOADS = "hyperlens.experiments.mauve_finding:MauveResult"


def body(results: Sequence[Any]) -> Markup:
    """One pair of sets of texts after another."""
    intro = paragraph(
        "MAUVE compares two sets of texts by the last hidden states of a model that reads them: 1 "
        "for the same distribution, towards 0 for disjoint ones. Its clusters are drawn at random, "
        "so it was computed with several seeds; other texts would move it more than other seeds."
    )
    return join([intro, *(_one(result) for result in results)])


def _one(result: Any) -> Markup:
    from ..plots import png

    low, high = result.spread
    p, q, features = (result.meta[key] for key in ("p", "q", "features"))
    rows = [
        ["MAUVE, mean over seeds", number(result.value)],
        ["least and greatest of the seeds", f"{number(low)} to {number(high)}"],
        ["texts", f"{p['n']:,} and {q['n']:,}"],
        ["read by", features["name"]],
        ["which vector", features["position"]],
    ]
    every = ([str(row["seed"]), number(row["value"]), number(row["smoothed"])]
             for row in result.table)  # fmt: skip
    return join(
        [
            heading(pair_name(result)),
            notes(result),
            table(["", "value"], rows),
            picture(
                png(result.plot(), dpi=110),
                f"divergence curves of {pair_name(result)}; the area under them is MAUVE, "
                f"{result.value:.3f}",
            ),
            details("every seed", table(["seed", "MAUVE", "smoothed"], every)),
        ]
    )
