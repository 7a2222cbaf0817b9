"""What does not fit in memory at once is measured in several passes: same numbers, less memory."""

import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from conftest import make_tiny, perturbed, short, token_texts
from memory_for_tests import PROC

from hyperlens import compare_models
from hyperlens.data.corpus import build_corpus
from hyperlens.errors import ResourceError
from hyperlens.hooks.loading import load_hooked
from hyperlens.pair import open_inputs
from hyperlens.passes import memory, multi_pass
from hyperlens.passes import streaming as runner
from hyperlens.passes.multi_pass import run_passes
from hyperlens.passes.streaming import PassOptions, pass_memory
from hyperlens.passes.streams import StreamSpec
from hyperlens.probes import ParticipationRatio, ResidualDrift, default_probes

OPTIONS = PassOptions(batch_size=4, sink_threshold=10.0, seed=0, progress=False)


@pytest.fixture(scope="module")
def work():
    base = make_tiny("llama", num_hidden_layers=4)
    texts = token_texts()
    corpus = build_corpus(
        texts, None, max_length=64, context_length=None, d_vocab=base.config.vocab_size,
        include_bos=False, bos_id=None,
    )  # fmt: skip
    return (
        load_hooked(base, backend="residual"),
        load_hooked(perturbed(base), backend="residual"),
        corpus,
    )


def room_for(monkeypatch, work, n_layers):
    """Just enough memory for all probes, the participation ratio at the last layers only."""
    probes = default_probes()
    (ratio,) = (probe for probe in probes if isinstance(probe, ParticipationRatio))
    ratio.layers = tuple(range(5 - n_layers, 5))
    allowed = pass_memory(work[0], work[2], probes, OPTIONS).total
    for module in (runner, multi_pass):
        monkeypatch.setattr(module, "free_bytes", lambda device: allowed)


@pytest.mark.parametrize(
    ("n_layers", "n_passes"), short([(5, 1), (4, 2), (3, 2), (2, 3), (1, 5)], (4, 2), (1, 5))
)
def test_several_passes_give_the_numbers_of_one(work, monkeypatch, n_layers, n_passes):
    once = run_passes(*work, default_probes(), OPTIONS)
    assert once.n_passes == 1
    room_for(monkeypatch, work, n_layers)
    apart = run_passes(*work, default_probes(), OPTIONS)
    assert apart.n_passes == n_passes
    assert list(apart.results) == list(once.results)
    assert repr(apart.results) == repr(once.results)  # bit for bit, NaN included
    assert apart.sinks_per_layer == once.sinks_per_layer


def test_a_pass_holds_no_sums_of_the_one_before(work, monkeypatch):
    room_for(monkeypatch, work, 2)
    held, run_pass = [], runner.run_pass

    def spying(base, tuned, corpus, probes, options):
        assert not any(sums() is not None for sums in held)
        result = run_pass(base, tuned, corpus, probes, options)
        held.extend(weakref.ref(p.sums["outer"]) for p in probes if hasattr(p, "split"))
        return result

    monkeypatch.setattr(multi_pass, "run_pass", spying)
    assert run_passes(*work, default_probes(), OPTIONS).n_passes == len(held) == 3


def test_chosen_layers_and_views_stay_chosen(work, monkeypatch):
    def rows(n):
        probe = ParticipationRatio(["unit_rms"], (0, 2, -1))
        return run_passes(*work, [probe, ResidualDrift()], OPTIONS).results

    whole = rows(1)
    spec = runner.stream_spec(work[0], work[2], torch.device("cpu"))
    parts = ParticipationRatio(["unit_rms"], (0, 2, -1)).split(spec, 2)
    assert [part.layers for part in parts] == [(0, 2), (4,)]
    room_for(monkeypatch, work, 1)
    assert repr(rows(1)) == repr(whole)


def test_one_layer_that_does_not_fit_is_refused(work, monkeypatch):
    monkeypatch.setattr(runner, "free_bytes", lambda device: 1000)
    monkeypatch.setattr(multi_pass, "free_bytes", lambda device: 1000)
    with pytest.raises(ResourceError, match="fewer views or layers"):
        run_passes(*work, default_probes(), OPTIONS)
    with pytest.raises(ResourceError, match="fewer views or layers"):
        run_passes(*work, [ResidualDrift()], OPTIONS)


def test_the_reader_is_told(monkeypatch, work):
    room_for(monkeypatch, work, 3)
    base = make_tiny("llama", num_hidden_layers=4)
    comparison = compare_models(base, perturbed(base), token_texts(), batch_size=4, progress=False)
    assert "read 2 times: the sums of all layers did not fit in memory" in comparison.meta["notes"]


def test_room_for_the_first_layers_need_not_be_enough_for_the_last(monkeypatch):
    """Of the last layer more is kept: two of the first layers fit at once, the last two do not."""
    base = make_tiny("llama")
    probes = default_probes()
    (ratio,) = (probe for probe in probes if isinstance(probe, ParticipationRatio))
    ratio.layers = (0, 1)
    inputs = open_inputs(base, perturbed(base), token_texts(), max_length=64)
    models = inputs.pair.base.hooked, inputs.pair.tuned.hooked
    allowed = pass_memory(models[0], inputs.corpus, probes, OPTIONS).total
    for module in (runner, multi_pass):
        monkeypatch.setattr(module, "free_bytes", lambda device: allowed)
    assert run_passes(*models, inputs.corpus, default_probes(), OPTIONS).n_passes == 4


@pytest.mark.parametrize("n_layers", range(1, 9))
@pytest.mark.parametrize("n", range(1, 9))
def test_parts_are_even_and_leave_nothing_out(n_layers, n):
    spec = StreamSpec(n_layers - 1, 4, 5, torch.device("cpu"))
    parts = ParticipationRatio().split(spec, n)
    assert len(parts) <= n
    assert sum((part.layers for part in parts), ()) == tuple(range(n_layers))
    assert max(len(part.layers) for part in parts) == len(parts[0].layers) == -(-n_layers // n)


COMPUTING = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from memory_for_tests import forget_peak, peak
from hyperlens.probes import ParticipationRatio
from hyperlens.passes.streams import StreamSpec
torch.set_num_threads(1)
for n_layers in (0, 7):  # first a small one, which loads what has to be loaded
    probe = ParticipationRatio()
    probe.open(StreamSpec(n_layers, 512, 5, torch.device("cpu")))
    for value in probe.sums.values():
        value.add_(1)
    before = forget_peak()
    probe.compute()
sums = sum(value.nbytes for value in probe.sums.values())
print((peak() - before) / sums)
"""


@pytest.mark.skipif(not PROC.exists(), reason="peak memory is read as Linux gives it")
def test_reading_the_result_takes_little_more_than_the_sums():
    here = str(Path(__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", COMPUTING, here], capture_output=True, text=True, check=True
    )
    assert float(done.stdout) < 0.25


@pytest.mark.parametrize(
    ("groups", "free"),
    [
        ({}, sys.maxsize),
        ({"": ("max", 5, 0)}, sys.maxsize),
        ({"": ("1000", 700, 100)}, 400),
        ({"": ("1000", 700, 100), "job": ("max", 5, 0), "job/step": ("500", 200, 0)}, 300),
        ({"": ("1000", 1200, 100)}, 0),
        ({"": ("1000", 700, None)}, sys.maxsize),  # of a kind that is not known
    ],
)
def test_a_container_leaves_what_its_tightest_group_does(tmp_path, monkeypatch, groups, free):
    for name, (limit, current, inactive) in groups.items():
        group = tmp_path / "fs" / name
        group.mkdir(parents=True, exist_ok=True)
        (group / "memory.max").write_text(f"{limit}\n")
        (group / "memory.current").write_text(f"{current}\n")
        kept = "anon 3\n" if inactive is None else f"anon 3\ninactive_file {inactive}\n"
        (group / "memory.stat").write_text(kept)
    (tmp_path / "own").write_text("0::/job/step\n")
    monkeypatch.setattr(memory, "CGROUPS", tmp_path / "fs")
    monkeypatch.setattr(memory, "OWN_CGROUP", tmp_path / "own")
    assert memory._free_in_container() == free
    assert memory.free_bytes(torch.device("cpu")) <= free
    monkeypatch.setattr(memory, "OWN_CGROUP", tmp_path / "none")
    assert memory._free_in_container() == sys.maxsize
