"""Did behaviour change: diversity of what both models write, and the texts side by side."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from ...results.result import Result
from ..charts import chart, dots
from ..parts import (
    cell,
    details,
    heading,
    interval,
    join,
    notes,
    p_in_words,
    pair_name,
    paragraph,
    table,
    tag,
)
from ..words import MISSING

ORDER = 20
TITLE = "Did behaviour change?"
READS = "behaviour"
LOADS = "hyperlens.experiments.behaviour_finding:BehaviourResult"

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
SIDES = ("base", "tuned")
SHOWN_AT_ONCE = 2


def body(results: Sequence[Result]) -> Markup:
    """Measures of all pairs per strategy, then examples."""
    parts = [
        paragraph(
            f"{_continued(results)}. TTR, the type-token ratio: distinct tokens / tokens, 1 "
            "repeats nothing. Repeated n-grams: the share that occurred before. Longest loop: the "
            "share of a continuation that only repeats itself. No units; means over prompts with "
            "95% intervals."
        ),
        notes(*results),
    ]
    strategies = dict.fromkeys(row["strategy"] for result in results for row in result.table)
    for strategy in strategies:
        drawn = _drawn(results, strategy)
        alt = f"{STRATEGIES[strategy]}: mean of every measure for each model, with intervals"
        title = f"{STRATEGIES[strategy]}: mean over prompts, 95% interval (0 to 1, no unit)"
        parts.append(chart(dots(drawn, "measure", "mean over prompts"), title, alt, drawn))
        parts.append(_differences(results, strategy))
        if together := _together(results, strategy):
            parts.append(details("distinct n-grams over all prompts", together))
    parts.append(heading("The texts"))
    parts.append(
        paragraph(
            "Diversity is not quality. The same prompts, continued by each model; drawn at random, "
            "not picked."
        )
    )
    for result in results:
        examples = _examples(result)
        how = [STRATEGIES[example["strategy"]] for example in examples[:1]]
        parts.append(tag("p", ": ".join([pair_name(result), *how]), class_="pairs"))
        shown = [_example(example) for example in examples]
        parts += shown[:SHOWN_AT_ONCE]
        if shown[SHOWN_AT_ONCE:]:
            parts.append(details("more", *shown[SHOWN_AT_ONCE:]))
    return join(parts)


def _continued(results: Sequence[Result]) -> str:
    """How much was written: once if it is the same for all pairs, else of each."""
    how = "{n_prompts} prompts of {prompt_tokens} tokens by {max_new_tokens} tokens"
    told = {pair_name(result): how.format_map(result.meta["options"]) for result in results}
    if len(set(told.values())) == 1:
        return f"Each model continued {next(iter(told.values()))}"
    return "Each model continued " + "; ".join(f"{said} ({pair})" for pair, said in told.items())


def _drawn(results: Sequence[Result], strategy: str) -> list[dict[str, Any]]:
    """Rows of the chart; a base that pairs share, with the same numbers, is drawn once."""
    series = [
        (result, side, rows)
        for result in results
        for side in SIDES
        if (rows := _in_order(result.select(strategy=strategy, model=side)))
    ]
    meanings: dict[str, set[str]] = defaultdict(set)
    for result, side, rows in series:
        meanings[_name(result, side)].add(repr((side, rows)))
    drawn: dict[str, list[dict[str, Any]]] = {}
    for result, side, rows in series:
        name = _name(result, side)
        if len(meanings[name]) > 1:  # one name would stand for several texts or models
            name = f"{side} of {pair_name(result)}"
        drawn[name] = [
            {
                "measure": NAMES[row["metric"]],
                "model": name,
                **{key: row[key] for key in ("value", "low", "high")},
                "prompts": row["n"],
                "kind": side,
            }
            for row in rows
        ]
    return [row for rows in drawn.values() for row in rows]


def _name(result: Result, side: str) -> str:
    return str(result.meta.get(side, {}).get("name", side))


def _in_order(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [row for metric in NAMES for row in rows if row["metric"] == metric]


def _differences(results: Sequence[Result], strategy: str) -> Markup:
    found = [
        {row["metric"]: row for row in result.select(strategy=strategy, model="difference")}
        for result in results
    ]
    rows = (
        [NAMES[metric], *(_difference(of_pair.get(metric)) for of_pair in found)]
        for metric in NAMES
        if any(metric in of_pair for of_pair in found)
    )
    head = ["tuned − base, paired by prompt [95%]", *map(pair_name, results)]
    return table(head, rows, "p: paired t test, Holm-corrected over all measures of a pair")


def _difference(row: Mapping[str, Any] | None) -> str:
    return MISSING if row is None else f"{interval(row)}  {p_in_words(row['p'])}".rstrip()


def _together(results: Sequence[Any], strategy: str) -> Markup | None:
    """One number for all continuations of a model: how much they resemble each other, too."""
    found = [
        (f"{pair_name(result)}, {model}", result.distinct(strategy, model))
        for result in results
        for model in SIDES
    ]
    rows = [[name, *map(cell, shares.values())] for name, shares in found if shares]
    if not rows:
        return None
    head = ["distinct n-grams / n-grams", "n = 1", "n = 2", "n = 3"]
    return table(head, rows, "over all continuations together; falls with their number")


def _examples(result: Result) -> list[Mapping[str, Any]]:
    """The greedy ones, or if nothing was written greedily all."""
    examples: list[Mapping[str, Any]] = list(result.extras.get("examples", []))
    return [e for e in examples if e["strategy"] == "greedy"] or examples


def _example(example: Mapping[str, Any]) -> Markup:
    sides = (
        tag(
            "div",
            tag("h4", side),
            tag("p", tag("span", example["prompt"], class_="prompt"), example[side]["text"]),
        )
        for side in SIDES
    )
    return tag("div", *sides, class_="texts")
