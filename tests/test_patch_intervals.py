"""Do the intervals of patching cover? Simulated decisions, clustered in texts of unequal length."""

import itertools
import math

import numpy as np
import pytest
import torch
from conftest import trials
from hypothesis import given
from hypothesis import strategies as st

from hyperlens.patching.outcomes import Outcome, combination
from hyperlens.statistics.shares import p_value, ratio, widened

TRIALS = 2000
# Two standard errors of a share of TRIALS trials: what luck alone may add to 93 to 97%.
LUCK = 2 * math.sqrt(0.95 * 0.05 / TRIALS)


def lengths(rng, n_texts, unequal):
    """How many changed decisions each text has."""
    if unequal == "even":
        return rng.integers(10, 60, n_texts)
    return 1 + rng.geometric(1 / 20, n_texts)


def decided(rng, n, shares, resemblance):
    """Of every text, how many decisions fall into each class; classes resemble within a text.

    `resemblance` is the intraclass correlation: of a Dirichlet-multinomial with these shares.
    """
    weights = rng.gamma(np.asarray(shares) * (1 / resemblance - 1), size=(len(n), len(shares)))
    own = weights / weights.sum(-1, keepdims=True)
    return rng.multinomial(n, own).astype(float)


def outcome(y, n):
    count = torch.from_numpy(n.astype(float))
    return Outcome(sums={"to_tuned": torch.from_numpy(y)}, decisions=count, changed=count)


def coverage(n_texts, unequal, both, only_one, only_other, resemblance):
    """Share of trials whose intervals hold the truth: of one patch's share, of a difference."""
    rng = np.random.default_rng(0)
    shares = (both, only_one, only_other, 1 - both - only_one - only_other)
    inside = {"share": 0, "difference": 0, "p above 0.05": 0}
    for _ in trials(TRIALS):
        n = lengths(rng, n_texts, unequal)
        counts = decided(rng, n, shares, resemblance)
        one, other = (outcome(counts[:, 0] + counts[:, i], n) for i in (1, 2))
        found, gap = one.estimate("to_tuned"), one.difference(other, "to_tuned")
        inside["share"] += found.low <= both + only_one <= found.high
        inside["difference"] += gap.low <= only_one - only_other <= gap.high
        inside["p above 0.05"] += (p_value(gap) > 0.05) == (gap.low < 0 < gap.high)
    return {what: count / TRIALS for what, count in inside.items()}


# Each share of decisions once, with all pairs of the other two; the rest is the long form.
SHARES = {
    "a part": (0.3, 0.2, 0.1, 0.1),
    "no difference": (0.1, 0.05, 0.05, 0.05),
    "nearly all": (0.6, 0.3, 0.05, 0.05),
    "rare": (0.02, 0.08, 0.01, 0.03),
}
FEW = {
    ("a part", 20, "a few long ones"),
    ("no difference", 60, "even"),
    ("nearly all", 20, "even"),
    ("rare", 60, "a few long ones"),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shares", "n_texts", "unequal"),
    [
        pytest.param(*case, marks=() if case in FEW else pytest.mark.long)
        for case in itertools.product(SHARES, (20, 60), ("even", "a few long ones"))
    ],
)
def test_intervals_cover(shares, n_texts, unequal):
    found = coverage(n_texts, unequal, *SHARES[shares])
    assert found.pop("p above 0.05") == 1
    for what, share in found.items():
        assert 0.93 - LUCK <= share <= 0.97 + LUCK, (what, share)


@pytest.mark.slow
def test_where_they_cover_less():
    """Rare decisions that resemble each other much, and few long texts: said in the docstring."""
    found = coverage(20, "a few long ones", 0.01, 0.1, 0.005, 0.1)
    assert 0.90 <= found["difference"] <= 0.94
    assert 0.93 - LUCK <= found["share"] <= 0.97 + LUCK


def test_a_mean_with_normal_texts_covers():
    """Texts of one length: nothing but Student's t is left."""
    rng = np.random.default_rng(1)
    n = torch.full((20,), 30.0)
    inside = 0
    for _ in trials(TRIALS):
        found = ratio(torch.from_numpy(rng.normal(6.0, 4.0, 20)), n)
        inside += found.low <= 0.2 <= found.high
    assert 0.93 <= inside / TRIALS <= 0.97


positive = st.lists(st.integers(1, 40), min_size=3, max_size=12)


@given(positive, st.integers(0, 2**32 - 1))
def test_the_spread_is_that_of_leaving_each_text_out(n, seed):
    n = np.array(n, dtype=float)
    y = np.random.default_rng(seed).normal(size=len(n)) * n
    found = ratio(torch.from_numpy(y), torch.from_numpy(n))
    without = np.array([(y.sum() - a) / (n.sum() - b) for a, b in zip(y, n, strict=True)])
    value = y.sum() / n.sum()
    k = len(n)
    expected = math.sqrt((k - 1) / k * ((without - value) ** 2).sum())
    assert found.value == pytest.approx(value)
    assert found.se == pytest.approx(expected, rel=1e-6)


def test_equal_texts_have_the_usual_interval():
    from scipy.stats import t, ttest_1samp

    rng = np.random.default_rng(2)
    n = torch.full((12,), 5.0)
    y = torch.from_numpy(rng.normal(0.5, 1, 12))
    found = ratio(y, n)
    usual = ttest_1samp(y / 5, 0)
    assert found.se == pytest.approx(float((y / 5).std() / math.sqrt(12)))
    half = found.high - found.value
    assert half >= t.ppf(0.975, 11) * found.se * (1 - 1e-9)
    assert p_value(found) >= usual.pvalue - 1e-9


def test_several_tests_need_wider_intervals():
    rng = np.random.default_rng(3)
    n = torch.from_numpy(rng.integers(5, 50, 20).astype(float))
    found = ratio(torch.from_numpy(rng.normal(1, 1, 20)) * n, n)
    assert widened(found, 1) == found
    widths = [widened(found, k).high - widened(found, k).low for k in (1, 2, 3, 6)]
    assert widths == sorted(widths)
    assert widths[0] < widths[1]
    # Bonferroni: an interval for k tests is beside 0 where k p is below 0.05.
    moved = ratio(torch.from_numpy(rng.normal(0.25, 0.5, 20)) * n, n)
    for k in (2, 3, 5, 8):
        wide = widened(moved, k)
        assert (wide.low > 0 or wide.high < 0) == (k * p_value(moved) < 0.05)


def test_nothing_to_say():
    zeros, n = torch.zeros(4).double(), torch.tensor([3.0, 0.0, 2.0, 5.0]).double()
    assert ratio(zeros, n)[:4] == (0, 0, 0, 0)
    assert math.isnan(ratio(zeros, zeros).value)
    one = ratio(n[:2], n[:2])
    assert one.value == 1
    assert math.isnan(one.low)
    assert math.isnan(p_value(one))
    assert p_value(ratio(zeros, n)) == 1


def test_what_all_texts_have_in_common_is_not_certain():
    """Three texts with 3, 2 and 5 decisions are worth 100 / 38 of equal length."""
    n = torch.tensor([3.0, 2.0, 5.0]).double()
    otherwise = 1 - 0.05 ** (38 / 100)
    without_bounds = ratio(0.1 * n, n)
    assert without_bounds.se == 0
    assert math.isnan(without_bounds.low)
    assert p_value(without_bounds) == 0.25
    for value in (0.0, 0.5, 1.0):
        found = ratio(value * n, n, within=(0.0, 1.0))
        assert found.low == pytest.approx(value - otherwise * value)
        assert found.high == pytest.approx(value + otherwise * (1 - value))
    gap = ratio(n, n, within=(-1.0, 1.0))
    assert gap.low == pytest.approx(1 - 2 * otherwise)
    wide = widened(gap, 3, (-1.0, 1.0))
    assert wide.low == pytest.approx(1 - 2 * (1 - (0.05 / 3) ** (38 / 100)))
    assert wide.high == 1


@pytest.mark.parametrize("n_texts", [2, 5, 10, 40])
def test_the_bound_where_no_text_shows_it_is_exact(n_texts):
    n = torch.ones(n_texts)
    high = ratio(torch.zeros(n_texts), n, within=(0.0, 1.0)).high
    # Were the share at the bound, no text would show it in 5% of draws.
    assert (1 - high) ** n_texts == pytest.approx(0.05)


def test_shares_stay_shares_and_differences_are_paired():
    n = torch.tensor([10.0, 30.0, 20.0, 12.0]).double()
    one = Outcome({"to_tuned": torch.tensor([9.0, 30.0, 20.0, 12.0]).double()}, n, n)
    other = Outcome({"to_tuned": one.sums["to_tuned"] - 0.5 * n}, n, n)
    found = one.estimate("to_tuned")
    assert 0 < found.low < found.value < found.high < 1
    # Each text loses half of its decisions: no spread, but only 3.3 effective texts.
    gap = one.difference(other, "to_tuned")
    assert (gap.value, gap.se) == (0.5, 0)
    assert -0.5 < gap.low < 0.5 < gap.high < 1
    both = combination([(1.0, one), (-1.0, other)], "to_tuned")
    assert both == gap
