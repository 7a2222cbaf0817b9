"""Linear CKA and the Procrustes angle against kernel matrices, scipy, and known shapes."""

import math

import pytest
import torch
from scipy.spatial import procrustes
from streams_for_tests import N_LAYERS, Streams

from hyperlens.probes import LinearCKA, Procrustes
from hyperlens.statistics.alignment import CrossMoments, cross_moments, procrustes_cosine


def tokens_of(streams, layer):
    """Both streams at a layer, without BOS and the sink."""
    found = []
    for side in (streams.base, streams.tuned):
        rows = [
            of_text[layer, token].double()
            for i, of_text in enumerate(side)
            for token in range(1, len(of_text[layer]))
            if (i, token, layer) != (streams.sink, 1, 1)
        ]
        found.append(torch.stack(rows))
    return found


def hsic_by_kernels(x, y):
    """Song et al. 2012, equation 5, from the kernel matrices themselves."""
    n = len(x)
    k, kernel_l = (v @ v.T - torch.diag((v @ v.T).diagonal()) for v in (x, y))
    one = torch.ones(n, dtype=torch.float64)
    total = torch.trace(k @ kernel_l)
    total = total + (one @ k @ one) * (one @ kernel_l @ one) / ((n - 1) * (n - 2))
    return (total - 2 / (n - 2) * (one @ k @ kernel_l @ one)) / (n * (n - 3))


def test_both_are_those_of_matrices_of_all_tokens():
    streams = Streams()
    cka = {row.layer: row for row in streams.run(LinearCKA()).compute().rows}
    angle = {row.layer: row for row in streams.run(Procrustes()).compute().rows}
    for layer in range(N_LAYERS + 1):
        x, y = tokens_of(streams, layer)
        expected = hsic_by_kernels(x, y)
        expected = expected / (hsic_by_kernels(x, x) * hsic_by_kernels(y, y)).sqrt()
        assert cka[layer].value == pytest.approx(float(expected), rel=1e-5)
        disparity = procrustes(x.numpy(), y.numpy())[2]  # 1 - cosine²
        assert math.cos(math.radians(angle[layer].value)) ** 2 == pytest.approx(1 - disparity)
        assert cka[layer].n == len(x)


def test_turned_moved_and_scaled_is_the_same_shape():
    streams = Streams(30)
    turn = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(0)))[0]
    streams.tuned = [300 + 2 * base @ turn for base in streams.base]
    for row in streams.run(LinearCKA()).compute().rows:
        assert row.value == pytest.approx(1.0, abs=1e-5)
    for row in streams.run(Procrustes()).compute().rows:
        assert row.value == pytest.approx(0.0, abs=0.05)


def test_few_tokens_of_independent_streams_are_not_alike():
    """The biased estimate reads about 0.3 here; the debiased one is 0 on average."""
    found = []
    for seed in range(60):
        streams = Streams(5, seed)
        generator = torch.Generator().manual_seed(seed)
        for side in ("base", "tuned"):
            setattr(
                streams, side, [torch.randn(x.shape, generator=generator) for x in streams.base]
            )
        found.append(streams.run(LinearCKA(layers=[0])).compute().rows[0].value)
    mean = torch.tensor([x for x in found if math.isfinite(x)]).double()
    assert float(mean.mean()) == pytest.approx(0.0, abs=3.5 * float(mean.std()) / len(mean) ** 0.5)


def test_moving_moments_is_moving_vectors():
    generator = torch.Generator().manual_seed(0)
    x, y, steps = (torch.randn(n, 4, generator=generator).double() for n in (9, 9, 2))
    moved = cross_moments(x, y).shifted(*steps)
    expected = cross_moments(x + steps[0], y + steps[1])
    for name in CrossMoments.__dataclass_fields__:
        torch.testing.assert_close(getattr(moved, name), getattr(expected, name))
    assert float(procrustes_cosine(moved)) == pytest.approx(
        float(procrustes_cosine(cross_moments(x, y)))
    )
