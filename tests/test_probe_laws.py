"""The laws every probe must keep; a new probe is held to them by being registered here."""

import copy
import math
import pickle

import pytest
import torch
from streams_for_tests import Streams

from hyperlens.errors import ProbeError
from hyperlens.probes import (
    LinearCKA,
    LogitLens,
    LogitProbe,
    MeanProbe,
    MeanShift,
    OutputByPosition,
    ParticipationRatio,
    Procrustes,
    RankReordering,
    ResidualDrift,
    default_probes,
)
from hyperlens.probes.rank_reordering import rank_bins


class NormRatio(MeanProbe):
    """A user's own probe."""

    name = "norm_ratio"
    metrics = ("ratio",)

    def measure(self, pair, layer, view):
        base, tuned = pair.vectors(layer, view, self.token_set)
        return {"ratio": (tuned.norm(dim=-1) / base.norm(dim=-1)).double()}


class LogitSpread(LogitProbe):
    """A user's own probe of logits."""

    name = "logit_spread"
    metrics = ("spread",)

    def read(self, chunk):
        return {"spread": (chunk.tuned.std(-1) - chunk.base.std(-1)).double()}


REGISTERED = {
    "drift": ResidualDrift,
    "drift of one layer, all tokens": lambda: ResidualDrift(layers=[-1], token_set="all"),
    "participation ratio": ParticipationRatio,
    "participation ratio, one view": lambda: ParticipationRatio(
        views=["final_norm"], layers=[0, 2]
    ),
    "mean shift": lambda: MeanShift(views=["raw", "final_norm"]),
    "linear CKA": lambda: LinearCKA(views=["raw", "final_norm"]),
    "Procrustes angle": lambda: Procrustes(layers=[0, 2]),
    "logit lens": LogitLens,
    "logit lens below the output": lambda: LogitLens(layers=[1]),
    "rank reordering": RankReordering,
    "drift with what is left out": lambda: ResidualDrift(with_excluded=True),
    "participation ratio with what is left out": lambda: ParticipationRatio(with_excluded=True),
    "output along a text": lambda: OutputByPosition(3),
    "a user's own": NormRatio,
    "a user's own, of logits": LogitSpread,
}


@pytest.fixture(params=REGISTERED.values(), ids=REGISTERED.keys())
def make(request):
    return request.param


@pytest.fixture(scope="module")
def streams():
    return Streams()


def same(a, b, tolerance=1e-9):
    """Equal tables, NaN equal to NaN, numbers within a relative tolerance."""
    assert len(a.rows) == len(b.rows)
    assert len(a.rows) > 0
    for x, y in zip(a.rows, b.rows, strict=True):
        assert x[:4] == y[:4]
        assert x.n == y.n
        for p, q in zip(x[4:7], y[4:7], strict=True):
            assert p == pytest.approx(q, rel=tolerance, abs=tolerance, nan_ok=True), (x, y)
    assert a.extras == b.extras


def test_every_default_probe_is_registered():
    registered = {type(factory()) for factory in REGISTERED.values()}
    assert {type(probe) for probe in default_probes()} <= registered


@pytest.mark.parametrize("batch_size", [1, 3, 11])
def test_batching_is_invisible(make, streams, batch_size):
    # float32 products are summed in another order; the sums themselves are float64
    same(
        streams.run(make(), batch_size=4).compute(),
        streams.run(make(), batch_size=batch_size).compute(),
        2e-6,
    )


@pytest.mark.parametrize(("side", "extra"), [("left", 0), ("right", 3), ("left", 2)])
def test_padding_is_invisible(make, streams, side, extra):
    same(streams.run(make()).compute(), streams.run(make(), side=side, extra=extra).compute())


def test_order_is_invisible(make, streams):
    backwards = list(reversed(streams.everything))
    same(streams.run(make()).compute(), streams.run(make(), backwards).compute(), 1e-6)


def test_merging_is_seeing_more(make, streams):
    merged = streams.run(make(), range(5))
    merged.merge(streams.run(make(), range(5, 9)))
    merged.merge(streams.run(make(), range(9, 11)))
    same(merged.compute(), streams.run(make()).compute(), 1e-6)


@pytest.mark.parametrize("make_one", [ParticipationRatio, ResidualDrift])
def test_tokens_may_come_after_those_that_are_left_out(make_one):
    """A batch of which everything at a layer is left out, seen first, last, or in another shard."""
    streams = Streams()
    short = int(streams.sink)
    assert streams.lengths[short] == 2  # BOS, and what is a sink at layer 1
    others = [i for i in streams.everything if i != short]
    expected = streams.run(make_one(with_excluded=True)).compute()
    for order in ([short, *others], [*others, short]):
        same(streams.run(make_one(with_excluded=True), order, 1).compute(), expected, 2e-6)
    for first, then in (([short], others), (others, [short])):
        shard = streams.run(make_one(with_excluded=True), first)
        shard.merge(streams.run(make_one(with_excluded=True), then))
        same(shard.compute(), expected, 2e-6)


def test_merging_leaves_the_other_alone(make, streams):
    other = streams.run(make(), range(5, 9))
    before = other.compute()
    streams.run(make(), range(5)).merge(other)
    same(before, other.compute(), 0)


def test_the_empty_probe_is_the_identity(make, streams):
    full, empty = streams.run(make()), streams.run(make(), [])
    expected = streams.run(make()).compute()
    full.merge(empty)
    same(full.compute(), expected, 0)
    empty = streams.run(make(), [])
    empty.merge(full)
    same(empty.compute(), expected, 1e-12)


def test_an_empty_probe_computes_absent_numbers(make, streams):
    rows = streams.run(make(), []).compute().rows
    assert rows
    assert all(math.isnan(row.value) and row.n == 0 for row in rows)


def test_compute_is_pure(make, streams):
    probe = streams.run(make())
    before = copy.deepcopy(probe.sums)
    same(probe.compute(), probe.compute(), 0)
    assert before.keys() == probe.sums.keys()
    assert all(torch.equal(before[name], probe.sums[name]) for name in before)


def test_update_changes_nothing_but_sums(make, streams):
    probe = make()
    probe.open(streams.spec())
    names = set(vars(probe))
    options = copy.deepcopy(probe.options())
    pair = streams.pair(range(4))
    kept = [copy.deepcopy(r) for r in (*pair.base.residuals, *pair.tuned.residuals)]
    probe.update(pair)
    assert set(vars(probe)) == names
    assert probe.options() == options
    for before, after in zip(kept, (*pair.base.residuals, *pair.tuned.residuals), strict=True):
        torch.testing.assert_close(before, after, rtol=0, atol=0, equal_nan=True)


def test_repeating_is_bit_identical(make, streams):
    same(streams.run(make()).compute(), streams.run(make()).compute(), 0)


def test_a_pickled_probe_goes_on(make, streams):
    probe = streams.run(make(), range(5))
    revived = pickle.loads(pickle.dumps(probe))
    for one in (probe, revived):
        one.update(streams.pair(range(5, 11)))
    same(probe.compute(), revived.compute(), 0)


def test_memory_is_known_before_and_fixed(make, streams):
    def held(probe):
        return sum(t.numel() * t.itemsize for t in probe.sums.values())

    probe = make()
    promised = probe.state_bytes(streams.spec())
    streams.run(probe, range(2))
    assert held(probe) == promised
    streams.run(probe)
    assert held(probe) == promised


def test_base_against_base_reads_no_change(make):
    unchanged = {
        "cosine": 1, "l2": 0, "relative_l2": 0, "delta": 0, "delta_naive": 0, "top1_agreement": 1,
        "kl": 0, "spearman": 1, "rank_1": 1, "rank_2_10": 0, "rank_gt_10": 0, "rank_ge_200": 0,
        "l2_with_sinks": 0, "delta_naive_with_sinks": 0, "l2_with_sinks_and_bos": 0,
        "delta_naive_with_sinks_and_bos": 0, "ratio": 1, "spread": 0, "share": 0,
        "cka": 1, "angle": 0,
    }  # fmt: skip
    rows = Streams(same=True).run(make()).compute().rows
    for row in rows:
        if row.metric in unchanged:
            assert row.value == unchanged[row.metric], row
            if not math.isnan(row.low):
                assert row.low <= row.value <= row.high, row
                # A share of all decisions seen leaves room for others; a distance of 0 does not.
                if row.value == 0 and not row.metric.startswith("rank"):
                    assert row.low == row.high == 0, row
    values = {(r.metric, r.layer, r.view): r.value for r in rows}
    for metric, layer, view in values:
        if metric.startswith("base") and metric != "base_naive":
            tuned = metric.replace("base", "tuned", 1)
            assert values[metric, layer, view] == values[tuned, layer, view]


def test_intervals_hold_their_means(make, streams):
    for row in streams.run(make()).compute().rows:
        means = row.probe != "participation_ratio" and row.metric != "median_base_rank"
        if means and not math.isnan(row.low):
            assert row.low <= row.value <= row.high


def test_rank_bins_have_their_edges_where_the_shares_have_theirs():
    assert rank_bins(3000) == [1, 2, 3, 6, 11, 21, 51, 101, 200, 501, 1001, 2001]
    assert rank_bins(1) == [1]


def test_shards_that_are_no_parts_of_one_corpus_do_not_merge(streams):
    shard = streams.run(ParticipationRatio(), range(5))
    with pytest.raises(ProbeError, match="not two parts of one corpus"):
        shard.merge(streams.run(ParticipationRatio(), range(4, 9)))


def test_probes_with_other_settings_do_not_merge(streams):
    with pytest.raises(ProbeError, match="same settings"):
        streams.run(ResidualDrift()).merge(streams.run(ResidualDrift(layers=[0])))
    with pytest.raises(ProbeError, match="same settings"):
        streams.run(ResidualDrift()).merge(streams.run(LogitLens()))
    with pytest.raises(ProbeError, match="different models"):
        streams.run(ResidualDrift()).merge(Streams(d_model=5).run(ResidualDrift()))


@pytest.mark.parametrize("layers", [[7], [-4], [0, 3]])
def test_layers_that_do_not_exist_are_refused(streams, layers):
    with pytest.raises(ProbeError, match=r"layers 0 \(embedding\) to 2"):
        ResidualDrift(layers=layers).open(streams.spec())


def test_one_sequence_has_values_but_no_intervals(make, streams):
    for row in streams.run(make(), [0]).compute().rows:
        assert math.isnan(row.low)
        assert math.isnan(row.high)
