"""How much a text repeats itself: pure functions of one sequence of tokens, or of words.

Every measure takes any sequence of hashable items, so that one definition serves token ids and
words. NaN where the sequence is too short for the measure.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence

REPETITION_METRICS = ("ttr", "rep_2", "rep_3")
"""Measured of every generated text: TTR, and the shares of repeated bigrams and trigrams."""
WINDOW = 50
WORD = re.compile(r"\w+")


def words(text: str) -> list[str]:
    """The words of a text, in lower case: runs of letters, digits and underscores.

    >>> words("The fox's den")
    ['the', 'fox', 's', 'den']
    """
    return WORD.findall(text.lower())


def type_token_ratio(items: Sequence[Hashable]) -> float:
    """Distinct items / items (TTR), in (0, 1]; 1 where nothing repeats. It falls with length.

    >>> type_token_ratio("abab")
    0.5
    """
    return len(set(items)) / len(items) if len(items) else math.nan


def windowed_type_token_ratio(items: Sequence[Hashable], window: int = WINDOW) -> float:
    """Mean TTR over all windows of `window` items: it does not fall with length.

    A sequence shorter than the window counts as one window.

    >>> windowed_type_token_ratio("aab", window=2)
    0.75
    """
    if len(items) <= window:
        return type_token_ratio(items)
    starts = range(len(items) - window + 1)
    return sum(type_token_ratio(items[i : i + window]) for i in starts) / len(starts)


def repetition(items: Sequence[Hashable], n: int) -> float:
    """1 - distinct n-grams / n-grams ("rep-n"), in [0, 1).

    arXiv 2605.22579 names bigram and trigram repetition without a formula; this is the usual one
    (seq-rep-n of Welleck et al. 2019, arXiv 1908.04319).

    >>> repetition("ababab", 2)
    0.6
    """
    return 1 - distinct([items], n)


def distinct(texts: Sequence[Sequence[Hashable]], n: int) -> float:
    """Distinct n-grams / n-grams over several texts together ("distinct-n", arXiv 1510.03055).

    No n-gram reaches from one text into the next.

    >>> distinct(["ab", "ab"], 2)
    0.5
    """
    grams = [tuple(text[i : i + n]) for text in texts for i in range(len(text) - n + 1)]
    return len(set(grams)) / len(grams) if grams else math.nan


def distinct_by_text(texts: Sequence[Sequence[Hashable]], n: int) -> list[float]:
    """A number per text whose mean is `distinct(texts, n)`, for intervals over texts.

    distinct-n is defined for all texts together, so a single text has none. These are jackknife
    pseudo-values (Efron 1982): the value of all texts, plus (texts - 1) times how much more
    leaving this text out lowers it than leaving out a text does on average. The standard error of
    their mean is the jackknife's. All NaN where one text holds all n-grams.
    """
    grams = [[tuple(text[i : i + n]) for i in range(len(text) - n + 1)] for text in texts]
    holders = Counter(gram for own_grams in grams for gram in set(own_grams))
    total = sum(map(len, grams))
    if total == 0 or any(len(own_grams) == total for own_grams in grams):
        return [math.nan] * len(texts)
    without = []
    for own_grams in grams:
        only_here = sum(holders[gram] == 1 for gram in set(own_grams))
        without.append((len(holders) - only_here) / (total - len(own_grams)))
    of_all, mean_without = len(holders) / total, sum(without) / len(without)
    return [of_all + (len(texts) - 1) * (mean_without - value) for value in without]


def longest_loop(items: Sequence[Hashable]) -> int:
    """Length of the longest stretch that only repeats itself: two full periods at least, or 0.

    A stretch has period p if every item equals the one p places before it. For every p, one
    comparison of the sequence with itself, shifted by p: O(n²) in all.

    >>> longest_loop("xabcabcab")
    8
    """
    longest = 0
    for period in range(1, len(items) // 2 + 1):
        run = 0
        for i in range(period, len(items)):
            run = run + 1 if items[i] == items[i - period] else 0
            if run >= period:  # with the first period, that makes two
                longest = max(longest, run + period)
    return longest


def _loop_share(items: Sequence[Hashable]) -> float:
    return longest_loop(items) / len(items) if len(items) else math.nan


MEASURES: Mapping[str, Callable[[Sequence[Hashable]], float]] = {
    "ttr": type_token_ratio,
    "windowed_ttr": windowed_type_token_ratio,
    "rep_2": lambda items: repetition(items, 2),
    "rep_3": lambda items: repetition(items, 3),
    "loop": _loop_share,
}
"""What is measured of one continuation; `loop` is the longest loop's share of its length."""


def is_ttr_again(metric: str, *sides: Mapping[str, Sequence[float]]) -> bool:
    """Whether every window is a whole text, so that the windowed TTR is just the TTR.

    Args:
        metric: one of `MEASURES`.
        sides: for each side of a comparison, metric to a value per text.
    """
    return metric == "windowed_ttr" and all(
        all(x == y or math.isnan(x) for x, y in zip(side[metric], side["ttr"], strict=True))
        for side in sides
    )
