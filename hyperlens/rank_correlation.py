"""Spearman's ρ over whole vocabularies, tie-aware: Pearson's correlation of the average ranks.

A vocabulary has to be sorted twice per token, which makes this the dearest statistic of all. On
the CPU floats are sorted as the integers that have their order, half of the bits at a time, and a
few rows at a time so that all of it stays in the processor's cache.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64, UInt32
from torch import Tensor

from .stats import cosine

# Rows are sorted in blocks of this many entries, whose indices one core's cache holds.
BLOCK_ENTRIES = 2**16
# An accelerator sorts more at a time; what that takes besides, some forty bytes an entry, is
# little next to the logits themselves.
ACCELERATOR_ENTRIES = 2**22


def spearman(a: Float32[Tensor, "n d"], b: Float32[Tensor, "n d"]) -> Float[Tensor, " n"]:
    """Spearman's ρ between each row of `a` and the same row of `b`; equal rows give exactly 1.

    A row without any spread has no ranking: ρ is 1 if the other row has none either, else 0.
    Exact for rows of up to a million entries on the CPU.
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
    """Twice the average ranks are integers, and so is everything up to the last division."""
    order_a, ranks_a = _sorted_ranks(a)
    order_b, ranks_b = _sorted_ranks(b)
    by_column = np.empty_like(ranks_a)
    by_column.reshape(-1)[order_a] = ranks_a
    in_order_of_b = by_column.take(order_b)
    d = a.shape[-1]
    centre = d * (d + 1) ** 2
    with_b, aa, bb = (
        (np.einsum("nd,nd->n", x, y) - centre).astype(np.float64)
        for x, y in ((in_order_of_b, ranks_b), (ranks_a, ranks_a), (ranks_b, ranks_b))
    )
    scale = np.sqrt(aa * bb)
    both_flat = ((aa == 0) & (bb == 0)).astype(np.float64)
    correlation: np.ndarray = np.divide(with_b, scale, out=both_flat, where=scale > 0)
    return correlation


def _sorted_ranks(
    x: Float32[np.ndarray, "n d"],
) -> tuple[Int64[np.ndarray, "n d"], Int64[np.ndarray, "n d"]]:
    """Flat indices that put every row in ascending order, and twice the average ranks in it."""
    bits = (x + np.float32(0)).view(np.int32)  # adding zero makes one zero of the two
    # The sign bit set: from here on the order of the integers is the order of the floats.
    keys = (bits ^ (bits >> 31 | np.int32(-(2**31)))).view(np.uint32)
    order = _ascending(keys)
    ranks = np.tile(np.arange(2, 2 * x.shape[-1] + 1, 2), (len(x), 1))
    ordered = keys.take(order)
    _share_tied_ranks(ranks, ordered[:, 1:] == ordered[:, :-1])
    return order, ranks


def _ascending(keys: UInt32[np.ndarray, "n d"]) -> Int64[np.ndarray, "n d"]:
    """Flat indices that sort every row: by the lower half of the bits, then by the upper half.

    numpy sorts numbers of 16 bits by counting them, which compares nothing: the two halves take
    a third of the time of one sort of the whole.
    """
    row = np.arange(0, keys.size, max(keys.shape[-1], 1))[:, None]
    by_lower = np.argsort(keys.astype(np.uint16), axis=-1, kind="stable") + row
    upper = (keys >> 16).astype(np.uint16).take(by_lower)
    return by_lower.take(np.argsort(upper, axis=-1, kind="stable") + row)


def _share_tied_ranks(ranks: np.ndarray, tied: np.ndarray) -> None:
    """Give every run of tied entries twice its mean rank, in place; costs only what is tied."""
    flat = np.flatnonzero(tied)  # several times faster than nonzero
    if len(flat) == 0:
        return
    row, gap = np.divmod(flat, tied.shape[1])
    starts = np.ones(len(row), dtype=bool)
    starts[1:] = (row[1:] != row[:-1]) | (gap[1:] != gap[:-1] + 1)
    run = np.cumsum(starts) - 1
    first, gaps = gap[starts], np.bincount(run)
    shared = 2 * (first + 1) + gaps  # a run of g gaps joins ranks first+1 .. first+1+g
    ranks[row, gap + 1] = shared[run]
    ranks[row[starts], first] = shared


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
