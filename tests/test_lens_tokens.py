"""The logit lens at a sample of each text's tokens: what it estimates, and how surely."""

import dataclasses
import functools
import math

import numpy as np
import pytest
import torch
from conftest import make_tiny, perturbed, token_texts, trials
from streams_for_tests import D_VOCAB, N_LAYERS, Streams

from hyperlens import compare_models
from hyperlens.cli import build_parser
from hyperlens.data.corpus import build_corpus
from hyperlens.passes.logits_reader import read_logits
from hyperlens.probes import LogitLens, LogitProbe, RankReordering

MEANS = ("top1_agreement", "kl", "base_entropy", "tuned_entropy")


@functools.cache
def corpus_of(lengths):
    """One text of each length, BOS included, and where each is in the corpus."""
    rng = np.random.default_rng(0)
    ids = [np.array([1, *rng.integers(2, 99, n - 1)]) for n in lengths]
    # Texts of a single token besides BOS would be left out.
    corpus = dataclasses.replace(build_corpus(ids, None, max_length=64), bos_id=1)
    order = [one.tobytes() for one in corpus.sequences]
    return corpus, [order.index(one.tobytes()) for one in ids]


def drawn(streams, n, seed):
    """A batch of all sequences whose lens reads n tokens of each, as a corpus draws them."""
    pair = streams.pair(streams.everything)
    corpus, rows = corpus_of(tuple(streams.lengths.tolist()))
    (batch,) = corpus.batches(len(rows), lens_tokens=n, seed=seed)
    return dataclasses.replace(pair, lens=batch.lens[rows])


@pytest.fixture(scope="module")
def pair():
    base = make_tiny("llama")
    return base, perturbed(base)


def table(comparison):
    return {row[:4]: row[4:] for row in comparison.long}


def test_all_else_is_measured_at_every_token(pair):
    """And where the sample is all there is, it is the lens itself."""
    texts = token_texts()
    whole = compare_models(*pair, texts, progress=False)
    same = compare_models(*pair, texts, lens_tokens=1000, progress=False)
    np.testing.assert_array_equal(list(table(same).values()), list(table(whole).values()))
    assert not any("lens_tokens" in note for note in same.meta["notes"])
    some = compare_models(*pair, texts, lens_tokens=4, progress=False)
    n_read = sum(min(4, len(ids) - 1) for ids in texts)
    last = some.n_layers
    for key, numbers in table(some).items():
        probe, metric, layer, _ = key
        if probe == "logit_lens" and layer < last:
            assert numbers[-1] == n_read
            assert numbers[0] != table(whole)[key][0] or metric == "median_base_rank"
        else:
            np.testing.assert_array_equal(numbers, table(whole)[key])
    assert some.meta["options"]["lens_tokens"] == 4
    n = whole.at("logit_lens", "kl", last, "final_norm").n
    assert any(f"read {n_read:,} of {n:,} tokens" in note for note in some.meta["notes"])


def test_over_many_samples_the_estimate_is_the_whole():
    """Texts are of unequal length: a plain mean of the tokens read would favour short ones."""
    streams = Streams()
    truth = {
        (row.metric, row.layer): row.value
        for row in streams.run(LogitLens()).compute().rows
        if row.metric in MEANS and row.layer < N_LAYERS
    }
    found = {key: [] for key in truth}
    for seed in trials(150):
        probe = LogitLens()
        probe.open(streams.spec())
        read_logits(drawn(streams, 2, seed), [probe])
        for row in probe.compute().rows:
            if (row.metric, row.layer) in found:
                found[row.metric, row.layer].append(row.value)
    for key, values in found.items():
        error = np.std(values) / math.sqrt(len(values))
        assert abs(np.mean(values) - truth[key]) < 4 * error, key


def test_the_sums_stand_for_every_token():
    """Whatever the batches; only the tokens that are drawn are read below the output."""
    streams, rows = Streams(), []

    def counted(x):
        rows.append(len(x))
        return x @ streams.unembedding.T

    pair = drawn(streams, 2, 0)
    both = {
        name: dataclasses.replace(getattr(pair, name), unembed=counted)
        for name in ("base", "tuned")
    }
    lens, ranks = LogitLens(), RankReordering()
    for probe in (lens, ranks):
        probe.open(streams.spec())
    read_logits(dataclasses.replace(pair, **both), [lens, ranks])
    decisions, read = int(pair.mask(0, "decisions").sum()), int(pair.lens.sum())
    assert read < decisions
    assert sum(rows) == 2 * (decisions + N_LAYERS * read)
    assert lens.sums["read"].tolist() == [read] * N_LAYERS + [decisions]
    assert lens.sums["n"].tolist() == [decisions] * (N_LAYERS + 1)
    assert lens.sums["rank_counts"].sum(-1).tolist() == pytest.approx(lens.sums["n"].tolist())
    # Counts of ranks, from what each token that is read says and stands for.
    each = streams.pair(streams.everything)
    scale = pair.mask(0, "decisions").sum(-1) / pair.lens.sum(-1).clamp_min(1)
    expected = torch.zeros(D_VOCAB, dtype=torch.float64)
    logits = each.base.residuals[0] * streams.gain @ streams.unembedding.T
    final = (each.tuned.residuals[-1] * streams.gain @ streams.unembedding.T).argmax(-1)
    for i, j in pair.lens.nonzero().tolist():
        rank = int((logits[i, j] > logits[i, j, final[i, j]]).sum())
        expected[rank] += float(scale[i])
    torch.testing.assert_close(lens.sums["rank_counts"][0], expected)
    batched = LogitLens()
    batched.open(streams.spec())
    for start in range(0, 11, 4):
        part = streams.pair(range(start, min(start + 4, 11)))
        of_part = pair.lens[start : start + 4, : part.real.shape[1]]
        read_logits(dataclasses.replace(part, lens=of_part), [batched])
    for name, value in lens.sums.items():
        torch.testing.assert_close(batched.sums[name], value, rtol=1e-5, atol=1e-5)


class Given(LogitProbe):
    """The mean of numbers that are given to it."""

    name = "given"
    metrics = ("x",)
    samples = True

    def read(self, chunk):
        raise NotImplementedError


def test_intervals_include_the_sampling():
    """Of texts that differ, and of tokens within them that differ more."""
    streams, rng = Streams(n_sequences=24), np.random.default_rng(0)
    covered, n_trials, wider = 0, 300, []
    for seed in trials(n_trials):
        pair = drawn(streams, 1, seed)
        of_texts = rng.normal(size=(24, 1))
        values = torch.from_numpy(of_texts + 2 * rng.normal(size=pair.real.shape))
        rows = []
        for lens in (pair.lens, None):
            probe = Given(layers=[0])
            probe.open(streams.spec())
            read = pair.mask(0, "decisions") if lens is None else lens
            probe.finish(dataclasses.replace(pair, lens=lens), 0, {"x": values[read]})
            rows.append(probe.compute().rows[0])
        covered += rows[0].low <= 0 <= rows[0].high
        wider.append((rows[0].high - rows[0].low) / (rows[1].high - rows[1].low))
    assert 0.915 <= covered / n_trials <= 0.985
    assert np.mean(wider) > 1.3


def test_a_number_or_a_share_on_the_command_line():
    def parsed(text):
        words = ["compare", "base", "tuned", "--texts", "t.txt", "--lens-tokens", text]
        return build_parser().parse_args(words).lens_tokens

    assert (parsed("32"), parsed("0.25")) == (32, 0.25)
    assert isinstance(parsed("32"), int)
    corpus, _ = corpus_of((4, 9, 2))
    assert corpus.n_read_by_lens(1.0) == (12, 12)
    assert corpus.n_read_by_lens(0.25) == (1 + 2 + 1, 12)
