"""What is measured of continuations by several ways of decoding, as rows of one table."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ..decoding.diversity import MEASURES, distinct_by_text, is_ttr_again
from ..statistics import significance
from .decoding_finding import METHODS, REFERENCE

Tokens = Sequence[Sequence[int]]
Way = tuple[str, str]  # model and method


def measured(samples: Sequence[Tokens], eos: Collection[int]) -> dict[str, list[float]]:
    """Every measure of every prompt, the mean over its samples.

    Args:
        samples: for each run over the prompts, the new tokens of each.
        eos: ids that end a text.
    """
    each = [
        {name: [measure(one) for one in tokens] for name, measure in MEASURES.items()}
        | {
            "distinct_2": distinct_by_text(tokens, 2),
            "length": [float(_length(one, eos)) for one in tokens],
        }
        for tokens in samples
    ]
    return {
        metric: [_mean(values) for values in zip(*(one[metric] for one in each), strict=True)]
        for metric in each[0]
    }


def _length(tokens: Sequence[int], eos: Collection[int]) -> int:
    """How many tokens stand before the first end of text."""
    return next((place for place, token in enumerate(tokens) if token in eos), len(tokens))


def _mean(values: Sequence[float]) -> float:
    """Of those that exist: a sample without any token has no measure of repetition."""
    kept = [value for value in values if not math.isnan(value)]
    return sum(kept) / len(kept) if kept else math.nan


def rows(
    values: Mapping[Way, Mapping[str, Sequence[float]]], mauve: Mapping[Way, float]
) -> list[dict[str, Any]]:
    """The table: means, differences to the reference paired by prompt, corrected p values.

    Args:
        values: every measure of every prompt, for each way of decoding.
        mauve: for each way, or empty.
    """
    reference = values[REFERENCE]
    table = []
    for way, of_way in values.items():
        for metric, per_prompt in of_way.items():
            gap, p = _without_interval(math.nan, 0), math.nan
            if way != REFERENCE:
                gap = significance.difference(per_prompt, reference[metric])
                # What is the same test twice counts once in Holm's correction.
                if not is_ttr_again(metric, of_way, reference):
                    p = significance.paired_p(per_prompt, reference[metric])
            table.append(_row(way, metric, significance.estimate(per_prompt), gap, p))
        if way in mauve:
            n = len(of_way["ttr"])
            value = _without_interval(mauve[way], n)
            gap = _without_interval(mauve[way] - mauve[REFERENCE], n)
            table.append(_row(way, "mauve", value, gap, math.nan))
    return significance.holm_rows(table)


def _without_interval(value: float, n: int) -> significance.Estimate:
    return significance.Estimate(value, math.nan, math.nan, math.nan, n)


def _row(
    way: Way,
    metric: str,
    found: significance.Estimate,
    gap: significance.Estimate,
    p: float,
) -> dict[str, Any]:
    model, method = way
    return {
        "model": model,
        "method": method,
        "deterministic": METHODS[method].deterministic,
        "metric": metric,
        **found._asdict(),
        "difference": gap.value,
        "difference_low": gap.low,
        "difference_high": gap.high,
        "p": p,
    }
