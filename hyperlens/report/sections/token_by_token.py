"""Token by token: what each model wrote, coloured by the base model's rank of every token."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from ...findings import Finding
from ..parts import data, details, join, pair_name, paragraph, tag

ORDER = 70
TITLE = "Token by token"
READS = "behaviour"
LOADS = "hyperlens.experiments.behaviour_finding:BehaviourFinding"

SHOWN_AT_ONCE = 1
COLOUR = "#d55e00"


def body(results: Sequence[Finding]) -> Markup | None:
    """Every example of every pair, the first of each at once and the others on demand."""
    by_result = [(result, result.extras.get("examples", [])) for result in results]
    ranks = [
        rank
        for _, examples in by_result
        for example in examples
        for side in ("base", "tuned")
        for rank in example[side]["base_rank"]
    ]
    if not ranks:
        return None
    # One scale for all, or two pairs could not be compared.
    deepest = max(10, *ranks)
    parts = [
        paragraph(
            "The more a token is coloured, the lower the base model ranked it in its place, on a "
            "logarithmic scale. No colour is rank 1, what the base's own greedy decoding would "
            "take. Hover over a token for its rank."
        ),
        _key(deepest),
    ]
    for result, examples in by_result:
        views = [_example(example, deepest) for example in examples]
        parts.append(tag("p", pair_name(result), class_="pairs"))
        parts += views[:SHOWN_AT_ONCE]
        if views[SHOWN_AT_ONCE:]:
            parts.append(details(f"{len(views) - SHOWN_AT_ONCE} more", *views[SHOWN_AT_ONCE:]))
    return join(parts)


def _key(deepest: int) -> Markup:
    """Which colour is which rank."""
    steps = [10**power for power in range(math.ceil(math.log10(deepest)))]
    swatches = (
        tag(
            "span",
            f"{rank:,}",
            style=f"--share: {100 * math.log10(rank) / math.log10(deepest):.0f}%",
        )
        for rank in [*steps, deepest]
    )
    return tag("p", "base rank ", *swatches, class_="key", style=f"--full: {COLOUR}")


def _example(example: Mapping[str, Any], deepest: int) -> Markup:
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


def _tokens(side: Mapping[str, Any], deepest: int) -> Markup:
    """Drawn by circuitsvis; the plain text stands inside until it is, and for printing."""
    ranks = side["base_rank"]
    given = {"tokens": side["tokens"], "ranks": ranks, "deepest": deepest, "colour": COLOUR}
    numbers = ", ".join(
        f"{token!r} {rank:,}" for token, rank in zip(side["tokens"], ranks, strict=True)
    )
    return join(
        [
            tag("div", data(given), tag("p", side["text"]), class_="tokens"),
            details("base ranks as numbers", paragraph(numbers)),
        ]
    )
