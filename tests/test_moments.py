"""Participation ratio from moments against the eigenvalues and the `dimensionality` package."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from dimensionality import participation_ratio
from hypothesis import given, settings
from hypothesis import strategies as st

from hyperlens.statistics.moments import (
    Moments,
    corrected_traces,
    moments_of,
    naive_traces,
    outer_by_stripes,
    outer_mostly_float32,
)

FIELDS = ("n", "total", "outer", "square", "fourth", "cubic")


def sample(n, d, seed=0, mean=0.0):
    rng = np.random.default_rng(seed)
    spread = np.linspace(0.2, 2.0, d)
    return torch.from_numpy((rng.normal(size=(n, d)) * spread + mean).astype(np.float32))


@settings(max_examples=25, deadline=None)
@given(st.integers(5, 60), st.integers(2, 24), st.integers(0, 2**31))
def test_estimators_are_the_packages(n, d, seed):
    x = sample(n, d, seed)
    m = moments_of(x, x[0].double())
    expected = participation_ratio(x.double().numpy(), return_all=True)
    assert float(corrected_traces(m).ratio) == pytest.approx(expected["row"], rel=1e-5)
    assert float(naive_traces(m).ratio) == pytest.approx(expected["naive"], rel=1e-5)


@pytest.mark.parametrize("d", [1, 63, 64, 65, 200, 700])
def test_stripes_make_the_whole_product(d):
    x = torch.randn(37, d, dtype=torch.float64)
    torch.testing.assert_close(outer_by_stripes(x), x.T @ x, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(("n", "d"), [(400, 32), (3000, 64)])
def test_estimators_agree_to_a_millionth_on_ordinary_sizes(n, d):
    x = sample(n, d)
    m = moments_of(x, torch.zeros(d, dtype=torch.float64))
    expected = participation_ratio(x.double().numpy(), return_all=True)
    assert float(corrected_traces(m).ratio) == pytest.approx(expected["row"], rel=1e-6)
    assert float(naive_traces(m).ratio) == pytest.approx(expected["naive"], rel=1e-6)
    eigenvalues = np.linalg.eigvalsh(np.cov(x.double().numpy().T))
    by_hand = eigenvalues.sum() ** 2 / (eigenvalues**2).sum()
    assert float(naive_traces(m).ratio) == pytest.approx(by_hand, rel=1e-6)


def test_a_mean_a_thousand_deviations_away_does_not_matter():
    x = sample(2000, 48, mean=1000.0 * 2.0)
    m = moments_of(x, x[:8].mean(0).double())
    centred = x.double().numpy() - x.double().numpy().mean(0)
    expected = participation_ratio(centred, return_all=True)
    assert float(corrected_traces(m).ratio) == pytest.approx(expected["row"], rel=1e-6)
    assert float(naive_traces(m).ratio) == pytest.approx(expected["naive"], rel=1e-6)


LENGTHS = {
    "alike": lambda n: np.ones(n),
    "one sink": lambda n: np.where(np.arange(n) == 3, 1e3, 1.0),
    "heavy-tailed": lambda n: np.exp(2 * np.random.default_rng(1).normal(size=n)),
    "mostly zero": lambda n: np.where(np.arange(n) % 3 == 0, 1.0, 0.0),
}


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_float32_products_do_where_float64_ones_are_dear(lengths):
    """What accelerators do, done here: one long row must not cost the digits of all others."""
    x = sample(1000, 48).double() * torch.from_numpy(lengths(1000))[:, None]
    origin = x.mean(0)
    exact = moments_of(x, origin)
    centred = x - origin
    cheap = replace(exact, outer=outer_mostly_float32(centred, centred.square().sum(-1)))
    for traces in (corrected_traces, naive_traces):
        assert float(traces(cheap).ratio) == pytest.approx(float(traces(exact).ratio), rel=2e-6)


@pytest.mark.parametrize("n", [0, 1, 2])
def test_float32_products_of_few_rows(n):
    x = sample(n, 5).double()
    outer = outer_mostly_float32(x, x.square().sum(-1))
    torch.testing.assert_close(outer, x.T @ x, rtol=1e-6, atol=1e-6)


def test_moving_the_origin_is_exact_algebra():
    x = sample(50, 7).double()
    step = torch.linspace(-3, 5, 7, dtype=torch.float64)
    origin = torch.zeros(7, dtype=torch.float64)
    moved = moments_of(x, origin).shifted(step)
    direct = moments_of(x + step, origin)
    for field in FIELDS:
        torch.testing.assert_close(
            getattr(moved, field), getattr(direct, field), rtol=1e-12, atol=1e-9
        )


def test_too_few_tokens_have_no_corrected_ratio():
    for n in (0, 1, 2, 3):
        m = moments_of(sample(n, 5), torch.zeros(5, dtype=torch.float64))
        assert torch.isnan(corrected_traces(m).ratio)


def test_no_variance_has_no_ratio():
    m = moments_of(torch.ones(10, 3), torch.ones(3, dtype=torch.float64))
    assert torch.isnan(naive_traces(m).ratio)


def test_leading_dimensions_are_independent_sets():
    sets = [sample(30, 6, seed) for seed in range(4)]
    origin = torch.zeros(6, dtype=torch.float64)
    each = [moments_of(x, origin) for x in sets]
    stacked = Moments(*(torch.stack([getattr(m, f) for m in each]) for f in FIELDS))
    together = corrected_traces(stacked).ratio
    for one, value in zip(each, together, strict=True):
        assert float(corrected_traces(one).ratio) == pytest.approx(float(value), rel=1e-12)
