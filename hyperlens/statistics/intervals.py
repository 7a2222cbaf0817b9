"""95% confidence intervals over whole sequences: tokens of one sequence are not independent.

Means are ratios of per-sequence sums, so their intervals need only the sums' second moments. Those
of participation ratios are in `hyperlens.statistics.ratios`.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from scipy.special import stdtrit
from torch import Tensor

CONFIDENCE = 0.95


def t_factor(degrees: float) -> float:
    """Student's t quantile for a 95% interval; NaN below one degree of freedom.

    >>> round(t_factor(10.0), 3)
    2.228
    """
    return float(stdtrit(degrees, 0.5 + CONFIDENCE / 2)) if degrees >= 1 else math.nan


def satterthwaite(parts: Float[Tensor, " part"]) -> float:
    """Degrees of freedom of a variance that is a sum of such parts (Satterthwaite 1946).

    A sum of squares s has 2 E(Σs)² / var(Σs) degrees of freedom, with var(Σs) ≈ k var(s): few where
    few parts contribute most of it. Infinitely many where all parts are even.
    """
    spread = len(parts) * float(parts.var())
    return 2 * float(parts.sum()) ** 2 / spread if spread else math.inf


def mean_half_width(
    n_sequences: float,
    value: Float[Tensor, "*sets"],
    tokens: Float[Tensor, "*#sets"],
    sum_yy: Float[Tensor, "*#sets"],
    sum_yn: Float[Tensor, "*#sets"],
    sum_nn: Float[Tensor, "*#sets"],
) -> Float[Tensor, "*sets"]:
    """Half width of the 95% interval of `value` = Σy / Σn, y and n being per-sequence sums.

    Tokens of one sequence are not independent, sequences are: the variance is the linearised
    (cluster-robust) one of a ratio, Σ(y - value·n)² / (Σn)², multiplied out so that second moments
    suffice, with Student's t on the number of sequences less one.

    Args:
        n_sequences: independent sequences; below two there is no interval (NaN).
        value, tokens: the ratio and its denominator Σn.
        sum_yy, sum_yn, sum_nn: Σy², Σyn, Σn² over sequences.
    """
    if n_sequences < 2:
        return torch.full_like(value, torch.nan)
    residual = (sum_yy - 2 * value * sum_yn + value**2 * sum_nn).clamp_min(0.0)
    # Multiplied out, the squares of a constant cancel but for rounding. Without this floor its
    # interval would be as wide as the square root of the float64 epsilon.
    residual = torch.where(residual > 1e-13 * sum_yy, residual, 0.0)
    spread = torch.sqrt(residual * n_sequences / (n_sequences - 1)) / tokens
    return t_factor(n_sequences - 1) * spread


def quantile_interval(
    counts: Float[Tensor, " values"], half_width: float, probability: float = 0.5
) -> tuple[float, float, float]:
    """(quantile, low, high) of one-based integer values from their counts.

    `half_width` is that of the *share* of tokens at or below the quantile; the ends of that
    interval are mapped back to values through the distribution (Woodruff 1952). Between two values
    the quantile is interpolated as numpy does: the median of an even count is the mean of the
    middle two.

    >>> quantile_interval(torch.tensor([2.0, 1.0, 1.0]), 0.25)
    (1.5, 1.0, 2.0)
    """
    cumulative = counts.cumsum(0)
    total = float(cumulative[-1])  # counts that stand for several tokens each are no whole numbers
    if total == 0:
        return (math.nan,) * 3

    def value_at(order: float) -> float:
        target = torch.tensor(min(max(order, 1.0), total), dtype=cumulative.dtype)
        return float(torch.searchsorted(cumulative, target.to(cumulative.device))) + 1

    position = probability * (total - 1) + 1
    low_index, high_index = float(int(position)), float(-(-position // 1))
    fraction = position - low_index
    value = value_at(low_index) * (1 - fraction) + value_at(high_index) * fraction
    if math.isnan(half_width):
        return value, math.nan, math.nan
    low = value_at((probability - half_width) * total)
    high = value_at((probability + half_width) * total)
    return value, min(low, value), max(high, value)
