"""p values: scipy's where it has one, nothing where there is nothing to test."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from hyperlens.statistics.significance import holm, holm_rows, paired_p, welch_p

NUMBERS = st.lists(st.integers(0, 96).map(lambda n: n / 96), min_size=3, max_size=12)


@given(NUMBERS, st.randoms(use_true_random=False))
def test_p_values_are_scipys_where_units_vary(values: list[float], rng) -> None:
    others = [rng.randrange(97) / 96 for _ in values]
    gaps = np.subtract(values, others)
    if np.ptp(gaps) > 1e-9:
        assert paired_p(values, others) == pytest.approx(stats.ttest_rel(values, others).pvalue)
    if np.ptp(values) > 1e-9 and np.ptp(others) > 1e-9:
        expected = stats.ttest_ind(values, others, equal_var=False).pvalue
        assert welch_p(values, others) == pytest.approx(expected)


def test_equal_units_are_no_test_and_count_as_none() -> None:
    for test in (paired_p, welch_p):
        assert math.isnan(test([0.1] * 5, [0.1] * 5))
        # Equal but for rounding.
        assert math.isnan(test([0.1 + 0.2] * 5, [0.3] * 5))
        assert math.isnan(test([1.0], [0.0]))
    varied = [0.1, 0.4, 0.3]
    assert math.isnan(paired_p(varied, varied))
    assert math.isnan(paired_p(varied, [x * (1 + 1e-15) for x in varied]))
    assert holm([0.02, math.nan, math.nan]) == pytest.approx(
        [0.02, math.nan, math.nan], nan_ok=True
    )


@pytest.mark.parametrize("n", [2, 5, 30])
def test_gaps_that_do_not_vary_are_the_more_evidence_the_more_there_are(n: int) -> None:
    a = np.linspace(0.3, 0.6, n).tolist()
    # The sign test; rounding parts the gaps by a hair, of which a t test would make a certainty.
    assert paired_p([x + 0.1 for x in a], a) == pytest.approx(stats.binomtest(n, n).pvalue)
    # All deals of the units to two sides, those that part them as far.
    ways = math.comb(2 * n, n)
    assert welch_p([0.3] * n, [0.7] * n) == pytest.approx(2 / ways)
    assert welch_p([0.3] * n, [0.7] * (n + 1)) == pytest.approx(1 / math.comb(2 * n + 1, n))


def test_two_equal_gaps_are_no_evidence() -> None:
    assert paired_p([0.5, 0.75], [0.25, 0.5]) == 0.5


def test_a_side_that_does_not_vary_is_no_warning() -> None:
    # Warnings are errors here; scipy's own function warns of these.
    varied = [0.1, 0.4, 0.3, 0.2]
    assert 0 < welch_p([0.3] * 4, varied) < 1
    assert 0 < paired_p([0.3] * 4, varied) < 1
    tiny = [1 + 1e-13, 1 - 2e-13, 1 + 3e-13]
    assert math.isnan(paired_p(tiny, [1.0, 1.0, 1.0]))


@given(st.lists(st.one_of(st.just(math.nan), st.floats(0, 1)), max_size=8))
def test_rows_are_corrected_over_all_of_them(p_values: list[float]) -> None:
    rows = [{"p": p, "name": i} for i, p in enumerate(p_values)]
    found = holm_rows(rows, to="q")
    assert [row["q"] for row in found] == pytest.approx(holm(p_values), nan_ok=True)
    assert [row["name"] for row in found] == list(range(len(rows)))
    assert all("q" not in row for row in rows)
