"""What kind of tokens the tuned model picks, by their rank in the base model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from ..parts import (
    conclusions,
    details,
    join,
    notes,
    pair_name,
    paragraph,
    picture,
    preformatted,
    share,
    table,
    tag,
)

ORDER = 120
TITLE = "Where do the winners come from?"
READS = "provenance"
LOADS = "hyperlens.experiments.provenance_finding:ProvenanceResult"

MODES = ("teacher-forced", "free-running")
BUCKETS = ("1", "2-10", ">10")
INSIDE = {
    "share": "share of decisions",
    "function word": "of these: function words",
    "content word": "content words",
    "subword": "pieces that continue a word",
    "punctuation": "punctuation",
    "number": "numbers",
    "near_synonym": "near-synonyms of the base's pick",
    "avoids": "avoid a repeated trigram",
    "falls_into": "make one the base would not",
}


def body(results: Sequence[Any]) -> Markup:
    """Per pair and way of reading: the buckets, what is in them, and examples."""
    from ..plots import png

    parts = [
        paragraph(
            "The base model's rank of every token the tuned model picks, on given texts and along "
            "what it writes by itself; then what those tokens are. Near-synonym: among the ten "
            "nearest neighbours of the base's pick in the unembedding. Shares are means over texts "
            "with 95% intervals."
        )
    ]
    for result in results:
        parts.append(tag("p", pair_name(result), class_="pairs"))
        parts.append(
            picture(
                png(result.plot(), dpi=110),
                f"{pair_name(result)}: share of decisions by base rank, by bucket of ranks, and "
                "kinds of tokens in each bucket, on given texts and in what the tuned model writes",
            )
        )
        for mode in MODES:
            head = [mode, *(f"base rank {bucket}" for bucket in BUCKETS)]
            parts.append(table(head, _rows(result, mode)))
        parts += [conclusions(result), notes(result)]
        parts.append(details("Picks in their context", _examples(result)))
        parts.append(details("In words", preformatted(result.summary())))
    return join(parts)


def _rows(result: Any, mode: str) -> list[list[str]]:
    rows = []
    for metric, words in INSIDE.items():
        cells = []
        for bucket in BUCKETS:
            found = result.select(mode=mode, bucket=bucket, metric=metric)
            cells.append(share(found[0]) if found else "")
        rows.append([words, *cells])
    return rows


def _examples(result: Any) -> Markup:
    rows = [
        [e["mode"], e["context"], e["picked"], e["base_first"], f"{e['rank']:,}", e["kind"]]
        for e in result.extras["examples"]
    ]
    head = ["", "context", "tuned pick", "base pick", "base rank of the tuned pick", "kind"]
    return table(head, rows)
