"""Token by token: what each model wrote, coloured by the base model's rank of every token."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup, escape

from ...results.result import Result
from ..parts import data, details, join, pair_name, paragraph, tag

ORDER = 70
TITLE = "Token by token"
READS = "behaviour"
LOADS = "hyperlens.experiments.behaviour_finding:BehaviourResult"

SHOWN_AT_ONCE = 1


def body(results: Sequence[Result]) -> Markup | None:
    """Every example of every pair, the first of each at once and the others on demand."""
    parts = [
        paragraph(
            "The darker a token, the lower the base model ranked it in its place: white is rank 1, "
            "what the base's own greedy decoding would take. Hover over a token for log10 of its "
            "rank (0 is rank 1, 1 is rank 10, 2 is rank 100)."
        )
    ]
    drawn = False
    for result in results:
        examples = result.extras.get("examples", [])
        if not examples:
            continue
        drawn = True
        deepest = max(
            (rank for e in examples for side in ("base", "tuned") for rank in e[side]["base_rank"]),
            default=10,
        )
        views = [_example(example, math.log10(max(deepest, 10))) for example in examples]
        parts.append(tag("p", pair_name(result), class_="pairs"))
        parts += views[:SHOWN_AT_ONCE]
        if views[SHOWN_AT_ONCE:]:
            parts.append(details(f"{len(views) - SHOWN_AT_ONCE} more", *views[SHOWN_AT_ONCE:]))
    return join(parts) if drawn else None


def _example(example: Mapping[str, Any], deepest: float) -> Markup:
    sides = (
        tag(
            "div",
            tag("h4", f"{side}, {example['strategy']}"),
            tag("p", tag("span", example["prompt"], class_="prompt")),
            _tokens(example[side], deepest),
        )
        for side in ("base", "tuned")
    )
    return tag("div", *sides, class_="texts")


def _tokens(side: Mapping[str, Any], deepest: float) -> Markup:
    """Drawn by circuitsvis; the plain text stands inside until it is, and for printing."""
    ranks = side["base_rank"]
    props = {
        "tokens": [_shown(token) for token in side["tokens"]],
        "values": [round(math.log10(rank), 2) for rank in ranks],
        "minValue": 0.0,
        "maxValue": deepest,
        "negativeColor": "#ffffff",
        "positiveColor": "#D55E00",
    }
    numbers = ", ".join(
        f"{token!r} {rank:,}" for token, rank in zip(side["tokens"], ranks, strict=True)
    )
    return join(
        [
            tag("div", data(props), tag("p", side["text"]), class_="tokens"),
            details("base ranks as numbers", paragraph(numbers)),
        ]
    )


def _shown(token: object) -> str:
    """A token as circuitsvis wants it: it puts tokens into the page as HTML, unescaped."""
    return str(escape(str(token).replace("\n", "¶")))
