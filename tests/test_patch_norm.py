"""The norm question: planted changes are found where they are, and numbers are compare_models's."""

import copy
import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from conftest import make_tiny, perturbed, token_texts, trials
from test_intervals import D_MODEL, LENGTH, SPECTRUM, as_pair, clustered, true_ratio

from hyperlens.compare import compare_models
from hyperlens.compare.audit import audit
from hyperlens.errors import CorpusError, HyperlensError
from hyperlens.models.structure import find_structure
from hyperlens.passes.streams import StreamSpec
from hyperlens.patching.norm import CrossedNorms, NormResult, patch_norm, quantities
from hyperlens.probes import ParticipationRatio
from hyperlens.questions import QUESTIONS, result_class
from hyperlens.render.page import write_report
from hyperlens.validation.constructions import with_noise_in_blocks, with_noise_in_norm

TEXTS = token_texts(24, shortest=8, longest=20)
ARCHITECTURES = ("llama", "gpt2", "gemma2", "gpt_neox")


def changed(model, part, scale=0.3):
    """A copy that differs in its final norm, or its last block, alone."""
    if part == "norm":
        return with_noise_in_norm(model, scale, seed=4)
    return with_noise_in_blocks(model, [-1], scale, seed=4)


def ask(base, tuned, **options):
    return patch_norm(base, tuned, TEXTS, progress=False, **options)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_change_of_the_norm_alone_is_the_norms(name):
    base = make_tiny(name)
    found = ask(base, changed(base, "norm"))
    for quantity in ("stream", "raw_change", "unit_rms_change", "rescaling", "weighting"):
        row = found.dimension(quantity)
        assert [row[key] for key in ("value", "low", "high", "naive")] == [0, 0, 0, 0]
    assert found.dimension("weights")["value"] == found.dimension("change")["value"] != 0
    assert found.dimension("interaction")["value"] == 0
    assert not found.extras["same_norm"]
    assert found.extras["changed"] > 10
    # Exchanged, the norm takes all changed decisions with it, and the stream none.
    for side, metric in (("base", "to_tuned"), ("tuned", "to_base")):
        assert found.decided(f"norm into {side}", metric)["value"] == 1
        assert found.decided(f"stream into {side}", metric)["value"] == 0


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_change_of_the_last_block_alone_is_the_streams(name):
    base = make_tiny(name)
    found = ask(base, changed(base, "block"))
    for quantity in ("weights", "interaction", "before_change"):
        row = found.dimension(quantity)
        assert [row[key] for key in ("value", "low", "high", "naive")] == [0, 0, 0, 0]
    assert found.dimension("stream")["value"] == found.dimension("change")["value"] != 0
    assert found.extras["same_norm"]
    assert "the two models have the same final norm" in found.summary()
    for side, metric in (("base", "to_tuned"), ("tuned", "to_base")):
        assert found.decided(f"norm into {side}", metric)["value"] == 0
        assert found.decided(f"stream into {side}", metric)["value"] == 1


@pytest.fixture(scope="module")
def pair():
    base = make_tiny("llama")
    return base, perturbed(base, 0.15)


@pytest.fixture(scope="module")
def found(pair):
    return ask(*pair)


def test_the_numbers_are_those_of_compare_models(pair, found):
    comparison = compare_models(*pair, TEXTS, progress=False)
    for view, metric, layer, name in (
        ("raw", "base", 3, "raw_base"),
        ("raw", "tuned", 3, "raw_tuned"),
        ("raw", "delta", 3, "raw_change"),
        ("unit_rms", "delta", 3, "unit_rms_change"),
        ("final_norm", "base", 3, "base_stream_base_norm"),
        ("final_norm", "tuned", 3, "tuned_stream_tuned_norm"),
        ("final_norm", "delta", 3, "change"),
        ("raw", "base", 2, "before_base"),
        ("raw", "delta", 2, "before_change"),
    ):
        row = found.dimension(name)
        (corrected,) = (r for r in comparison.select("participation_ratio", metric, view)
                        if r.layer == layer)  # fmt: skip
        assert [row[key] for key in ("value", "low", "high", "n")] == [
            corrected.value,
            corrected.low,
            corrected.high,
            corrected.n,
        ]
        assert row["naive"] == comparison.value(
            "participation_ratio", f"{metric}_naive", layer, view
        )
    jump = audit(comparison)[0].jump
    assert jump is not None
    assert found.dimension("jump_of_scripts")["value"] == jump.as_read


def test_the_crossed_cells_are_plain_vectors_through_the_other_norm(pair, found):
    """By hand, text by text: the naive ratio of one stream after either norm."""
    streams = {}
    for side, model in zip(("base", "tuned"), pair, strict=True):
        kept = []
        handle = (
            find_structure(model)
            .blocks[-1]
            .register_forward_hook(
                lambda m, a, out, kept=kept: kept.append(
                    (out if isinstance(out, torch.Tensor) else out[0])[0]
                )
            )
        )
        with torch.no_grad():
            for ids in TEXTS:
                model(torch.tensor([ids]))
        handle.remove()
        streams[side] = torch.cat([x[1:] for x in kept])  # BOS comes first
    norms = {s: find_structure(m).final_norm for s, m in zip(("base", "tuned"), pair, strict=True)}
    for stream, x in streams.items():
        for norm, module in norms.items():
            with torch.no_grad():
                values = np.linalg.eigvalsh(np.cov(module(x).double().numpy().T, bias=True))
            expected = values.sum() ** 2 / (values**2).sum()
            naive = found.dimension(f"{stream}_stream_{norm}_norm")["naive"]
            assert naive == pytest.approx(expected, rel=1e-4)


def test_parts_add_up(found):
    def of(name, key="value"):
        return found.dimension(name)[key]

    for key in ("value", "naive"):
        assert of("stream", key) + of("weights", key) == pytest.approx(of("change", key))
        steps = ("raw_change", "rescaling", "weighting", "weights")
        assert sum(of(name, key) for name in steps) == pytest.approx(of("change", key))
        assert of("jump_as_read", key) == pytest.approx(
            of("change", key) - of("before_change", key)
        )
        cells = [
            of(f"{s}_stream_{n}_norm", key) for s in ("base", "tuned") for n in ("base", "tuned")
        ]
        assert of("interaction", key) == pytest.approx(cells[3] - cells[2] - cells[1] + cells[0])
    for name in ("stream", "weights", "interaction", "rescaling"):
        assert of(name, "low") < of(name, "high")


def test_no_change_reads_zero():
    base = make_tiny("llama")
    found = ask(base, base)
    for name in ("stream", "weights", "change", "interaction", "jump_as_read"):
        assert found.dimension(name)["value"] == 0
    assert "Tuning changed no decision" in found.summary()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_batch_sizes_are_invisible(name):
    base = make_tiny(name).double()
    one, other = (ask(base, perturbed(base, 0.1), batch_size=size) for size in (1, 7))
    for a, b in zip(one.table, other.table, strict=True):
        for key in ("value", "low", "high", "naive"):
            assert a[key] == pytest.approx(b[key], rel=1e-5, abs=1e-5, nan_ok=True), a


def test_a_result_returns_from_its_folder(found, tmp_path):
    found.save(tmp_path / "out")
    again = NormResult.load(tmp_path / "out")
    assert again.summary() == found.summary()
    assert again.to_frame().equals(found.to_frame())
    # What earlier versions wrote lacks the scripts' jump.
    rows = [row for row in found.table if row["name"] != "jump_of_scripts"]
    old = replace(found, table=tuple(rows))
    assert "as scripts do" not in old.summary()
    assert "the last block seems to add" in " ".join(old.conclusions())
    other = copy.copy(found)
    object.__setattr__(other, "meta", found.meta | {"base": {"name": "<b>other"}})
    page = write_report(tmp_path / "r.html", [found, other]).read_text(encoding="utf-8")
    assert "Is the expansion in the block, or in the final norm?" in page
    assert "&lt;b&gt;other → LlamaForCausalLM" in page
    assert "<b>other" not in page
    assert found.plot().to_dict()
    assert NormResult in map(result_class, QUESTIONS)


def test_the_verdicts_say_what_a_script_would_read(found):
    text = " ".join(found.conclusions())
    jump = found.dimension("jump_as_read")["value"]
    assert f"the last block seems to add {jump:+.1f}" in text
    jump = found.dimension("jump_of_scripts")["value"]
    assert f"as scripts do, it seems to add {jump:+.1f} (naive ratio)" in text
    assert "dimensions after the final norm" in text
    assert "what the norm's weights change by themselves" in text


def test_refusals_are_one_line(pair):
    with pytest.raises(CorpusError, match="batch_size must be at least 1"):
        ask(*pair, batch_size=0)
    with pytest.raises(HyperlensError, match="differ in depth"):
        ask(pair[0], make_tiny("llama", num_hidden_layers=2))


REPEATS = 300
WEIGHTS = (np.linspace(1.0, 0.7, D_MODEL), np.linspace(1.0, 1.5, D_MODEL))
STRETCHED = SPECTRUM * (np.linspace(1.0, 1.6, D_MODEL) + 0.01)


@pytest.mark.long
@pytest.mark.parametrize(("n_sequences", "resemblance"), [(64, 0.2), (128, 0.3)])
def test_intervals_of_effects_cover(n_sequences, resemblance):
    """Known truth: norms that only weigh directions, streams with known spectra, topics."""
    bb, bt, tb, tt = (true_ratio(s * w**2) for s in (SPECTRUM, STRETCHED) for w in WEIGHTS)
    truth = {
        "stream": (tb - bb + tt - bt) / 2,
        "weights": (bt - bb + tt - tb) / 2,
        "interaction": tt - bt - tb + bb,
        "change": tt - bb,
    }
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    spec = StreamSpec(0, D_MODEL, D_MODEL, torch.device("cpu"), n_sequences, LENGTH // 2)
    norms = [partial(torch.mul, torch.from_numpy(w).float()) for w in WEIGHTS]
    inside = dict.fromkeys(truth, 0)
    for _ in trials(REPEATS):
        pair = as_pair(*clustered(rng, n_sequences, resemblance, 0.5), LENGTH // 2)
        object.__setattr__(pair.base, "final_norm", norms[0])
        object.__setattr__(pair.tuned, "final_norm", norms[1])
        plain, crossed = ParticipationRatio(layers=(-1,)), CrossedNorms()
        for probe in (plain, crossed):
            probe.open(spec)
            probe.update(pair)
        found = quantities(plain, crossed)
        for name, value in truth.items():
            inside[name] += found[name].low <= value <= found[name].high
    slack = 2 * math.sqrt(0.95 * 0.05 / REPEATS)
    for name, count in inside.items():
        assert 0.93 - slack <= count / REPEATS <= 0.97 + slack, (name, count / REPEATS)
