"""Several pairs on several corpora: Table 6 of arXiv 2605.22579 on the page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
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
    share,
    table,
)
from ..words import number

ORDER = 80
TITLE = "Does it hold on other texts?"
READS = "cross_domain"
LOADS = "hyperlens.experiments.cross_domain_finding:CrossDomainResult"


def body(results: Sequence[Any]) -> Markup:
    """One table of pairs and corpora after another."""
    intro = paragraph(
        "Greedy continuations of the beginnings of texts, and what changed at the last layer, pair "
        "by pair and corpus by corpus. TTR, the type-token ratio: distinct tokens / tokens."
    )
    return join([intro, *(_one(result) for result in results)])


def _one(result: Any) -> Markup:
    from ..plots import png

    cells = (
        [pair, *(_cell(result.row(pair, corpus)) for corpus in result.corpora)]
        for pair in result.pairs
    )
    what = "greedy TTR, base → tuned" + (" / MAUVE, tuned" if result.has_mauve else "")
    parts = [
        heading(pair_name(result)),
        conclusions(result),
        notes(result),
        table(["", *result.corpora], cells, what),
        picture(
            png(result.plot(), dpi=110),
            f"{pair_name(result)}: type-token ratio of base and tuned model, change of effective "
            "dimension at the last layer, agreement and rank correlation, row by row",
        ),
        details("what was written", _written(result)),
        details("what changed inside", _inside(result)),
    ]
    if result.has_mauve:
        parts.append(details("MAUVE", _mauve(result)))
    return join(parts)


def _cell(row: Mapping[str, Any]) -> str:
    ratio = f"{number(row['ttr_base'])} → {number(row['ttr_tuned'])}"
    return f"{ratio} / {number(row['mauve_tuned'])}" if math.isfinite(row["mauve_tuned"]) else ratio


def _names(row: Mapping[str, Any]) -> str:
    return f"{row['pair']}, {row['corpus']}"


def _written(result: Any) -> Markup:
    words = {"ttr": "TTR", "rep_2": "repeated bigrams", "rep_3": "repeated trigrams"}
    head = ["", "prompts"]
    for metric in words.values():
        head += [f"{metric}, base", "tuned", "difference [95%]", "p"]
    rows = []
    for row in result.table:
        cells = [_names(row), str(row["n"])]
        for metric in words:
            gap = {"value": row[f"{metric}_difference"], "low": row[f"{metric}_low"]}
            gap["high"] = row[f"{metric}_high"]
            cells += [
                number(row[f"{metric}_base"]),
                number(row[f"{metric}_tuned"]),
                interval(gap),
                number(row[f"{metric}_p"]),
            ]
        rows.append(cells)
    return table(head, rows, "p: paired t test, Holm-corrected over the table")


def _inside(result: Any) -> Markup:
    words = {
        "top1_agreement": "same first token [95%]",
        "spearman": "Spearman's ρ [95%]",
        "delta_raw": "Δ effective dimension, raw [95%]",
        "delta_final_norm": "after the final norm [95%]",
    }
    rows = []
    for row in result.table:
        cells = [_names(row), f"{row['n_texts']:,}"]
        for name in words:
            one = {end or "value": row[f"{name}_{end}" if end else name] for end in ENDS}
            cells.append(share(one) if name == "top1_agreement" else interval(one))
        rows.append(cells)
    return table(["", "texts", *words.values()], rows, "teacher-forced, at the last layer")


ENDS = ("", "low", "high")


def _mauve(result: Any) -> Markup:
    rows = [
        [
            _names(row),
            *(
                f"{number(row[f'mauve_{side}'])} ({number(row[f'mauve_{side}_low'])} to "
                f"{number(row[f'mauve_{side}_high'])})"
                for side in ("base", "tuned")
            ),
        ]
        for row in result.table
    ]
    reader = result.meta["mauve"]["name"]
    caption = f"read by {reader}; mean (and range) over seeds of the clustering, no interval"
    return table(["", "base", "tuned"], rows, caption)
