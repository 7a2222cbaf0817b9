"""Means with intervals over independent units, tests, trends, shares, Holm's correction.

The units are prompts or whole sequences: tokens of one sequence are not independent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
# Numbers that differ by less than this share of their size are the same but for rounding.
ROUNDING = 1e-12
# All orders of up to so many settings are tried: 8! = 40,320.
MOST_EXACT = 8
# All swaps of the labels of up to so many pairs are tried, and else so many drawn at random.
MOST_SWAPPED, DRAWN_SWAPS = 12, 9_999


class Estimate(NamedTuple):
    """A mean over units.

    Attributes:
        value: the mean.
        low, high: its 95% interval (Student's t); NaN below two units, and where all are equal.
        se: its standard error; NaN below two units.
        n: how many units.
    """

    value: float
    low: float
    high: float
    se: float
    n: int


def estimate(values: Sequence[float]) -> Estimate:
    """The mean over units with its 95% t interval; units that are NaN are left out.

    Where all units are equal there is no spread to make an interval of, and none is given: two
    equal units are not certainty.

    >>> found = estimate([1.0, 2.0, 3.0])
    >>> found.value, round(found.low, 3), round(found.high, 3), found.n
    (2.0, -0.484, 4.484, 3)
    """
    units = np.asarray(values, dtype=np.float64)
    units = units[~np.isnan(units)]
    n = len(units)
    if n == 0:
        return Estimate(math.nan, math.nan, math.nan, math.nan, 0)
    mean = float(units.mean())
    if n == 1:
        return Estimate(mean, math.nan, math.nan, math.nan, 1)
    if np.ptp(units) <= _rounding(units):
        return Estimate(mean, math.nan, math.nan, 0.0, n)
    se = float(units.std(ddof=1) / math.sqrt(n))
    half = float(stats.t.ppf(0.5 + CONFIDENCE / 2, n - 1)) * se
    return Estimate(mean, mean - half, mean + half, se, n)


def difference(tuned: Sequence[float], base: Sequence[float]) -> Estimate:
    """The mean of tuned - base, paired by unit; exactly 0 with its ends where the two are equal.

    >>> difference([2.0, 5.0], [1.0, 3.0]).value
    1.5
    """
    pairs = zip(tuned, base, strict=True)
    found = estimate([after - before for after, before in pairs])
    return found._replace(low=0.0, high=0.0) if found.value == found.se == 0 else found


def paired_p(a: Sequence[float], b: Sequence[float]) -> float:
    """Two-sided p of the paired t test; pairs with a NaN are left out.

    NaN below two pairs, and where all pairs are equal but for rounding: there is nothing to test
    then, and such a test does not count in Holm's correction. Where all n differences are the same
    there is no spread to divide by, and a t test would say p = 0 even for two pairs: p is then the
    sign test's, 2^(1 - n), which is 0.5 for two pairs and 2e-9 for thirty.

    >>> round(paired_p([2.0, 3.0, 5.0], [1.0, 1.0, 2.0]), 3)
    0.074
    >>> paired_p([2.0, 3.0], [1.0, 2.0])
    0.5
    """
    first, second = (np.asarray(x, dtype=np.float64) for x in (a, b))
    both = ~np.isnan(first - second)
    first, second = first[both], second[both]
    if len(first) < 2:
        return math.nan
    gaps = first - second
    rounding = _rounding(first, second)
    if np.abs(gaps).max() <= rounding:
        return math.nan
    if np.ptp(gaps) <= rounding:
        return float(2.0 ** (1 - len(gaps)))
    return float(stats.ttest_1samp(gaps, 0.0).pvalue)


def sign_flip_p(gaps: Sequence[float], seed: int = 0) -> float:
    """Two-sided p that paired gaps are as likely to be of either sign: labels of pairs swapped.

    All swaps of up to 12 pairs; of more, 9,999 drawn at random beside the labels as they are. NaN
    where no gap differs from 0.

    >>> sign_flip_p([1.0, 2.0, 3.0])  # two of eight ways to give signs are as extreme
    0.25
    """
    units = np.asarray(gaps, dtype=np.float64)
    if not len(units) or np.abs(units).max() == 0:
        return math.nan
    if len(units) <= MOST_SWAPPED:
        numbers = np.arange(2 ** len(units))
        signs = 1 - 2 * (numbers[:, None] >> np.arange(len(units)) & 1)
    else:
        drawn = np.random.default_rng(seed).integers(0, 2, (DRAWN_SWAPS, len(units)))
        signs = np.vstack([np.ones_like(units), 1 - 2 * drawn])
    sums = np.abs(signs @ units)
    # The labels as they are come first; equal but for rounding counts as extreme as they.
    return float((sums >= sums[0] * (1 - 1e-9)).mean())


def welch_p(a: Sequence[float], b: Sequence[float]) -> float:
    """Two-sided p of Welch's test, for units that are not pairs; NaNs are left out.

    NaN below two units on a side, and where all units of both sides are equal but for rounding.
    Where neither side varies but the two differ, there is no spread to divide by: p is then the
    exact permutation p-value.

    >>> welch_p([1.0, 1.0], [2.0, 2.0]) == 2 / 6
    True
    """
    first, second = (np.asarray(x, dtype=np.float64) for x in (a, b))
    first, second = first[~np.isnan(first)], second[~np.isnan(second)]
    if min(len(first), len(second)) < 2:
        return math.nan
    rounding = _rounding(first, second)
    if np.ptp(np.concatenate([first, second])) <= rounding:
        return math.nan
    if max(np.ptp(first), np.ptp(second)) <= rounding:
        # Of all C(n + m, n) ways to split the units, this one is the most extreme; with equal
        # sizes so is the one with the sides exchanged.
        n, m = len(first), len(second)
        return (1 + (n == m)) / math.comb(n + m, n)
    # From means and deviations: scipy's other function warns where one side does not vary.
    moments = (x for side in (first, second) for x in (side.mean(), side.std(ddof=1), len(side)))
    return float(stats.ttest_ind_from_stats(*moments, equal_var=False).pvalue)


def _rounding(*sides: np.ndarray) -> float:
    return ROUNDING * float(max(np.abs(side).max() for side in sides))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction; NaN stays NaN and does not count as a test.

    >>> holm([0.01, 0.04, math.nan])
    [0.02, 0.04, nan]
    """
    order = sorted((p, i) for i, p in enumerate(p_values) if not math.isnan(p))
    corrected = [math.nan] * len(p_values)
    largest = 0.0
    for rank, (p, i) in enumerate(order):
        # Never below the corrected p of a smaller one, so that the order of tests stays.
        largest = max(largest, min(1.0, p * (len(order) - rank)))
        corrected[i] = largest
    return corrected


def holm_rows(
    rows: Sequence[Mapping[str, Any]], p: str = "p", to: str = "p"
) -> list[dict[str, Any]]:
    """The same rows with the p values of column `p`, corrected over all rows, in column `to`.

    >>> holm_rows([{"p": 0.01}, {"p": 0.04}])
    [{'p': 0.02}, {'p': 0.04}]
    """
    corrected = holm([row[p] for row in rows])
    return [{**row, to: value} for row, value in zip(rows, corrected, strict=True)]


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """Wilson's 95% interval of a share; NaN without trials. It never leaves 0 to 1.

    >>> [round(end, 3) for end in wilson(5, 10)]
    [0.237, 0.763]
    """
    return _share_interval(successes, trials, "wilson")


def clopper_pearson(successes: int, trials: int) -> tuple[float, float]:
    """The exact 95% interval of a share; NaN without trials. Never too narrow, wide where few.

    >>> [round(end, 3) for end in clopper_pearson(0, 20)]
    [0.0, 0.168]
    """
    return _share_interval(successes, trials, "exact")


def _share_interval(successes: int, trials: int, method: str) -> tuple[float, float]:
    if trials == 0:
        return math.nan, math.nan
    interval = stats.binomtest(successes, trials).proportion_ci(CONFIDENCE, method=method)
    return float(interval.low), float(interval.high)


def binomial_p(successes: int, trials: int) -> float:
    """Two-sided p of the exact binomial test against one half; NaN without trials.

    >>> binomial_p(0, 5)
    0.0625
    """
    if trials == 0:
        return math.nan
    return float(stats.binomtest(successes, trials).pvalue)


def trend(settings: Sequence[float], columns: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Spearman's ρ between a setting and a quantity measured on the same units at each value.

    Args:
        settings: the values of the setting, all different.
        columns: for each setting, one value per unit (prompt).

    Returns:
        `rho` of the means over units, as papers report it, NaN where they do not vary; `p`, which
        is scipy's, from the t distribution, and too small for few settings; `p_exact`, the exact
        permutation p-value, NaN for more than 8 settings; and `per_unit`, the mean over units of
        each unit's own ρ, with its 95% interval, without units that do not vary.
    """
    means = [float(np.mean(column)) for column in columns]
    rho, p = rho_and_p(settings, means)
    rhos = [rho_and_p(settings, unit)[0] for unit in zip(*columns, strict=True)]
    return {
        "rho": rho,
        "p": p,
        "p_exact": exact_p(settings, means),
        "per_unit": estimate(rhos)._asdict(),
    }


def rho_and_p(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Spearman's ρ and scipy's two-sided p; NaN where either does not vary.

    >>> rho, p = rho_and_p([1.0, 2.0, 3.0], [9.0, 8.0, 7.0])
    >>> round(rho, 3)
    -1.0
    """
    if len(set(x)) < 2 or len(set(y)) < 2:
        return math.nan, math.nan
    test = stats.spearmanr(x, y)
    return float(test.statistic), float(test.pvalue)


def exact_p(x: Sequence[float], y: Sequence[float]) -> float:
    """Exact two-sided permutation p-value of Spearman's ρ; NaN where either does not vary.

    >>> round(exact_p([1.0, 2.0, 3.0, 4.0], [2.0, 4.0, 6.0, 9.0]), 4)
    0.0833
    """
    if len(set(x)) < 2 or len(set(y)) < 2 or len(x) > MOST_EXACT:
        return math.nan
    # Centred ranks: ρ is proportional to their product, which is all that a permutation changes.
    ranks = stats.rankdata(y) - (len(y) + 1) / 2

    def statistic(ranks_of_x: np.ndarray, axis: int = -1) -> Any:
        return np.abs((ranks_of_x * ranks).sum(axis=axis))

    test = stats.permutation_test(
        (stats.rankdata(x) - (len(x) + 1) / 2,),
        statistic,
        permutation_type="pairings",
        alternative="greater",
        n_resamples=math.inf,
        vectorized=True,
    )
    return float(test.pvalue)
