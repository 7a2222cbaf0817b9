"""The maths of comparing two streams of vectors and two rows of logits: pure functions, no state.

Every function works on plain tensors and returns one float64 number per row, so that a sum over
any number of rows loses nothing. Two identical inputs give exactly cosine 1, distance 0, KL 0
and correlation 1: each pair of terms that must cancel is computed by the same operations.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int
from torch import Tensor


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
    divergence to cancellation.
    """
    base_max, base_winner = base.max(-1, keepdim=True)
    tuned_max, tuned_winner = tuned.max(-1, keepdim=True)
    base.sub_(base_max)
    tuned.sub_(tuned_max)
    weights = base.exp()
    base_z = _sum(weights)
    base_entropy = base_z.log() - _sum(weights.mul_(base)) / base_z
    torch.exp(tuned, out=weights)
    tuned_z = _sum(weights)
    gap = _sum(torch.sub(tuned, base, out=base).mul_(weights)) / tuned_z
    tuned_entropy = tuned_z.log() - _sum(weights.mul_(tuned)) / tuned_z
    return LogitComparison(
        base_winner.squeeze(-1),
        tuned_winner.squeeze(-1),
        base_entropy,
        tuned_entropy,
        (gap - (tuned_z.log() - base_z.log())).clamp_min(0.0),
    )


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


def average_ranks(x: Float32[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """Ascending ranks 1..d of each row as float32, ties sharing the mean of their ranks.

    The same ranks as scipy's `rankdata`; exact for rows of up to 2^23 entries.
    """
    ordered, order = _sort_rows(x)
    ranks = torch.arange(1, x.shape[-1] + 1, device=x.device, dtype=torch.float32).repeat(len(x), 1)
    _share_tied_ranks(ranks, ordered[:, 1:] == ordered[:, :-1])
    return torch.empty_like(ranks).scatter_(-1, order, ranks)


def _share_tied_ranks(ranks: Float[Tensor, "n d"], tied: Bool[Tensor, "n gaps"]) -> None:
    """Give every run of tied entries the mean of its ranks, in place; costs only what is tied."""
    row, gap = tied.nonzero(as_tuple=True)
    if len(row) == 0:
        return
    starts_run = torch.ones_like(row, dtype=torch.bool)
    starts_run[1:] = (row[1:] != row[:-1]) | (gap[1:] != gap[:-1] + 1)
    run = starts_run.cumsum(0) - 1
    first, gaps = gap[starts_run], torch.bincount(run)
    shared = (first + 1 + gaps / 2).to(
        ranks.dtype
    )  # a run of g gaps joins ranks first+1..first+1+g
    ranks[row, gap + 1] = shared[run]
    ranks[row[starts_run], first] = shared


def _sort_rows(x: Float[Tensor, "n d"]) -> tuple[Float[Tensor, "n d"], Int[Tensor, "n d"]]:
    if x.device.type != "cpu":
        ordered, order = x.sort(-1)
        return ordered, order
    # numpy's vectorised sort is several times faster than torch's here, and lets other threads
    # run meanwhile.
    rows = np.array_split(x.numpy(), min(torch.get_num_threads(), max(len(x), 1)))
    with ThreadPoolExecutor(len(rows)) as pool:
        orders = np.concatenate(list(pool.map(_argsort, rows)))
    return x.gather(-1, torch.from_numpy(orders)), torch.from_numpy(orders)


def _argsort(rows: np.ndarray) -> np.ndarray:
    """Argsort by integers that carry their own column: a third faster than an indirect sort."""
    bits = (rows + np.float32(0)).view(np.int32)  # adding zero makes one zero of the two
    keys = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).astype(np.int64)  # in the order of the floats
    keys <<= 32
    keys |= np.arange(rows.shape[-1])
    keys.sort(axis=-1)
    return keys & 0xFFFFFFFF


def spearman(a: Float32[Tensor, "n d"], b: Float32[Tensor, "n d"]) -> Float[Tensor, " n"]:
    """Spearman's ρ between two rows, tie-aware: Pearson's correlation of the average ranks.

    A row without any spread has no ranking: ρ is 1 if the other row has none either, else 0.
    """
    middle = (a.shape[-1] + 1) / 2
    return cosine(average_ranks(a) - middle, average_ranks(b) - middle)
