"""Is it a static bias? Table 2 of arXiv 2605.22579 on the page, with placebos."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
    table,
)
from ..words import number, percent

ORDER = 110
TITLE = "Is it no more than a bias on some tokens?"
READS = "static_bias"
LOADS = "hyperlens.experiments.static_bias_finding:StaticBiasResult"

BIASES = {
    "promoted": "top K",
    "all": "all tokens",
    "random": "random K",
    "shuffled": "shuffled δ",
    "constant": "constant",
}
METRICS = {
    "ttr": "TTR of greedy continuations",
    "rep_2": "bigram repetition of greedy continuations",
    "agreement_tuned": "top-1 agreement with the tuned model, teacher-forced",
}


def body(results: Sequence[Any]) -> Markup:
    """One pair after another."""
    return join(_one(result) for result in results)


def _one(result: Any) -> Markup:
    from ..plots import png

    pair = pair_name(result)
    promoted = (
        [repr(one["token"]), number(one["rank_gain"]), number(one["delta"])]
        for one in result.extras["promoted"]
    )
    tables = (
        table(["α", *BIASES.values()], _rows(result, metric), caption)
        for metric, caption in METRICS.items()
    )
    return join(
        [
            heading(pair),
            conclusions(result),
            notes(result),
            paragraph(
                f"A bias on the {result.extras['k_used']} most promoted tokens, or on all, is "
                "added to the base model's logits, α times their mean shift. "
                f"{percent(result.extras['static_share'])} of the mean squared change of the "
                "centred logits is the same in every context; tokens that nobody ever picks count "
                "in it as much as those that matter."
            ),
            picture(
                png(result.plot(), dpi=110),
                f"{pair}: diversity, repetition and agreement with the tuned model as the bias "
                "grows, beside three placebos",
            ),
            details("every α, with 95% intervals", *tables),
            details(
                "the most promoted tokens",
                table(["token", "mean places gained", "mean logit shift"], promoted),
            ),
        ]
    )


def _rows(result: Any, metric: str) -> Iterator[list[str]]:
    yield ["base", *([interval(result.value("none", 0.0, metric))] * len(BIASES))]
    for alpha in result.alphas:
        cells = [interval(result.value(bias, alpha, metric)) for bias in BIASES]
        yield [number(alpha), *cells]
    yield ["tuned", *([interval(result.value("tuned", 0.0, metric))] * len(BIASES))]
