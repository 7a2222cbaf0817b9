"""Spearman's ρ against scipy: ties, signs, zeros, blocks, and the accelerator's road."""

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from hyperlens.statistics import rank_correlation
from hyperlens.statistics.rank_correlation import average_ranks, spearman, spearman_on_accelerator

COARSE = st.sampled_from([-2.0, -1.0, -0.0, 0.0, 0.5, 1.0, np.finfo(np.float32).tiny])
TIED_ROWS = arrays(np.float32, array_shapes(min_dims=2, max_dims=2, max_side=9), elements=COARSE)


def scipys(a, b):
    return [scipy.stats.spearmanr(x, y).statistic for x, y in zip(a, b, strict=True)]


@given(TIED_ROWS)
def test_average_ranks_are_scipys(x):
    assert (average_ranks(torch.from_numpy(x)).numpy() == scipy.stats.rankdata(x, axis=1)).all()


@settings(max_examples=40)
@given(st.integers(0, 2**31), st.booleans())
def test_spearman_is_scipys(seed, tied):
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(2, 4, 30)).astype(np.float32)
    if tied:
        a, b = np.round(a), np.round(b)
    found = spearman(torch.from_numpy(a), torch.from_numpy(b))
    np.testing.assert_allclose(found, scipys(a, b), rtol=1e-12, atol=1e-14)


@given(TIED_ROWS, st.integers(0, 2**31))
def test_both_roads_agree(a, seed):
    """What runs on an accelerator, run here, gives what the CPU's integers give."""
    b = np.random.default_rng(seed).permuted(a, axis=1)
    here, there = torch.from_numpy(a), torch.from_numpy(b)
    other = spearman_on_accelerator(here, there)
    torch.testing.assert_close(spearman(here, there), other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("block_entries", [1, 300, 2**19])
def test_blocks_are_invisible(monkeypatch, block_entries):
    a, b = torch.randn(2, 37, 50).round(decimals=1)
    monkeypatch.setattr(rank_correlation, "BLOCK_ENTRIES", block_entries)
    monkeypatch.setattr(rank_correlation, "ACCELERATOR_ENTRIES", block_entries)
    expected = scipys(a.numpy(), b.numpy())
    np.testing.assert_allclose(spearman(a, b), expected, rtol=1e-12)
    np.testing.assert_allclose(spearman_on_accelerator(a, b), expected, rtol=1e-5)


def test_a_large_tied_vocabulary_stays_exact():
    """Sums of squared ranks of 200,000 entries pass 2^53; integers do not round them."""
    logits = torch.randn(1, 200_000).round(decimals=3)
    assert spearman(logits, logits) == 1
    assert spearman(logits, -logits) == -1


def test_rows_without_spread():
    flat, slope = torch.zeros(1, 5), torch.arange(5.0)[None]
    assert spearman(flat, flat) == 1
    assert spearman(flat, slope) == 0
    assert spearman(slope, flat) == 0
    assert len(spearman(slope[:0], slope[:0])) == 0
