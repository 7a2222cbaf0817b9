"""Means with intervals over independent units, paired and Welch tests, shares, Holm's correction.

The units are prompts or whole sequences: tokens of one sequence are not independent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

CONFIDENCE = 0.95


class Estimate(NamedTuple):
    """A mean over units.

    Attributes:
        value: the mean.
        low, high: its 95% interval (Student's t); NaN below two units.
        se: its standard error; NaN below two units.
        n: how many units.
    """

    value: float
    low: float
    high: float
    se: float
    n: int


def estimate(values: Sequence[float]) -> Estimate:
    """The mean over units with its 95% t interval; units that are NaN are left out."""
    kept = np.asarray(values, dtype=np.float64)
    kept = kept[~np.isnan(kept)]
    n = len(kept)
    if n == 0:
        return Estimate(math.nan, math.nan, math.nan, math.nan, 0)
    mean = float(kept.mean())
    if n == 1:
        return Estimate(mean, math.nan, math.nan, math.nan, 1)
    se = float(kept.std(ddof=1) / math.sqrt(n))
    half = float(stats.t.ppf(0.5 + CONFIDENCE / 2, n - 1)) * se
    return Estimate(mean, mean - half, mean + half, se, n)


def difference(tuned: Sequence[float], base: Sequence[float]) -> Estimate:
    """The mean of tuned - base, paired by unit."""
    pairs = zip(tuned, base, strict=True)
    return estimate([after - before for after, before in pairs])


def paired_p(a: Sequence[float], b: Sequence[float]) -> float:
    """Two-sided p of the paired t test; 1 where every pair is equal, NaN below two pairs."""
    gaps = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    gaps = gaps[~np.isnan(gaps)]
    if len(gaps) < 2:
        return math.nan
    if not gaps.std():
        # The test statistic is 0/0 or infinite.
        return 1.0 if gaps[0] == 0 else 0.0
    return float(stats.ttest_1samp(gaps, 0.0).pvalue)


def welch_p(a: Sequence[float], b: Sequence[float]) -> float:
    """Two-sided p of Welch's test, for units that are not pairs; NaN below two on a side."""
    first, second = (np.asarray(x, dtype=np.float64) for x in (a, b))
    first, second = first[~np.isnan(first)], second[~np.isnan(second)]
    if min(len(first), len(second)) < 2:
        return math.nan
    if not first.std() and not second.std():
        return 1.0 if first[0] == second[0] else 0.0
    return float(stats.ttest_ind(first, second, equal_var=False).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction; NaN stays NaN and does not count as a test."""
    order = sorted((p, i) for i, p in enumerate(p_values) if not math.isnan(p))
    corrected = [math.nan] * len(p_values)
    largest = 0.0
    for rank, (p, i) in enumerate(order):
        largest = max(largest, min(1.0, p * (len(order) - rank)))
        corrected[i] = largest
    return corrected


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """Wilson's 95% interval of a share; NaN without trials."""
    if trials == 0:
        return math.nan, math.nan
    interval = stats.binomtest(successes, trials).proportion_ci(CONFIDENCE, method="wilson")
    return float(interval.low), float(interval.high)


def binomial_p(successes: int, trials: int) -> float:
    """Two-sided p of the exact binomial test against one half; NaN without trials."""
    if trials == 0:
        return math.nan
    return float(stats.binomtest(successes, trials).pvalue)
