"""Spearman's ρ over whole vocabularies, tie-aware: Pearson's correlation of the average ranks.

A vocabulary has to be sorted twice per token, which makes this the most expensive statistic of
all. On the CPU floats are sorted as integers of the same order, each packed into one number with
the payload it carries along, and a few rows at a time, so that all of it stays in the cache.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64, UInt32, UInt64
from torch import Tensor

from .distances import cosine

# Of a 64-bit number: the sort key is above this bit, the payload below.
HALF, LOWER = np.uint64(32), np.uint64(2**32 - 1)
# Rows are sorted in blocks of this many entries, which fit one core's cache.
BLOCK_ENTRIES = 2**16
# An accelerator sorts more at a time; the extra memory, some forty bytes an entry, is little next
# to the logits themselves.
ACCELERATOR_ENTRIES = 2**22


def spearman(a: Float32[Tensor, "n d"], b: Float32[Tensor, "n d"]) -> Float[Tensor, " n"]:
    """Spearman's ρ between each row of `a` and the same row of `b`; equal rows give exactly 1.

    A row whose entries are all equal has no ranking: ρ is 1 if the other row has none either, else
    0. Exact for rows of up to a million entries on the CPU.

    >>> a = torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, 2.0]])
    >>> b = torch.tensor([[5.0, 4.0, 3.0], [1.0, 2.0, 2.0]])
    >>> spearman(a, b).tolist()
    [-1.0, 1.0]
    """
    if a.device.type != "cpu":
        return spearman_on_accelerator(a, b)
    # numpy sorts several times faster than torch here, and lets other threads run meanwhile.
    threads = min(torch.get_num_threads(), max(len(a), 1))
    parts = [np.array_split(x.detach().numpy(), threads) for x in (a, b)]
    with ThreadPoolExecutor(threads) as pool:
        return torch.from_numpy(np.concatenate(list(pool.map(_correlate, *parts))))


def spearman_on_accelerator(
    a: Float32[Tensor, "n d"], b: Float32[Tensor, "n d"]
) -> Float[Tensor, " n"]:
    """`spearman` by sorting on the tensors' own device."""
    middle = (a.shape[-1] + 1) / 2
    rows = max(1, ACCELERATOR_ENTRIES // max(a.shape[-1], 1))
    blocks = zip(torch.split(a, rows), torch.split(b, rows), strict=True)
    return torch.cat([cosine(*(average_ranks(x) - middle for x in block)) for block in blocks])


def _correlate(a: Float32[np.ndarray, "n d"], b: Float32[np.ndarray, "n d"]) -> np.ndarray:
    rows = max(1, BLOCK_ENTRIES // max(a.shape[-1], 1))
    starts = range(0, len(a), rows)
    blocks = [_correlate_block(a[i : i + rows], b[i : i + rows]) for i in starts]
    return np.concatenate([np.empty(0), *blocks])


def _correlate_block(a: Float32[np.ndarray, "n d"], b: Float32[np.ndarray, "n d"]) -> np.ndarray:
    """ρ per row, in integers up to the last division: twice an average rank is an integer.

    Each 64-bit number is a pair (key, payload). First the pairs (a, b) are sorted, so that the
    place of a pair is the rank of its `a`. Then b becomes the key, with twice the rank of `a` as
    its payload, and the pairs are sorted again: now the place is the rank of `b`, and the payload
    the rank of `a` that belongs to it.
    """
    d = a.shape[-1]
    twice_ranks = np.arange(2, 2 * d + 1, 2)
    pairs = _keys(a).astype(np.uint64) << HALF | _keys(b)
    pairs.sort(axis=-1)
    tied_a = _tied(pairs >> HALF)
    pairs <<= HALF
    pairs |= twice_ranks.astype(np.uint64)
    pairs.reshape(-1)[tied_a.entry] += tied_a.moved.view(np.uint64)
    pairs.sort(axis=-1)
    tied_b = _tied(pairs >> HALF)
    ranks_a = (pairs & LOWER).view(np.int64)  # in the order of b
    centre = d * (d + 1) ** 2  # Σ of (twice the mean rank)²: centres both factors at once
    with_b = np.einsum("nd,d->n", ranks_a, twice_ranks) - centre
    np.add.at(with_b, tied_b.entry // d, ranks_a.reshape(-1)[tied_b.entry] * tied_b.moved)
    # Without ties the centred squares of twice the ranks 1..d sum to d(d² - 1)/3; a run of t tied
    # entries lowers that by (t³ - t)/3.
    aa, bb = ((d * (d**2 - 1) // 3 - x.lost).astype(np.float64) for x in (tied_a, tied_b))
    scale = np.sqrt(aa * bb)
    both_flat = ((aa == 0) & (bb == 0)).astype(np.float64)
    correlation: np.ndarray = np.divide(with_b, scale, out=both_flat, where=scale > 0)
    return correlation


def _keys(x: Float32[np.ndarray, "n d"]) -> UInt32[np.ndarray, "n d"]:
    """Integers that have the order of the floats."""
    bits = (x + np.float32(0)).view(np.int32)  # adding zero makes one zero of the two
    return (bits ^ (bits >> 31 | np.int32(-(2**31)))).view(np.uint32)


class _Tied(NamedTuple):
    """The tied entries of sorted rows.

    Attributes:
        entry: their places in all rows one after another.
        moved: twice the mean rank of its run, less twice its own rank.
        lost: by how much ties lower each row's sum of squares of twice the ranks.
    """

    entry: Int64[np.ndarray, " tied"]
    moved: Int64[np.ndarray, " tied"]
    lost: Int64[np.ndarray, " n"]


def _tied(ordered: UInt64[np.ndarray, "n d"]) -> _Tied:
    """Runs of equal entries in every row; takes time only for entries that are tied."""
    n, d = ordered.shape
    lost = np.zeros(n, dtype=np.int64)
    gap = np.flatnonzero(ordered[:, 1:] == ordered[:, :-1])  # several times faster than nonzero
    if len(gap) == 0:
        return _Tied(gap, gap, lost)
    row, left = np.divmod(gap, d - 1)
    entry = row * d + left  # of the left one of two equal neighbours
    starts = np.ones(len(entry), dtype=bool)
    starts[1:] = entry[1:] != entry[:-1] + 1
    run = np.cumsum(starts) - 1
    first, size = entry[starts], np.bincount(run) + 1
    shared = 2 * (first % d) + size + 1  # the ends of a run have this mean of twice their ranks
    np.add.at(lost, first // d, (size**3 - size) // 3)
    tied = np.concatenate([first, entry + 1])
    moved = np.concatenate([shared, shared[run]]) - 2 * (tied % d + 1)
    return _Tied(tied, moved, lost)


def average_ranks(x: Float32[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """Ascending ranks 1..d of each row as float32, ties sharing the mean of their ranks.

    The same ranks as scipy's `rankdata`; exact for rows of up to 2^23 entries. For accelerators.
    """
    ordered, order = x.sort(-1)
    places = torch.arange(x.shape[-1], device=x.device).expand(x.shape)
    border = torch.ones_like(ordered[:, :1], dtype=torch.bool)
    changes = ordered[:, 1:] != ordered[:, :-1]
    new_run = torch.cat([border, changes], dim=-1)
    # Each run of ties reaches from its own first place to the place before the next run's.
    first = torch.where(new_run, places, 0).cummax(-1).values
    ends_run = torch.cat([changes, border], dim=-1)
    last = torch.where(ends_run, places, x.shape[-1]).flip(-1).cummin(-1).values.flip(-1)
    shared = (first + last).to(torch.float32) / 2 + 1
    return torch.empty_like(shared).scatter_(-1, order, shared)
