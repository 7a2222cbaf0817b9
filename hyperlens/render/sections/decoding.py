"""Would another way of decoding do? Table 7 of arXiv 2605.22579 on the page, with intervals."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from markupsafe import Markup

from ..charts import chart, dots
from ..parts import (
    conclusions,
    details,
    grid,
    heading,
    interval,
    join,
    notes,
    p_in_words,
    pair_name,
    paragraph,
    preformatted,
    table,
    tag,
)
from ..words import number, plain

ORDER = 22
TITLE = "Would another way of decoding do as well?"
READS = "decoding"
LOADS = "hyperlens.experiments.decoding_finding:DecodingResult"

METRICS = {
    "ttr": "TTR ↑",
    "windowed_ttr": "TTR, windows of 50 ↑",
    "rep_2": "repeated bigrams ↓",
    "rep_3": "repeated trigrams ↓",
    "loop": "longest loop ↓",
    "distinct_2": "distinct bigrams, all texts ↑",
    "length": "tokens before the end",
    "mauve": "MAUVE ↑",
}
DRAWN = {"ttr": "TTR, the share of distinct tokens", "rep_2": "repeated bigrams, a share"}
KINDS = {True: "deterministic", False: "sampled"}


def body(results: Sequence[Any]) -> Markup:
    """One pair after another."""
    explained = paragraph(
        "The base model under several ways of decoding that need no training, beside the tuned "
        "model's greedy text. Det.: whether the same prompt always gives the same text. Means over "
        "prompts with 95% intervals; distinct bigrams are counted over all texts together."
    )
    return join([explained, *(_one(result) for result in results)])


def _one(result: Any) -> Markup:
    metrics = [metric for metric in METRICS if metric in result.metrics]
    head = ["", "Det.", *(METRICS[metric] for metric in metrics), "seconds"]
    differences = ["minus the tuned model's greedy decoding", *(METRICS[m] for m in metrics)]
    return join(
        [
            heading(pair_name(result)),
            conclusions(result),
            notes(result),
            grid(*(_chart(result, metric, words) for metric, words in DRAWN.items())),
            table(head, _rows(result, metrics)),
            details(
                "differences, paired by prompt, and p of the paired t test (Holm)",
                table(differences, _differences(result, metrics)),
            ),
            *_examples(result),
            details("in words", preformatted(result.summary())),
        ]
    )


def _chart(result: Any, metric: str, words: str) -> Markup:
    drawn = [
        {
            "way": result.called(*way),
            "model": KINDS[row["deterministic"]],
            **{key: row[key] for key in ("value", "low", "high", "n")},
        }
        for way in result.ways
        for row in [result.value(*way, metric)]
    ]
    alt = f"{words}: " + "; ".join(f"{row['way']} {number(row['value'])}" for row in drawn)
    return chart(dots(drawn, "way", words), f"{words}: mean over prompts, 95%", alt, drawn)


def _rows(result: Any, metrics: Sequence[str]) -> Iterator[list[str]]:
    for way in result.ways:
        rows = [result.value(*way, metric) for metric in metrics]
        yield [
            result.called(*way),
            "yes" if rows[0]["deterministic"] else "no",
            *map(interval, rows),
            number(result.about(*way)["seconds"]),
        ]


def _differences(result: Any, metrics: Sequence[str]) -> Iterator[list[str]]:
    for way in result.ways[:-1]:
        rows = [result.value(*way, metric) for metric in metrics]
        yield [result.called(*way), *(_difference(row) for row in rows)]


def _difference(row: Any) -> str:
    ends = {"value": "difference", "low": "difference_low", "high": "difference_high"}
    text = interval({end: row[column] for end, column in ends.items()})
    return f"{text}  {p_in_words(row['p'])}".rstrip()


def _examples(result: Any) -> Iterator[Markup]:
    for example in result.extras["examples"]:
        texts = (
            tag(
                "div",
                tag("h4", result.called(one["model"], one["method"])),
                tag("p", tag("span", example["prompt"], class_="prompt"), one["text"]),
            )
            for one in example["texts"]
        )
        opening = plain(example["prompt"])[:60]
        yield details(f"what each wrote after “{opening}”", tag("div", *texts, class_="texts"))
