"""The maths against numpy and scipy, and its exact values where exactness is promised."""

import numpy as np
import scipy.special
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from hyperlens.statistics import distances as stats
from hyperlens.statistics.rank_correlation import spearman

MODERATE = st.floats(-50, 50, width=32)
COARSE = st.sampled_from([-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0])


def rows(elements=MODERATE, min_side=2):
    return arrays(
        np.float32,
        array_shapes(min_dims=2, max_dims=2, min_side=min_side, max_side=9),
        elements=elements,
    )


@given(rows())
def test_equal_rows_are_exactly_equal(x):
    t = torch.from_numpy(x)
    assert (stats.cosine(t, t) == 1).all()
    assert (stats.l2_distance(t, t) == 0).all()
    assert (stats.relative_l2(t, t) == 0).all()
    assert (spearman(t, t) == 1).all()
    seen = stats.compare_logits_(t.clone(), t.clone())
    assert (seen.kl == 0).all()
    assert (seen.base_winner == seen.tuned_winner).all()
    assert (seen.base_entropy == seen.tuned_entropy).all()
    assert (stats.rank_of(t, seen.tuned_winner) == 1).all()


@given(st.integers(0, 2**31))
def test_distances_against_numpy(seed):
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(2, 7, 33))
    ta, tb = (torch.from_numpy(x.astype(np.float32)) for x in (a, b))
    a, b = ta.numpy().astype(np.float64), tb.numpy().astype(np.float64)
    norm = np.linalg.norm
    np.testing.assert_allclose(
        stats.cosine(ta, tb), (a * b).sum(1) / norm(a, axis=1) / norm(b, axis=1), atol=1e-6
    )
    np.testing.assert_allclose(stats.l2_distance(ta, tb), norm(b - a, axis=1), rtol=1e-6)
    np.testing.assert_allclose(
        stats.relative_l2(ta, tb), norm(b - a, axis=1) / norm(a, axis=1), rtol=1e-6
    )


def test_zero_vectors_have_defined_distances():
    zero, one = torch.zeros(1, 4), torch.ones(1, 4)
    assert stats.cosine(zero, zero) == 1
    assert stats.cosine(zero, one) == 0
    assert stats.relative_l2(zero, zero) == 0
    assert stats.relative_l2(zero, one) == torch.inf
    assert (stats.unit_rms(zero) == 0).all()


@given(rows(st.floats(0.5, 50, width=32)))
def test_unit_rms_has_unit_rms(x):
    scaled = stats.unit_rms(torch.from_numpy(x))
    np.testing.assert_allclose(scaled.square().mean(-1), 1, rtol=1e-5)


@given(rows(), st.integers(0, 2**31))
def test_masked_median_is_numpys(x, seed):
    mask = np.random.default_rng(seed).random(x.shape) < 0.6
    found = stats.masked_median(torch.from_numpy(x), torch.from_numpy(mask)).numpy()
    for value, row, keep in zip(found, x, mask, strict=True):
        if keep.any():
            assert value == np.median(row[keep])
        else:
            assert np.isnan(value)


@given(st.integers(0, 2**31), st.floats(0.01, 10))
def test_entropies_and_kl_against_scipy(seed, scale):
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(2, 5, 40)).astype(np.float32) * np.float32(scale)
    seen = stats.compare_logits_(*map(torch.from_numpy, z.copy()))
    p, q = (scipy.special.softmax(x.astype(np.float64), axis=1) for x in z)
    np.testing.assert_allclose(
        seen.base_entropy, scipy.stats.entropy(p, axis=1), rtol=2e-5, atol=1e-6
    )
    np.testing.assert_allclose(
        seen.tuned_entropy, scipy.stats.entropy(q, axis=1), rtol=2e-5, atol=1e-6
    )
    np.testing.assert_allclose(seen.kl, scipy.stats.entropy(q, p, axis=1), rtol=2e-5, atol=1e-6)


def test_small_divergences_keep_their_digits():
    rng = np.random.default_rng(0)
    z = rng.normal(size=(64, 4000)).astype(np.float32) * 3
    moved = (z + 1e-3 * rng.normal(size=z.shape)).astype(np.float32)
    seen = stats.compare_logits_(torch.tensor(z), torch.tensor(moved))
    p, q = (scipy.special.softmax(x.astype(np.float64), axis=1) for x in (z, moved))
    expected = scipy.stats.entropy(q, p, axis=1)
    assert expected.max() < 1e-5
    np.testing.assert_allclose(seen.kl.mean(), expected.mean(), rtol=0.02)


@given(rows(COARSE), st.integers(0, 2**31))
def test_ranks_count_larger_logits_and_ties_share_the_best(x, seed):
    token = np.random.default_rng(seed).integers(x.shape[1], size=len(x))
    found = stats.rank_of(torch.from_numpy(x), torch.from_numpy(token))
    expected = [
        scipy.stats.rankdata(-row, method="min")[t] for row, t in zip(x, token, strict=True)
    ]
    assert found.tolist() == expected


def test_temperature_keeps_ranks_and_sharpens():
    z = torch.randn(20, 100)
    seen = stats.compare_logits_(z.clone(), z * 2)
    assert (spearman(z, z * 2) == 1).all()
    assert (seen.base_winner == seen.tuned_winner).all()
    assert (seen.tuned_entropy < seen.base_entropy).all()
