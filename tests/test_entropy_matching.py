"""Entropy matching against scipy's root finder, and on the rows that break root finders."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import brentq

from hyperlens.decoding.entropy_matching import (
    MATCHED,
    EntropyMatched,
    entropy_at,
    match_entropy,
    match_mean_entropy,
    scaled,
    tied_maxima,
)
from hyperlens.errors import ProbeError

NONE = -math.inf


def reference_entropy(row, log_temperature: float) -> float:
    """Slow and obvious: over the unmasked logits of one row."""
    row = np.asarray(row, dtype=np.float64)
    row = row[np.isfinite(row)]
    x = (row - row.max()) / math.exp(log_temperature)
    p = np.exp(x) / np.exp(x).sum()
    p = p[p > 0]
    return float(-(p * np.log(p)).sum())


def match(rows, targets):
    return match_entropy(
        torch.tensor(rows, dtype=torch.float64), torch.tensor(targets, dtype=torch.float64)
    )


# Gaps that the reference formula can divide; `test_any_logits_of_float64` has all others.
logit = st.floats(-50, 50).map(lambda z: round(z, 9)) | st.sampled_from(
    [0.0, 1.0, 1.0 + 1e-9, 30.0, NONE]
)
row_and_share = st.tuples(
    st.lists(logit, min_size=2, max_size=12).filter(lambda row: max(row) > NONE),
    st.floats(0.001, 0.999),
)


@given(row_and_share)
def test_agrees_with_brentq(case) -> None:
    row, share = case
    kept = [z for z in row if z > NONE]
    lowest, highest = math.log(kept.count(max(kept))), math.log(len(kept))
    target = lowest + share * (highest - lowest)
    found = match([row], [target])
    assert found.lowest.item() == pytest.approx(lowest)
    assert found.highest.item() == pytest.approx(highest)
    assert found.reached.item()
    assert abs(found.entropy.item() - target) < MATCHED
    if highest == lowest:
        return
    # What counts is the entropy that an independent formula sees at this temperature ...
    assert reference_entropy(row, found.log_temperature.item()) == pytest.approx(target, abs=1e-7)
    # ... and where the curve is steep enough to have one, the very same root.
    root = brentq(lambda u: reference_entropy(row, u) - target, -60, 60, xtol=1e-13)
    slope = (reference_entropy(row, root + 1e-4) - reference_entropy(row, root - 1e-4)) / 2e-4
    if slope > 1e-3:
        assert found.log_temperature.item() == pytest.approx(root, abs=1e-5)


@given(
    st.integers(1, 30).flatmap(
        lambda d: st.lists(
            st.lists(logit, min_size=d, max_size=d).filter(lambda row: max(row) > NONE),
            min_size=1,
            max_size=8,
        )
    ),
    st.floats(0, 4),
)
def test_rows_do_not_see_each_other(rows, target: float) -> None:
    together = match(rows, [target] * len(rows))
    for i, row in enumerate(rows):
        alone = match([row], [target])
        assert alone.log_temperature[0] == together.log_temperature[i]
        assert alone.reached[0] == together.reached[i]


any_float64 = st.floats(allow_nan=False, allow_infinity=False) | st.just(NONE)


@given(
    st.lists(any_float64, min_size=2, max_size=8).filter(lambda row: max(row) > NONE),
    st.floats(0, 1),
)
def test_any_logits_of_float64(row, share: float) -> None:
    kept = [z for z in row if z > NONE]
    lowest, highest = math.log(kept.count(max(kept))), math.log(len(kept))
    target = lowest + share * (highest - lowest)
    found = match([row], [target])
    assert found.reached.item()
    again = entropy_at(torch.tensor([row], dtype=torch.float64), found.log_temperature)
    assert abs(again.item() - target) < MATCHED
    # The scaled logits have it too, in floats that any softmax can read.
    z = scaled(torch.tensor([row], dtype=torch.float64), found.log_temperature)
    assert not z.isnan().any()
    p = z.softmax(-1)
    assert abs(torch.special.entr(p).sum().item() - target) < MATCHED


@pytest.mark.parametrize(
    ("row", "reachable", "out_of_reach"),
    [
        ([2.0, 2.0, 2.0, 2.0], math.log(4), 1.0),  # flat: temperature changes nothing
        ([0.0, NONE, NONE, NONE], 0.0, 0.1),  # one token left
        ([3.0, 3.0, 0.0, -1.0], math.log(2), 0.5),  # ties: never below log 2
        ([3.0, 1.0, 0.0, NONE], math.log(3), 1.2),  # masked: never above log 3
        ([0.0, -1e9, -2e9, -3e9], 0.0, 1.5),  # one-hot, and beyond log 4
        ([1e308, -1e308, 0.0, 5.0], 0.3, 1.4),  # a span that is no float
        ([0.0, -5e-324, -1.0, -1e308], 0.4, -0.1),  # a temperature that is no float
    ],
)
def test_flat_one_hot_tied_masked(row, reachable: float, out_of_reach: float) -> None:
    found = match([row, row], [reachable, out_of_reach])
    assert found.reached.tolist() == [True, False]
    assert abs(found.entropy[0].item() - reachable) < MATCHED
    # Out of reach, the nearest end is taken.
    end = found.lowest[1] if out_of_reach < found.lowest[1] else found.highest[1]
    assert found.entropy[1].item() == pytest.approx(end.item(), abs=1e-6)


def test_a_known_temperature_is_found() -> None:
    z = 4 * torch.randn(50, 200, generator=torch.Generator().manual_seed(0)).double()
    # Not colder: a row with no entropy left looks the same at many temperatures.
    temperatures = torch.linspace(0.5, 5.0, 50).double()
    target = torch.special.entr((z / temperatures[:, None]).softmax(-1)).sum(-1)
    assert match_entropy(z, target).temperature == pytest.approx(temperatures, rel=1e-6)


def test_float32_and_bfloat16_logits_are_read_as_they_are() -> None:
    z = torch.randn(9, 60, generator=torch.Generator().manual_seed(1))
    target = torch.full((9,), 2.0, dtype=torch.float64)
    for dtype in (torch.float32, torch.bfloat16):
        found = match_entropy(z.to(dtype), target)
        exact = match_entropy(z.to(dtype).double(), target)
        assert torch.equal(found.log_temperature, exact.log_temperature)


def pieces(z, weights, size: int):
    return lambda: zip(z.split(size), weights.split(size), strict=True)


@given(st.integers(0, 10_000), st.integers(1, 12), st.floats(0.02, 0.98))
def test_one_temperature_for_all_rows(seed: int, size: int, share: float) -> None:
    rng = torch.Generator().manual_seed(seed)
    z = torch.randn(9, 7, generator=rng, dtype=torch.float64) * 5
    z[0, 1] = z[0].max()
    z[2, 3:] = NONE
    weights = torch.rand(9, generator=rng, dtype=torch.float64)
    weights /= weights.sum()

    def mean(u: float) -> float:
        return sum(
            w * reference_entropy(row, u) for row, w in zip(z, weights.tolist(), strict=True)
        )

    target = mean(-40) + share * (mean(40) - mean(-40))
    found = match_mean_entropy(pieces(z, weights, size), target)
    assert found.reached.item()
    assert mean(found.log_temperature.item()) == pytest.approx(target, abs=1e-7)
    root = brentq(lambda u: mean(u) - target, -60, 60, xtol=1e-13)
    assert found.log_temperature.item() == pytest.approx(root, abs=1e-4)
    beyond = match_mean_entropy(pieces(z, weights, size), mean(40) + 0.1)
    assert not beyond.reached.item()
    assert beyond.entropy.item() == pytest.approx(beyond.highest.item(), abs=1e-6)


@pytest.mark.parametrize("row", [[math.nan, 0.0], [math.inf, 0.0], [NONE, NONE]])
def test_what_is_no_distribution_is_refused(row) -> None:
    with pytest.raises(ProbeError, match="unmasked"):
        match([[0.0, 1.0], row], [0.5, 0.5])


def test_tied_maxima_are_counted() -> None:
    z = torch.tensor([[1.0, 1.0, 0.0], [2.0, 1.0, 2.0], [0.0, 0.0, 0.0], [1.0, 2.0, 3.0]])
    assert tied_maxima(z).tolist() == [2, 2, 3, 1]


def test_the_processor_gives_every_row_the_target() -> None:
    scores = torch.randn(4, 50, generator=torch.Generator().manual_seed(3)) * 6
    scores[1, 10:] = NONE  # another processor has masked
    out = EntropyMatched(1.5)(torch.zeros(4, 3, dtype=torch.long), scores)
    assert out.dtype == scores.dtype
    entropies = torch.special.entr(out.double().softmax(-1)).sum(-1)
    assert (entropies - 1.5).abs().max() < MATCHED
    orders = [x.sort(dim=-1, stable=True).indices for x in (out, scores)]
    assert torch.equal(*orders)
    assert torch.equal(out.isinf(), scores.isinf())


@pytest.mark.parametrize("target", [-0.1, math.nan, math.inf])
def test_the_processor_refuses_what_is_no_entropy(target: float) -> None:
    with pytest.raises(ProbeError, match="0 nats or more"):
        EntropyMatched(target)
