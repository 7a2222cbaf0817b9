"""Did behaviour change: diversity of what both models write, and the texts side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from ...findings import Finding
from ..charts import chart, dots
from ..parts import cell, details, heading, interval, join, pair_name, paragraph, table, tag

ORDER = 20
TITLE = "Did behaviour change?"
READS = "behaviour"
LOADS = "hyperlens.experiments.behaviour_finding:BehaviourFinding"

NAMES = {
    "ttr": "TTR",
    "windowed_ttr": "TTR, windows of 50",
    "word_ttr": "TTR of words",
    "word_rep_2": "repeated bigrams of words",
    "word_rep_3": "repeated trigrams of words",
    "rep_2": "repeated bigrams",
    "rep_3": "repeated trigrams",
    "loop": "longest loop",
}
STRATEGIES = {"greedy": "Greedy decoding", "sample": "Sampling at temperature 1"}
SHOWN_AT_ONCE = 2


def body(results: Sequence[Finding]) -> Markup:
    """Measures of all pairs per strategy, then examples."""
    options = results[0].meta["options"]
    parts = [
        paragraph(
            f"Each model continued {options['n_prompts']} prompts of {options['prompt_tokens']} "
            f"tokens by {options['max_new_tokens']} tokens. TTR, the type-token ratio: distinct "
            "tokens / tokens, 1 repeats nothing. Repeated n-grams: the share that occurred before. "
            "Longest loop: the share of a continuation that only repeats itself. No units; means "
            "over prompts with 95% intervals."
        )
    ]
    strategies = dict.fromkeys(row["strategy"] for result in results for row in result.table)
    for strategy in strategies:
        rows = [_marked(row, result) for result in results for row in _in_order(result, strategy)]
        drawn = _once([row for row in rows if row["kind"] != "difference"])
        alt = f"{STRATEGIES[strategy]}: mean of every measure for each model, with intervals"
        title = f"{STRATEGIES[strategy]}: mean over prompts, 95% interval (0 to 1, no unit)"
        parts.append(chart(dots(drawn, "measure", "mean over prompts"), title, alt, drawn))
        parts.append(_differences(results, strategy))
        if all("distinct" in result.extras for result in results):
            parts.append(details("distinct n-grams over all prompts", _together(results, strategy)))
    parts.append(heading("The texts"))
    parts.append(
        paragraph(
            "Diversity is not quality. The same prompt, continued by each model, greedy; the first "
            "ones of a random choice, not picked."
        )
    )
    for result in results:
        parts.append(tag("p", pair_name(result), class_="pairs"))
        shown = [_example(example) for example in _greedy(result)]
        parts += shown[:SHOWN_AT_ONCE]
        if shown[SHOWN_AT_ONCE:]:
            parts.append(details("more", *shown[SHOWN_AT_ONCE:]))
    return join(parts)


def _marked(row: Mapping[str, Any], result: Finding) -> dict[str, Any]:
    model = result.meta.get(row["model"], {}).get("name", row["model"])
    return {
        "measure": NAMES[row["metric"]],
        "model": str(model),
        "value": row["value"],
        "low": row["low"],
        "high": row["high"],
        "prompts": row["n"],
        "kind": row["model"],
    }


def _in_order(result: Finding, strategy: str) -> list[Mapping[str, Any]]:
    rows = result.select(strategy=strategy)
    return [row for metric in NAMES for row in rows if row["metric"] == metric]


def _once(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Several pairs may share their base: draw it once."""
    return list({repr(sorted(row.items())): row for row in rows}.values())


def _differences(results: Sequence[Finding], strategy: str) -> Markup:
    found = [result.select(strategy=strategy, model="difference") for result in results]
    measured = {row["metric"] for row in found[0]}
    metrics = [metric for metric in NAMES if metric in measured]
    body_rows = [
        [NAMES[metric]]
        + [
            f"{interval(row)}{_p(row['p'])}"
            for rows in found
            for row in rows
            if row["metric"] == metric
        ]
        for metric in metrics
    ]
    head = ["tuned − base, paired by prompt [95%]", *map(pair_name, results)]
    return table(head, body_rows, "p: paired t test, Holm-corrected over all measures of a pair")


def _together(results: Sequence[Any], strategy: str) -> Markup:
    """One number for all continuations of a model: how much they resemble each other, too."""
    rows = [
        [f"{pair_name(result)}, {model}", *map(cell, result.distinct(strategy, model).values())]
        for result in results
        for model in ("base", "tuned")
    ]
    head = ["distinct n-grams / n-grams", "n = 1", "n = 2", "n = 3"]
    return table(head, rows, "over all continuations together; falls with their number")


def _p(p: float) -> str:
    if p != p:
        return ""
    return "  p < 0.001" if p < 0.001 else f"  p = {p:.3f}"


def _greedy(result: Finding) -> list[Mapping[str, Any]]:
    examples: list[Mapping[str, Any]] = list(result.extras.get("examples", []))
    return [e for e in examples if e["strategy"] == "greedy"] or examples


def _example(example: Mapping[str, Any]) -> Markup:
    sides = (
        tag(
            "div",
            tag("h4", side),
            tag("p", tag("span", example["prompt"], class_="prompt"), example[side]["text"]),
        )
        for side in ("base", "tuned")
    )
    return tag("div", *sides, class_="texts")
