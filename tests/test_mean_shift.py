"""The mean shift against sums over all pairs of tokens, and on streams of which it is known."""

import math

import pytest
import torch
from conftest import trials
from streams_for_tests import N_LAYERS, Streams

from hyperlens.probes import MeanShift


def rows_of(streams, **options):
    rows = streams.run(MeanShift(**options)).compute().rows
    return {(row.metric, row.layer): row for row in rows}


def test_it_is_the_mean_over_all_pairs_of_tokens_of_different_texts():
    streams = Streams()
    found = rows_of(streams)
    for layer in range(N_LAYERS + 1):
        moves, texts, sizes = [], [], []
        for i, (base, tuned) in enumerate(zip(streams.base, streams.tuned, strict=True)):
            for token in range(1, len(base[layer])):  # without BOS, and without the sink
                if (i, token, layer) != (streams.sink, 1, 1):
                    moves.append((tuned[layer, token] - base[layer, token]).double())
                    sizes.append(float(base[layer, token].double().square().sum()))
                    texts.append(i)
        products = [
            float(moves[a] @ moves[b])
            for a in range(len(moves))
            for b in range(len(moves))
            if texts[a] != texts[b]
        ]
        of_mean = sum(products) / len(products)
        share = of_mean / (sum(float(m @ m) for m in moves) / len(moves))
        assert found["share", layer].value == pytest.approx(share, abs=1e-6)
        length = math.copysign(math.sqrt(abs(of_mean)), of_mean)
        relative = length / math.sqrt(sum(sizes) / len(sizes))
        assert found["relative_l2", layer].value == pytest.approx(relative, abs=1e-6)
        assert found["share", layer].n == len(moves)


def shifted(n_texts, seed, by, noise):
    """Streams that tuning moves by one vector, by noise of every token, and by noise of a text."""
    streams = Streams(n_texts, seed, same=True)
    generator = torch.Generator().manual_seed(seed)
    tuned = []
    for base in streams.base:
        own = torch.randn(len(base), 1, base.shape[-1], generator=generator)
        each = torch.randn(base.shape, generator=generator)
        tuned.append(base + by + noise * (own + each))
    streams.tuned = tuned
    return streams


def test_a_shift_of_all_tokens_is_all_of_the_change():
    by = torch.tensor([1.0, 0.0, -2.0, 0.0, 0.0, 0.0])
    found = rows_of(shifted(20, 0, by, 0.0))
    for layer in range(N_LAYERS + 1):
        row = found["share", layer]
        assert row.value == pytest.approx(1.0, abs=1e-6)
        assert row.high - row.low < 1e-5


def test_intervals_hold_the_truth():
    """Share of |by|² / (|by|² + 2 d noise²); of no shift, 0, whatever texts' tokens have alike."""
    hits = {True: 0, False: 0}
    for seed in trials(40):
        for has_shift in hits:
            by = torch.full((6,), 0.5) if has_shift else torch.zeros(6)
            truth = 1.5 / (1.5 + 2 * 6 * 0.25) if has_shift else 0.0
            row = rows_of(shifted(40, seed, by, 0.5), layers=[0])["share", 0]
            hits[has_shift] += row.low <= truth <= row.high
    assert all(n >= 33 for n in hits.values()), hits  # fewer in 1 of 1,000 at 95%


def test_no_interval_of_a_share_goes_beyond_1():
    bounded = 0
    for seed in range(10):
        streams = Streams(5, seed, same=True)
        scale = torch.rand(5, generator=torch.Generator().manual_seed(seed))
        streams.tuned = [x + 0.3 + one for x, one in zip(streams.base, scale, strict=True)]
        row = rows_of(streams, layers=[0])["share", 0]
        assert row.low <= row.value <= row.high <= max(row.value, 1.0)
        bounded += row.high == 1.0
    assert bounded
