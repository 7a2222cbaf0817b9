"""95% confidence intervals over whole sequences: tokens of one sequence are not independent.

Means are ratios of per-sequence sums, so their intervals need only the sums' second moments.
The participation ratio's interval comes from a fixed sample of tokens: see `ratio_influence`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from einops import einsum
from jaxtyping import Bool, Float
from scipy.stats import t as student_t
from torch import Tensor

from .moments import Moments, TraceEstimates, corrected_traces

CONFIDENCE = 0.95


def t_factor(degrees: float) -> float:
    """Student's t quantile for a 95% interval; NaN below one degree of freedom.

    >>> round(t_factor(10.0), 3)
    2.228
    """
    return float(student_t.ppf(0.5 + CONFIDENCE / 2, degrees)) if degrees >= 1 else math.nan


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


@dataclass(frozen=True)
class SampledTokens:
    """The kept tokens of one (layer, view, model).

    Attributes:
        vectors: the tokens, sequence by sequence, about the same origin as the moments.
        valid: False for unused places.
        length: how many counted tokens each sequence has in all.
        sum_nn: Σ length² over *all* sequences of the corpus, sampled or not.
    """

    vectors: Float[Tensor, "sequence token d"]
    valid: Bool[Tensor, "sequence token"]
    length: Float[Tensor, " sequence"]
    sum_nn: float


@dataclass(frozen=True)
class RatioInfluence:
    """How each sampled token moves a participation ratio, and where the ratio really lies.

    Attributes:
        centre: the participation ratio estimated from pairs of tokens of different sequences.
        influence: change of that estimate per unit of weight put on each sampled token.
    """

    centre: float
    influence: Float[Tensor, "sequence token"]


def ratio_influence(m: Moments, sample: SampledTokens) -> RatioInfluence:
    """Linearise the participation ratio in its tokens, allowing for clustered tokens.

    Two tokens of one sequence resemble each other, so estimators that treat all pairs alike
    (the row estimator included) find too few dimensions. Same-sequence pairs are a known share
    of all pairs and their mean can be estimated from the sample, so they can be subtracted; the
    rest averages over pairs of different sequences and is unbiased whatever the clustering.
    """
    n, mean = m.n, m.total / m.n
    covariance = m.outer / n - torch.outer(mean, mean)
    x = (sample.vectors - mean) * sample.valid[..., None]
    norm = x.square().sum(-1)
    through = (einsum(x, covariance, "s t i, i j -> s t j") * x).sum(-1)
    # Squared products of the sampled pairs of one sequence: what is subtracted below.
    gram = einsum(x, x, "s t i, s u i -> s t u").square()
    n_sampled = sample.valid.sum(-1, keepdim=True)
    same_pairs = (gram.sum(-1) - norm.square()) / (n_sampled - 1).clamp_min(1) * sample.valid

    length = sample.length[:, None]
    # The share of ordered pairs of different tokens that lie in one sequence, over all sequences.
    same = (sample.sum_nn - n) / (n * (n - 1))
    weight = (sample.length * (sample.length - 1)) * (n_sampled.squeeze(-1) > 1)
    share = weight / weight.sum().clamp_min(1.0)
    others = (n_sampled * (n_sampled - 1)).clamp_min(1)
    same_norms = (norm.sum(-1) ** 2 - norm.square().sum(-1)) / others.squeeze(-1)
    same_products = same_pairs.sum(-1) / n_sampled.squeeze(-1).clamp_min(1)

    # A mean over all pairs is (1 - same)·(other pairs) + same·(same-sequence pairs): solve for
    # the other pairs.
    row = corrected_traces(m)
    cross = TraceEstimates(
        (row.trace_squared - same * (share * same_norms).sum()) / (1 - same),
        (row.square_trace - same * (share * same_products).sum()) / (1 - same),
    )
    across = (n * through - norm.square() - (length - 1) * same_pairs) / (n - length)
    # ratio = T² / Q with T a mean over tokens and Q one over pairs, so to first order
    # d ratio / ratio = 2 dT/T - dQ/Q, and dQ counts each pair from both of its ends.
    centred = norm / _mean(norm, sample) - across / _mean(across, sample)
    centre = float(cross.ratio)
    return RatioInfluence(centre, 2 * centre * centred * sample.valid)


def _mean(values: Float[Tensor, "sequence token"], sample: SampledTokens) -> Float[Tensor, ""]:
    """Mean over the corpus's tokens, each sampled sequence standing for its full length."""
    per_sequence = (values * sample.valid).sum(-1) / sample.valid.sum(-1).clamp_min(1)
    weight = sample.length * sample.valid.any(-1)
    return (per_sequence * weight).sum() / weight.sum()


def influence_half_width(
    influence: Float[Tensor, "sequence token"], n: float, sample: SampledTokens
) -> float:
    """Half width of the 95% interval of an estimate with the given token influences.

    The variance of a mean of clustered tokens has two parts, the variance of a token and the
    mean covariance of two tokens of a sequence; both are estimated from the sample and scaled
    to the corpus's own sequence lengths.
    """
    n_sampled = sample.valid.sum(-1)
    n_used = float((n_sampled > 0).sum())
    if n_used < 2:
        return math.nan
    squares = influence.square().sum(-1)
    products = (influence.sum(-1) ** 2 - squares) / (n_sampled * (n_sampled - 1)).clamp_min(1)
    squares = squares / n_sampled.clamp_min(1)
    pairs = sample.length * (sample.length - 1) * (n_sampled > 1)
    covariance = float((products * pairs).sum() / pairs.sum().clamp_min(1.0))
    token_variance = float(_mean(influence.square(), sample))
    variance = (n * token_variance + (sample.sum_nn - n) * max(covariance, 0.0)) / n**2
    # A variance to which few sequences contribute most is itself uncertain: Satterthwaite's (1946)
    # degrees of freedom, 2·mean² / variance of the contributions, at most those of all sequences.
    parts = (sample.length * squares + pairs * products)[n_sampled > 0]
    degrees = 2 * parts.sum() ** 2 / (n_used * parts.var()).clamp_min(1e-300)
    factor = t_factor(min(max(float(degrees), 2.0), n_used - 1))
    # S / (S - 1) as in the jackknife: each sequence also pulls the mean it is compared with.
    return factor * math.sqrt(max(variance, 0.0)) * n_used / (n_used - 1)


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
    total = float(counts.sum())
    if total == 0:
        return (math.nan,) * 3
    cumulative = counts.cumsum(0)

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
