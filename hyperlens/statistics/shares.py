"""Ratios of sums over texts, with intervals that hold for few texts of unequal length.

A share of decisions is Σy / Σn over texts, and texts, not decisions, are independent. Three things
would make an interval too narrow, and each has its remedy here. A long text pulls the ratio towards
itself: the spread is that of leaving each text out (the jackknife). A few long texts carry most of
the weight, or a few texts most of the spread: Student's t has fewer degrees of freedom (Kish 1965,
Satterthwaite 1946). The error of a share near 0 or 1 is skewed: its interval is made on the scale
of log odds. And where all texts agree there is no spread to see, which is not the same as
certainty: the interval then says how many texts could still be otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from jaxtyping import Float
from scipy.special import expit, logit, stdtridf, stdtrit
from scipy.stats import t as student_t
from torch import Tensor

from .intervals import satterthwaite
from .significance import CONFIDENCE, Estimate, holm

NOTHING = Estimate(math.nan, math.nan, math.nan, math.nan, 0)
"""The estimate from no text."""


def ratio(
    y: Float[Tensor, " text"],
    n: Float[Tensor, " text"],
    *,
    within: tuple[float, float] | None = None,
) -> Estimate:
    """Σy / Σn with its 95% interval over texts; `n` of the estimate counts texts.

    Texts without any counted decision are left out. Where every text says the same, the interval
    is as wide as the share of texts that could still say something else (see `all_alike`); without
    bounds that share tells nothing, and there is no interval (NaN) unless the value is 0.

    In simulations with clustered decisions of 20 to 60 texts of unequal length, the intervals of
    shares and of paired differences cover the truth in 93 to 97% of trials. Coverage is lower,
    down to 91%, for differences of rare decisions that are strongly correlated within a text.

    Args:
        y: per text, a sum over decisions.
        n: per text, how many decisions there are.
        within: the smallest and largest value that one decision can have: (0.0, 1.0) for a share,
            whose interval stays between them; (-1.0, 1.0) for a difference of two shares.

    >>> share = ratio(torch.tensor([1.0, 3.0]), torch.tensor([4.0, 4.0]), within=(0.0, 1.0))
    >>> share.value, share.n
    (0.5, 2)
    >>> all_of_two = ratio(torch.tensor([1.0, 1.0]), torch.tensor([1.0, 1.0]), within=(0.0, 1.0))
    >>> round(all_of_two.low, 3), all_of_two.high
    (0.224, 1.0)
    """
    y, n = y[n > 0].double(), n[n > 0].double()
    k = len(n)
    if not k:
        return NOTHING
    value = float(y.sum() / n.sum())
    if k == 1:
        return Estimate(value, math.nan, math.nan, math.nan, 1)
    # The jackknife: without text i the ratio is lower by exactly (y_i - value n_i) / (Σn - n_i).
    influence = (y - value * n) / (n.sum() - n)
    # Values of the size of rounding errors are not spread.
    influence = torch.where((influence * n.sum()).abs() > 1e-12 * y.abs().max(), influence, 0.0)
    se = math.sqrt((k - 1) / k * float(influence.square().sum()))
    weight = n / n.sum()
    if se == 0:
        return Estimate(value, *all_alike(value, _effective(weight), within), 0.0, k)
    factor = _quantile(CONFIDENCE, _degrees(weight, influence.square()))
    if within == (0.0, 1.0) and 0 < value < 1:
        # Delta method: the standard error of log odds is that of the share over p (1 - p).
        step = factor * se / (value * (1 - value))
        low, high = (float(expit(logit(value) + sign * step)) for sign in (-1, 1))
        return Estimate(value, low, high, se, k)
    return Estimate(value, value - factor * se, value + factor * se, se, k)


def all_alike(
    value: float, n: float, within: tuple[float, float] | None = None
) -> tuple[float, float]:
    """The 95% interval of a mean of which all n units seen have the same value.

    If a share q of all units were otherwise, none of n would show it with probability (1 - q)ⁿ:
    shares above 1 - 0.05^(1/n) are excluded ("rule of three": about 3 / n). At most so many units
    may lie anywhere within the bounds. Without bounds nothing can be said (NaN); a value of 0 is
    kept as it is, the difference of what is equal.

    >>> [round(end, 3) for end in all_alike(0.0, 40.0, (0.0, 1.0))]
    [0.0, 0.072]
    """
    if within is None:
        return (0.0, 0.0) if value == 0 else (math.nan, math.nan)
    lowest, highest = within
    otherwise = 1 - (1 - CONFIDENCE) ** (1 / n)
    return value - otherwise * (value - lowest), value + otherwise * (highest - value)


def p_value(found: Estimate) -> float:
    """Two-sided p that the estimated quantity is 0: below 0.05 where its interval excludes 0.

    Where all n units have the same value there is no spread to divide by: p is the sign test's,
    2^(1 - n), and 1 for a value of 0.
    """
    if not math.isfinite(found.se):
        return math.nan
    if found.se == 0:
        return 1.0 if found.value == 0 else float(2.0 ** (1 - found.n))
    return float(2 * student_t.sf(abs(found.value) / found.se, _degrees_of(found)))


def holm_p_values(found: Iterable[Estimate]) -> list[float]:
    """p of each estimate that it is 0, corrected over all of them (Holm)."""
    return holm([p_value(estimate) for estimate in found])


def widened(found: Estimate, tests: int, within: tuple[float, float] | None = None) -> Estimate:
    """The interval for one of several tests that hold together at 95% (Bonferroni).

    Args:
        found: one of them.
        tests: how many.
        within: as it was given to `ratio`.
    """
    if tests == 1 or not found.se >= 0:
        return found
    error = 1 - CONFIDENCE
    if found.se == 0:
        if within is None:
            return found
        # 1 - q = 0.05^(1/n): the same n with an error of 0.05 / tests.
        otherwise = (found.high - found.low) / (within[1] - within[0])
        otherwise = 1 - (1 - otherwise) ** (math.log(error / tests) / math.log(error))
        low, high = (found.value + otherwise * (end - found.value) for end in within)
        return found._replace(low=low, high=high)
    half = _quantile(1 - error / tests, _degrees_of(found)) * found.se
    return found._replace(low=found.value - half, high=found.value + half)


def _degrees(weight: Float[Tensor, " text"], spread: Float[Tensor, " text"]) -> float:
    """Effective degrees of freedom: the smaller of Kish's (weights) and Satterthwaite's (spread).

    Kish (1965): texts of weights w count for 1 / Σw² texts of equal weight.
    """
    found = min(_effective(weight) - 1, satterthwaite(spread))
    return min(max(found, 1.0), len(weight) - 1)


def _effective(weight: Float[Tensor, " text"]) -> float:
    """For how many texts of equal weight these count (Kish 1965)."""
    return 1 / float(weight.square().sum())


def _degrees_of(found: Estimate) -> float:
    """The degrees of freedom that an interval was made with.

    Read back from its half-width, t × se. An interval made on the scale of log odds is not
    symmetric and does not tell: the usual n - 1 are taken there.
    """
    half = (found.high - found.low) / 2
    symmetric = abs(found.value - (found.low + found.high) / 2) < 1e-6 * half
    usual = float(found.n - 1)
    if not symmetric:
        return usual
    return min(usual, float(stdtridf(0.5 + CONFIDENCE / 2, half / found.se)))


def _quantile(confidence: float, degrees: float) -> float:
    return float(stdtrit(degrees, 0.5 + confidence / 2))
