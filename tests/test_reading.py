"""Probes that read logits read them together, and none can tell."""

import dataclasses

import pytest
import torch
from streams_for_tests import D_VOCAB, N_LAYERS, Streams

from hyperlens.errors import ProbeError
from hyperlens.passes.logits_reader import ReadsLogits, read_logits
from hyperlens.probes import LogitLens, LogitProbe, RankReordering, logit_lens


class Margin(LogitProbe):
    """A user's own: how far the winner is ahead."""

    name = "margin"
    metrics = ("base_margin", "tuned_margin", "final_is_winner")

    def read(self, chunk):
        base, tuned = (x.topk(2).values for x in (chunk.base, chunk.tuned))
        return {
            "base_margin": (base[:, 0] - base[:, 1]).double(),
            "tuned_margin": (tuned[:, 0] - tuned[:, 1]).double(),
            "final_is_winner": (chunk.tuned.argmax(-1) == chunk.final).double(),
        }


class Spoiling(Margin):
    """The same, leaving rubbish behind."""

    overwrites = True

    def read(self, chunk):
        found = super().read(chunk)
        chunk.base.fill_(torch.nan)
        chunk.tuned.fill_(torch.nan)
        return found


READERS = {
    "the two of the package": [LogitLens, RankReordering],
    "in the other order": [RankReordering, LogitLens],
    "with one that overwrites": [Spoiling, LogitLens, Margin, RankReordering],
    "below the output": [lambda: LogitLens(layers=[1]), lambda: Margin(layers=[0, 1])],
    "at different layers": [lambda: Spoiling(layers=[0]), LogitLens, lambda: Margin(layers=[2])],
}


@pytest.fixture(scope="module")
def streams():
    return Streams()


@pytest.mark.parametrize("makers", READERS.values(), ids=READERS.keys())
def test_read_together_as_read_alone(streams, makers):
    together = [make() for make in makers]
    for probe in together:
        probe.open(streams.spec())
    for start in range(0, 11, 4):
        read_logits(streams.pair(range(start, min(start + 4, 11))), together)
    for probe, make in zip(together, makers, strict=True):
        alone = streams.run(make())
        assert all(torch.equal(probe.sums[name], alone.sums[name]) for name in alone.sums)


@pytest.mark.parametrize("entries", [1, 3 * D_VOCAB, 7 * D_VOCAB + 1])
def test_blocks_of_a_chunk_are_invisible(streams, monkeypatch, entries):
    whole = streams.run(LogitLens()).sums
    monkeypatch.setattr(logit_lens, "CACHED_LOGITS", entries)
    for name, values in streams.run(LogitLens()).sums.items():
        torch.testing.assert_close(values, whole[name], rtol=1e-6, atol=1e-6)


def test_every_chunk_is_made_once(streams):
    rows = []

    def counted(x):
        rows.append(len(x))
        return x @ streams.unembedding.T

    pair = streams.pair(range(4))
    pair = dataclasses.replace(
        pair,
        base=dataclasses.replace(pair.base, unembed=counted),
        tuned=dataclasses.replace(pair.tuned, unembed=counted),
    )
    probes = [LogitLens(), RankReordering(), Margin()]
    for probe in probes:
        probe.open(streams.spec())
    read_logits(pair, probes)
    decisions = int(pair.mask(0, "decisions").sum())
    assert sum(rows) == 2 * (N_LAYERS + 1) * decisions


def test_final_is_what_the_tuned_model_decides(streams):
    values = {
        row.layer: row.value
        for row in streams.run(Margin()).compute().rows
        if row.metric == "final_is_winner"
    }
    assert values[N_LAYERS] == 1
    assert values[0] < 1


def test_a_batch_without_a_decision_adds_nothing(streams):
    pair = streams.pair(range(2))
    nothing = dataclasses.replace(pair, bos=pair.real)
    probe = LogitLens()
    probe.open(streams.spec())
    read_logits(nothing, [probe])
    assert not any(value.any() for value in probe.sums.values())


def test_a_reader_that_fails_is_named(streams):
    class Broken(Margin):
        name = "broken"

        def read(self, chunk):
            return {"base_margin": chunk.base[:, D_VOCAB]}

    with pytest.raises(ProbeError, match="probe 'broken' failed in read: IndexError"):
        streams.run(Broken())


def test_only_readers_of_logits_are_read_to():
    assert isinstance(LogitLens(), ReadsLogits)
    assert not isinstance(Streams(), ReadsLogits)
