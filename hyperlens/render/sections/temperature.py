"""Is it temperature? Table 1 of arXiv 2605.22579 on the page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from ..charts import chart, dots
from ..parts import (
    conclusions,
    details,
    heading,
    interval,
    join,
    notes,
    pair_name,
    paragraph,
    table,
)
from ..words import number

ORDER = 100
TITLE = "Is it no more than a temperature?"
READS = "temperature"
LOADS = "hyperlens.experiments.temperature_finding:TemperatureResult"

VARIANTS = {
    "original": "original",
    "matched": "original at T*",
    "matched_per_context": "original, T* per context",
    "tuned": "tuned",
}
METRICS = {
    "ttr": "TTR",
    "rep_2": "bigram repetition",
    "rep_3": "trigram repetition",
    "top1_agreement": "top-1 agreement",
    "spearman": "Spearman's ρ",
    "entropy": "entropy (nats)",
}
SHARES = ("ttr", "rep_2", "rep_3")


def body(results: Sequence[Any]) -> Markup:
    """One pair after another."""
    return join(_one(result) for result in results)


def _one(result: Any) -> Markup:
    found = result.extras["temperature"]
    pair = pair_name(result)
    rows = list(_shares(result))
    # The entropy may lie beyond what any temperature reaches.
    gives = "gives" if found["shared_reached"] else "comes nearest to giving"
    title = "greedy and sampled continuations, means over prompts with 95% intervals"
    tests = [t for t in result.extras["tests"] if t["first"] == "tuned"]
    return join(
        [
            heading(pair),
            conclusions(result),
            notes(result),
            paragraph(
                f"T* = {number(found['shared'])} {gives} the base model the tuned model's mean "
                f"entropy, {number(found['target_entropy'])} nats. For the tuned model's entropy "
                f"in each single context, half of all T* lie between "
                f"{number(found['own_quantiles']['0.25'])} and "
                f"{number(found['own_quantiles']['0.75'])}. Temperature keeps every rank: "
                f"{result.extras['greedy_tokens_changed']['matched']} of "
                f"{result.extras['greedy_tokens']} greedy tokens changed at T*, and "
                f"{result.extras['tied_contexts']['original']} of {found['n_contexts']} contexts "
                "have tied largest logits."
            ),
            chart(
                dots(rows, "measure", "share"),
                title,
                f"{pair}: repetition of continuations, by model and decoding",
                rows,
            ),
            table(["", *VARIANTS.values()], _table(result)),
            details("tests of the tuned model against T*", _tests(tests)),
        ]
    )


def _shares(result: Any) -> Iterator[dict[str, Any]]:
    for row in result.table:
        if row["metric"] in SHARES:
            yield {
                "measure": f"{METRICS[row['metric']]}, {row['decoding']}",
                "model": VARIANTS[row["variant"]],
                "value": row["value"],
                "low": row["low"],
                "high": row["high"],
            }


def _table(result: Any) -> Iterator[list[str]]:
    for first in result.select(variant="original"):
        decoding, metric = first["decoding"], first["metric"]
        cells = [interval(result.value(variant, decoding, metric)) for variant in VARIANTS]
        yield [f"{METRICS[metric]}, {decoding}", *cells]


def _tests(tests: Sequence[Mapping[str, Any]]) -> Markup:
    head = ["", "difference [95%]", "paired p", "Holm", "Welch's p", "Holm"]
    kinds = ("paired_p", "paired_p_holm", "welch_p", "welch_p_holm")
    rows = (
        [
            f"{METRICS[test['metric']]}, {test['decoding']}",
            interval(test["difference"]),
            *(number(test[kind]) for kind in kinds),
        ]
        for test in tests
    )
    return table(head, rows)
