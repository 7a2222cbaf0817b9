"""How much a text repeats itself: pure functions of one sequence of tokens, or of words.

Every measure takes any sequence of hashable items, so that one definition serves token ids and
words. NaN where the sequence is too short for the measure.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence

WINDOW = 50
WORD = re.compile(r"\w+")


def words(text: str) -> list[str]:
    """The words of a text, in lower case: runs of letters, digits and underscores."""
    return WORD.findall(text.lower())


def type_token_ratio(items: Sequence[Hashable]) -> float:
    """Distinct items / items (TTR), in (0, 1]; 1 repeats nothing. It falls with length."""
    return len(set(items)) / len(items) if len(items) else math.nan


def windowed_type_token_ratio(items: Sequence[Hashable], window: int = WINDOW) -> float:
    """Mean TTR over all windows of `window` items: it does not fall with length.

    A sequence shorter than the window is one window of its own.
    """
    if len(items) <= window:
        return type_token_ratio(items)
    starts = range(len(items) - window + 1)
    return sum(type_token_ratio(items[i : i + window]) for i in starts) / len(starts)


def repetition(items: Sequence[Hashable], n: int) -> float:
    """1 - distinct n-grams / n-grams ("rep-n"), in [0, 1).

    arXiv 2605.22579 names bigram and trigram repetition without a formula; this is the usual one
    (seq-rep-n of Welleck et al. 2019, arXiv 1908.04319).
    """
    return 1 - distinct([items], n)


def distinct(texts: Sequence[Sequence[Hashable]], n: int) -> float:
    """Distinct n-grams / n-grams over several texts together ("distinct-n", arXiv 1510.03055).

    No n-gram reaches from one text into the next.
    """
    grams = [tuple(text[i : i + n]) for text in texts for i in range(len(text) - n + 1)]
    return len(set(grams)) / len(grams) if grams else math.nan


def distinct_by_text(texts: Sequence[Sequence[Hashable]], n: int) -> list[float]:
    """A number per text whose mean is `distinct(texts, n)`, for intervals over texts.

    distinct-n is of all texts together, so no text has one of its own. By the jackknife (Efron
    1982) each stands for how much the whole depends on it: the whole, plus (texts - 1) times what
    leaving the text out lowers it by more than leaving out any text does on average. The standard
    error of their mean is the jackknife's. NaN everywhere where a text alone has all n-grams.
    """
    grams = [[tuple(text[i : i + n]) for i in range(len(text) - n + 1)] for text in texts]
    holders = Counter(gram for found in grams for gram in set(found))
    total = sum(map(len, grams))
    if total == 0 or any(len(found) == total for found in grams):
        return [math.nan] * len(texts)
    without = []
    for found in grams:
        only_here = sum(holders[gram] == 1 for gram in set(found))
        without.append((len(holders) - only_here) / (total - len(found)))
    whole, usual = len(holders) / total, sum(without) / len(without)
    return [whole + (len(texts) - 1) * (usual - one) for one in without]


def longest_loop(items: Sequence[Hashable]) -> int:
    """Length of the longest stretch that only repeats itself: two full periods at least, or 0.

    A stretch has period p if every item equals the one p places before it. Found for every p from
    one comparison of the sequence with itself, shifted: O(n²) in all.
    """
    longest = 0
    for period in range(1, len(items) // 2 + 1):
        run = 0
        for i in range(period, len(items)):
            run = run + 1 if items[i] == items[i - period] else 0
            if run >= period:  # with the first period, that makes two
                longest = max(longest, run + period)
    return longest


def ends_in_loop(items: Sequence[Hashable], periods: int = 3) -> bool:
    """Whether the sequence ends in the same stretch, `periods` times or more in a row."""
    n = len(items)
    return any(
        all(items[n - 1 - i] == items[n - 1 - i - period] for i in range(period * (periods - 1)))
        for period in range(1, n // periods + 1)
    )


def _loop_share(items: Sequence[Hashable]) -> float:
    return longest_loop(items) / len(items) if len(items) else math.nan


MEASURES: Mapping[str, Callable[[Sequence[Hashable]], float]] = {
    "ttr": type_token_ratio,
    "windowed_ttr": windowed_type_token_ratio,
    "rep_2": lambda items: repetition(items, 2),
    "rep_3": lambda items: repetition(items, 3),
    "loop": _loop_share,
}
"""What is measured of one continuation; `loop` is the share of it that the longest loop takes."""


def is_ttr_again(metric: str, *sides: Mapping[str, Sequence[float]]) -> bool:
    """Whether windows hold whole texts, so that their measure is TTR by another name.

    Args:
        metric: one of `MEASURES`.
        sides: for each side of a comparison, metric to a value per text.
    """
    return metric == "windowed_ttr" and all(
        all(x == y or math.isnan(x) for x, y in zip(one[metric], one["ttr"], strict=True))
        for one in sides
    )
