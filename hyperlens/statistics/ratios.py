"""Participation ratios over whole texts: estimates without clustering bias, and 95% intervals.

Tokens of one text resemble each other, so the ratio is estimated from pairs of tokens of different
texts. Its error is that of the choice of texts: for few of them it is resampled (BCa bootstrap and
jackknife), for many it is linearised in a fixed sample of tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import einsum
from jaxtyping import Bool, Float
from torch import Tensor

from .intervals import satterthwaite, t_factor
from .moments import Moments, TraceEstimates, corrected_traces
from .significance import Estimate

N_DRAWS = 1000
# Fewer texts than this say too little of the texts that were not seen.
FEWEST_TEXTS = 5
# Numbers that the texts' own second moments may take at a time: 128 MiB as float64.
MOST_MOMENTS = 2**24
# In so many stripes at least, which leave out 3/8 of what is below the diagonal.
STRIPES = 4
# How much of the bootstrap's excess over the jackknife the interval of one ratio takes: of those
# tried, the least that held the truth in more than 93% of draws of 20 and 40 real texts.
BOOTSTRAP_SHARE = 1 / 3


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


def linearised(m: Moments, sample: SampledTokens) -> tuple[float, Float[Tensor, "sequence token"]]:
    """The participation ratio from pairs of different sequences, and what moves it.

    Two tokens of one sequence resemble each other, so estimators that treat all pairs alike
    (the row estimator included) find too few dimensions. Same-sequence pairs are a known share
    of all pairs and their mean can be estimated from the sample, so they can be subtracted; the
    rest averages over pairs of different sequences and is unbiased whatever the clustering.

    Returns:
        The ratio, and its change per unit of weight put on each sampled token.
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
    ratio = float(cross.ratio)
    return ratio, 2 * ratio * centred * sample.valid


def _mean(values: Float[Tensor, "sequence token"], sample: SampledTokens) -> Float[Tensor, ""]:
    """Mean over the corpus's tokens, each sampled sequence standing for its full length."""
    per_sequence = (values * sample.valid).sum(-1) / sample.valid.sum(-1).clamp_min(1)
    weight = sample.length * sample.valid.any(-1)
    return (per_sequence * weight).sum() / weight.sum()


def influence_half_width(
    influence: Float[Tensor, "sequence token"], n: float, sample: SampledTokens
) -> float:
    """Half width of the 95% interval of an estimate with the given token influences.

    For many texts, of which a sample is kept: see `resampled` for few.
    """
    n_used = float(sample.valid.any(-1).sum())
    if n_used < 2:
        return math.nan
    variance, degrees = influence_variance(influence, n, sample)
    return t_factor(min(max(degrees, 2.0), n_used - 1)) * math.sqrt(variance)


def influence_variance(
    influence: Float[Tensor, "sequence token"], n: float, sample: SampledTokens
) -> tuple[float, float]:
    """Variance of an estimate with the given token influences, and its degrees of freedom.

    The variance of a mean of clustered tokens has two parts, the variance of a token and the
    mean covariance of two tokens of a sequence; both are estimated from the sample and scaled
    to the corpus's own sequence lengths.
    """
    n_sampled = sample.valid.sum(-1)
    n_used = float((n_sampled > 0).sum())
    squares = influence.square().sum(-1)
    products = (influence.sum(-1) ** 2 - squares) / (n_sampled * (n_sampled - 1)).clamp_min(1)
    squares = squares / n_sampled.clamp_min(1)
    pairs = sample.length * (sample.length - 1) * (n_sampled > 1)
    covariance = float((products * pairs).sum() / pairs.sum().clamp_min(1.0))
    token_variance = float(_mean(influence.square(), sample))
    variance = (n * token_variance + (sample.sum_nn - n) * max(covariance, 0.0)) / n**2
    parts = (sample.length * squares + pairs * products)[n_sampled > 0]
    # S / (S - 1) as in the jackknife: each sequence also pulls the mean it is compared with.
    return max(variance, 0.0) * (n_used / (n_used - 1)) ** 2, satterthwaite(parts)


@dataclass(frozen=True)
class Resampled:
    """A participation ratio over other draws of the same texts, or a weighted sum of several.

    Attributes:
        of_texts: what the texts themselves give when they are taken for the whole population.
        draws: the estimate from draws of as many texts, with replacement (bootstrap).
        left_out: the estimate without each text (jackknife).
    """

    of_texts: float
    draws: Float[Tensor, " draw"]
    left_out: Float[Tensor, " text"]


def weighted_sum(terms: Sequence[tuple[float, Resampled]]) -> Resampled:
    """A sum of ratios over the same draws of the same texts."""
    (weight, first), *others = terms
    total = Resampled(weight * first.of_texts, weight * first.draws, weight * first.left_out)
    for weight, one in others:
        total = Resampled(
            total.of_texts + weight * one.of_texts,
            total.draws + weight * one.draws,
            total.left_out + weight * one.left_out,
        )
    return total


def resampled(mean: Float[Tensor, " d"], sample: SampledTokens) -> Resampled:
    """The participation ratio from pairs of different texts, over draws of these texts.

    With the texts' second moments Cᵢ about the mean, it is Σ tr Cᵢ tr Cⱼ / Σ tr(Cᵢ Cⱼ), both over
    pairs of different texts: once the products of all pairs are known, any draw costs two sums.
    Moments of a text are those of its sampled tokens, scaled to its length.

    Args:
        mean: of all tokens, about the sample's origin.
        sample: all texts, each with some of its tokens.
    """
    trace, product = _between_texts(mean, sample)
    own, n = product.diagonal(), len(trace)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(n, (N_DRAWS, n), generator=generator)
    times = torch.zeros(N_DRAWS, n, dtype=torch.float64).scatter_add_(
        1, drawn, torch.ones(N_DRAWS, n, dtype=torch.float64)
    )
    # A text that is drawn twice counts as two texts: that is what stands for unseen ones like it.
    traces = (times @ trace).square() - times @ trace.square()
    products = ((times @ product) * times).sum(-1) - times @ own
    all_traces, all_products = float(trace.sum()), float(product.sum())
    pairs = all_traces**2 - float(trace.square().sum())
    without_traces = pairs - 2 * trace * (all_traces - trace)
    without_products = all_products - float(own.sum()) - 2 * (product.sum(-1) - own)
    return Resampled(
        all_traces**2 / all_products, traces / products, without_traces / without_products
    )


def _between_texts(
    mean: Float[Tensor, " d"], sample: SampledTokens
) -> tuple[Float[Tensor, " text"], Float[Tensor, "text text"]]:
    """tr Cᵢ of every text that has tokens, and tr(Cᵢ Cⱼ) of every pair, on the CPU."""
    used = sample.valid.any(-1)
    valid, length = sample.valid[used], sample.length[used]
    x = (sample.vectors[used] - mean) * valid[..., None]
    n_sampled = valid.sum(-1)
    scale = length / n_sampled
    norm = x.square().sum(-1)
    n, tokens, d = x.shape
    by_moments = d * (tokens + n) < n * tokens * tokens
    product = (products_of_moments if by_moments else products_of_tokens)(x)
    product = product * scale[:, None] * scale
    # Within a text, pairs of different tokens and a token with itself are scaled apart.
    itself = norm.square().sum(-1)
    within = einsum(x, x, "s t i, s u i -> s t u").square().sum((-1, -2)) - itself
    others = (n_sampled * (n_sampled - 1)).clamp_min(1)
    own = scale * itself + length * (length - 1) * within / others
    return (scale * norm.sum(-1)).cpu(), torch.where(
        torch.eye(n, dtype=torch.bool, device=x.device), own, product
    ).cpu()


def products_of_moments(x: Float[Tensor, "text token d"]) -> Float[Tensor, "text text"]:
    """tr(Sᵢ Sⱼ) of every pair of texts, Sᵢ = Σxxᵀ over the tokens of text i.

    The sum of the products of their entries. Sᵢ is symmetric: of a few rows at a time only what is
    on and above the diagonal, where those above count twice.
    """
    n, _, d = x.shape
    height = max(1, min(-(-d // STRIPES), MOST_MOMENTS // (n * d)))
    product = torch.zeros(n, n, dtype=x.dtype, device=x.device)
    for top in range(0, d, height):
        stripe = torch.bmm(x[..., top : top + height].mT, x[..., top:])
        on, above = (part.flatten(1) for part in stripe.tensor_split([height], dim=-1))
        product.addmm_(on, on.T).addmm_(above, above.T, alpha=2)
    return product


def products_of_tokens(x: Float[Tensor, "text token d"]) -> Float[Tensor, "text text"]:
    """The same as `products_of_moments`: the sum of squared products of the two texts' tokens."""
    n, tokens, _ = x.shape
    product = torch.zeros(n, n, dtype=x.dtype, device=x.device)
    for i, one in enumerate(x):
        inner = one @ x[i:].flatten(0, 1).T
        squares = inner.square_().view(tokens, n - i, tokens)
        product[i, i:] = product[i:, i] = squares.sum((0, 2))
    return product


def resampled_ends(
    found: Resampled, centre: float, shrink: float, bootstrap_share: float = 1.0
) -> tuple[float, float]:
    """95% interval around `centre`: the jackknife's, and where BCa's ends are farther, on to them.

    On heavy-tailed texts neither covers enough by itself (`make coverage`). A few texts unlike all
    others make most of a ratio's error: without them it is too high, and seems surer than it is.
    The jackknife does not see that skew; BCa does, and is too sure where skews of ratios cancel.

    Of a single ratio BCa is too wide: a text that is drawn twice makes a pair with itself, which
    resembles itself more than any two texts do, so that draws of few texts vary more than texts.
    A part of that excess is kept, because nothing in a draw tells that its tail is missing.

    Args:
        found: the estimate over draws of the texts.
        centre: the estimate itself.
        shrink: what part of the spread over draws is that of the texts.
        bootstrap_share: how far an end goes from the jackknife's to a farther one of BCa.
    """
    low, high = (end - found.of_texts for end in _bca_quantiles(found))
    half = jackknife_half_width(found.left_out)
    below = -half + bootstrap_share * min(low + half, 0.0)
    above = half + bootstrap_share * max(high - half, 0.0)
    return centre + shrink * below, centre + shrink * above


def _bca_quantiles(found: Resampled) -> tuple[float, float]:
    """Ends of the bias-corrected, accelerated bootstrap's interval (BCa, Efron 1987).

    With Student's t in place of the normal quantiles, for few texts.
    """
    z = torch.tensor([-1.0, 1.0], dtype=torch.float64) * t_factor(len(found.left_out) - 1.0)
    gap = found.left_out.mean() - found.left_out
    cubes = float(gap.square().sum()) ** 1.5
    acceleration = float((gap**3).sum()) / (6 * cubes) if cubes > 0 else 0.0
    below, edge = float((found.draws < found.of_texts).double().mean()), 1 / len(found.draws)
    bias = torch.special.ndtri(torch.tensor(min(max(below, edge), 1 - edge), dtype=torch.float64))
    denominator = 1 - acceleration * (bias + z)
    beyond = torch.where(z > 0, torch.inf, -torch.inf)
    at = torch.where(denominator > 0, bias + (bias + z) / denominator, beyond)
    low, high = found.draws.quantile(torch.special.ndtr(at)).tolist()
    return low, high


def jackknife_half_width(left_out: Float[Tensor, " text"]) -> float:
    """Half width of the 95% interval of an estimate, from the estimates without each text."""
    n = len(left_out)
    squares = (left_out - left_out.mean()).square()
    variance = (n - 1) / n * float(squares.sum())
    return t_factor(min(max(satterthwaite(squares), 2.0), n - 1.0)) * math.sqrt(variance)


def jackknife_estimate(value: float, left_out: Float[Tensor, " text"]) -> Estimate:
    """An estimate over texts from what it is without each of them; no interval below 5 texts.

    >>> found = jackknife_estimate(2.0, torch.tensor([1.9, 2.1, 2.0, 1.8, 2.2]))
    >>> round(found.se, 3), found.n
    (0.283, 5)
    """
    n = len(left_out)
    if n < FEWEST_TEXTS:
        return Estimate(value, math.nan, math.nan, math.nan, n)
    half = jackknife_half_width(left_out)
    se = math.sqrt((n - 1) / n * float((left_out - left_out.mean()).square().sum()))
    return Estimate(value, value - half, value + half, se, n)


@dataclass(frozen=True)
class Ratio:
    """A participation ratio, or a weighted sum of several over the same tokens.

    Attributes:
        value: from pairs of tokens of different texts.
        influence: change of the value per unit of weight put on each sampled token.
        n: how many tokens there are.
        sample: those that are kept.
        draws: the value over draws of the same texts; None if not all texts are in the sample.
    """

    value: float
    influence: Float[Tensor, "sequence token"]
    n: float
    sample: SampledTokens
    draws: Resampled | None


def measured_ratio(m: Moments, sample: SampledTokens, all_sampled: bool) -> Ratio:
    """The participation ratio of these moments, with what its interval needs.

    Args:
        m: of all tokens.
        sample: some tokens, about the same origin.
        all_sampled: whether every text has tokens in the sample.
    """
    value, influence = linearised(m, sample)
    draws = resampled(m.total / m.n, sample) if all_sampled else None
    return Ratio(value, influence, float(m.n), sample, draws)


def ratio_ends(ratio: Ratio, d_model: int) -> tuple[float, float]:
    """95% interval of one participation ratio, within 1 and d_model; NaN for fewer than 5 texts.

    Made on the log scale: the error of a quotient of positive sums is nearer to symmetric there.
    """
    if not ratio.value > 0:
        return math.nan, math.nan
    centre = math.log(ratio.value)
    if ratio.draws is None:
        half = influence_half_width(ratio.influence, ratio.n, ratio.sample) / ratio.value
        ends = (centre - half, centre + half)
    elif len(ratio.draws.left_out) < FEWEST_TEXTS:
        return math.nan, math.nan
    else:
        draws = ratio.draws
        logs = Resampled(math.log(draws.of_texts), draws.draws.log(), draws.left_out.log())
        ends = resampled_ends(logs, centre, share_of_texts(ratio), BOOTSTRAP_SHARE)
    low, high = (min(max(math.exp(end), 1.0), float(d_model)) for end in ends)
    return low, high


def weighted_ratio(terms: Sequence[tuple[float, Ratio]]) -> Ratio:
    """A sum of ratios over the same tokens of the same texts.

    The sum of the influences is the influence on the sum, and the sum over each draw is the sum's
    draw: both take account of how the ratios vary together, which adding up intervals would not.
    """
    (first_weight, first), *others = terms
    value, influence = first_weight * first.value, first_weight * first.influence
    for weight, one in others:
        value += weight * one.value
        influence = influence + weight * one.influence
    known = [(weight, one.draws) for weight, one in terms if one.draws is not None]
    draws = weighted_sum(known) if len(known) == len(terms) else None
    return Ratio(value, influence, first.n, first.sample, draws)


def sum_ends(total: Ratio) -> tuple[float, float]:
    """95% interval of a sum of ratios; NaN for fewer than 5 texts."""
    if total.draws is None:
        half = influence_half_width(total.influence, total.n, total.sample)
        return total.value - half, total.value + half
    found = resampled_estimate(total.value, total.draws, share_of_texts(total))
    return found.low, found.high


def resampled_estimate(value: float, found: Resampled, shrink: float) -> Estimate:
    """A sum of ratios over all of its texts, with its interval; none below 5 texts.

    The interval is not symmetric. `se` is that of its side towards 0, so that the t test against 0
    finds a difference at 5% just where the interval is without 0.

    Args:
        value: the sum.
        found: over draws of the texts.
        shrink: what part of the spread over draws is that of the texts; see `share_of_texts`.
    """
    n = len(found.left_out)
    if n < FEWEST_TEXTS:
        return Estimate(value, math.nan, math.nan, math.nan, n)
    low, high = resampled_ends(found, value, shrink)
    towards_zero = value - low if value > 0 else high - value
    return Estimate(value, low, high, towards_zero / t_factor(n - 1.0), n)


def left_out(total: Ratio, n_texts: float) -> Float[Tensor, " text"]:
    """A sum of ratios without each text that is sampled.

    Of many texts only some are in the sample: what leaving one out does is linearised then, and
    scaled so that `jackknife_estimate` finds the error of a sum over all n texts.
    """
    if total.draws is not None:
        return total.draws.left_out
    of_texts = _of_texts(total)[total.sample.valid.any(-1)].cpu()
    used = len(of_texts)
    return total.value - of_texts * math.sqrt(n_texts / used) * used / (used - 1)


def _of_texts(ratio: Ratio) -> Float[Tensor, " text"]:
    """How much each sampled text moves a ratio."""
    kept = ratio.sample.valid.sum(-1)
    return ratio.sample.length / kept.clamp_min(1) * ratio.influence.sum(-1) / ratio.n


def share_of_texts(ratio: Ratio) -> float:
    """What part of the spread over draws is that of the texts themselves.

    The rest comes of having kept only some tokens of each; 1 where all are kept.
    """
    sample = ratio.sample
    kept = sample.valid.sum(-1)
    if torch.equal(kept.to(sample.length.dtype), sample.length):
        return 1.0
    used = int((kept > 0).sum())
    of_texts = _of_texts(ratio)
    seen = float(of_texts.square().sum()) * (used / (used - 1)) ** 2
    variance, _ = influence_variance(ratio.influence, ratio.n, sample)
    return min(1.0, math.sqrt(variance / seen)) if seen > 0 else 1.0
