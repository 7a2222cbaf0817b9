"""The maths of comparing two streams of vectors and two rows of logits: pure functions, no state.

Every function works on plain tensors and returns one float64 number per row, so that a sum over
any number of rows loses nothing. Two identical inputs give exactly cosine 1, distance 0, KL 0
and correlation 1: each pair of terms that must cancel is computed by the same operations.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

BITS_PER_NAT = 1 / math.log(2)


def row_dot(a: Float[Tensor, "n d"], b: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    """Inner product of each row of `a` with the same row of `b`: float32 products, float64 out."""
    return _sum(a * b)


def cosine(a: Float[Tensor, "n d"], b: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    """Cosine of the angle between rows, in [-1, 1]; two zero rows point the same way (1).

    sqrt(s * s) is exactly s in floating point, so equal rows give exactly 1; the product of the
    two norms would not.
    """
    aa, bb = row_dot(a, a), row_dot(b, b)
    scale = torch.sqrt(aa * bb)
    both_zero = ((aa == 0) & (bb == 0)).to(torch.float64)
    return torch.where(scale > 0, row_dot(a, b) / scale, both_zero).clamp(-1.0, 1.0)


def l2_distance(a: Float[Tensor, "n d"], b: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    """Euclidean distance between rows, in the units of the residual stream."""
    gap = b - a
    return torch.sqrt(row_dot(gap, gap))


def relative_l2(a: Float[Tensor, "n d"], b: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    """‖b - a‖ / ‖a‖ per row, dimensionless; 0 for equal rows, infinite where only `a` is zero."""
    distance = l2_distance(a, b)
    return torch.where(distance > 0, distance / torch.sqrt(row_dot(a, a)), distance)


def unit_rms(x: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows d"]:
    """Scale each vector to root-mean-square 1 (a zero vector stays zero)."""
    rms = x.square().mean(-1, keepdim=True).sqrt()
    return x / torch.where(rms > 0, rms, 1.0)


def masked_median(
    values: Float[Tensor, "*rows n"], mask: Bool[Tensor, "*rows n"]
) -> Float[Tensor, "*rows"]:
    """Median of the masked entries of each row, the mean of the middle two for an even count.

    Rows without any entry give NaN.
    """
    ordered = torch.where(mask, values, torch.inf).sort(-1).values
    count = mask.sum(-1, keepdim=True)
    lower = ordered.gather(-1, ((count - 1) // 2).clamp_min(0))
    upper = ordered.gather(-1, (count // 2).clamp_max(values.shape[-1] - 1))
    median = (lower + upper) / 2
    return torch.where(count > 0, median, torch.nan).squeeze(-1)


class LogitComparison(NamedTuple):
    """Two rows of logits set against each other; entropies and divergence in nats.

    Attributes:
        base_winner, tuned_winner: the token each row puts first.
        base_entropy, tuned_entropy: of the two softmaxes.
        kl: KL(tuned ‖ base).
    """

    base_winner: Int[Tensor, " n"]
    tuned_winner: Int[Tensor, " n"]
    base_entropy: Float[Tensor, " n"]
    tuned_entropy: Float[Tensor, " n"]
    kl: Float[Tensor, " n"]


def compare_logits_(
    base: Float[Tensor, "n d_vocab"], tuned: Float[Tensor, "n d_vocab"]
) -> LogitComparison:
    """Winners, entropies and divergence of two rows of logits, which are **overwritten**.

    In place, as the trailing underscore says: a vocabulary is wide, and fresh memory for every
    step would cost more than the arithmetic. Logits are shifted by their maximum first, and KL is
    a weighted sum of logit *differences*, so that close distributions do not lose their small
    divergence to cancellation. Inside, all is in bits: exp2 is several times faster than exp.
    """
    base_winner, tuned_winner = _shift_(base), _shift_(tuned)
    weights = torch.exp2(base)
    base_z = _sum(weights)
    base_entropy = base_z.log2() - _sum(weights.mul_(base)) / base_z
    torch.exp2(tuned, out=weights)
    tuned_z = _sum(weights)
    gap = _sum(torch.sub(tuned, base, out=base).mul_(weights)) / tuned_z
    tuned_entropy = tuned_z.log2() - _sum(weights.mul_(tuned)) / tuned_z
    kl = (gap - (tuned_z.log2() - base_z.log2())).clamp_min(0.0)
    return LogitComparison(
        base_winner,
        tuned_winner,
        base_entropy / BITS_PER_NAT,
        tuned_entropy / BITS_PER_NAT,
        kl / BITS_PER_NAT,
    )


def describe_logits_(
    logits: Float[Tensor, "n d_vocab"],
) -> tuple[Int[Tensor, " n"], Float[Tensor, " n"]]:
    """Winner and entropy of each row, which is **overwritten**: as `compare_logits_` has them."""
    best = _shift_(logits)
    weights = torch.exp2(logits)
    z = _sum(weights)
    return best, (z.log2() - _sum(weights.mul_(logits)) / z) / BITS_PER_NAT


def _shift_(logits: Float[Tensor, "n d_vocab"]) -> Int[Tensor, " n"]:
    """The winner of each row, which becomes bits below its largest logit."""
    best = winner(logits)
    largest = logits.gather(-1, best[:, None])
    # One operation and one rounding for two: (logits - largest) in bits.
    torch.add(largest * -BITS_PER_NAT, logits, alpha=BITS_PER_NAT, out=logits)
    return best


def winner(logits: Float[Tensor, "n d_vocab"]) -> Int[Tensor, " n"]:
    """Token of the largest logit of each row, the first of tied ones."""
    if logits.device.type != "cpu":
        return logits.argmax(-1)
    # numpy's argmax is ten times faster than torch's here.
    return torch.from_numpy(np.argmax(logits.numpy(), -1))


def _sum(x: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    return x.sum(-1).to(torch.float64)


def rank_of(logits: Float[Tensor, "n d_vocab"], token: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """One-based rank of one token per row: 1 + the number of strictly larger logits.

    A count, not a sort. Tied tokens share the best rank, so a tie never reads as a demotion.
    """
    own = logits.gather(-1, token[:, None])
    # Counted as float32 (exact to 2^24): several times faster than any reduction of bools.
    larger = torch.gt(logits, own, out=torch.empty_like(logits))
    return larger.sum(-1).to(torch.int64) + 1
