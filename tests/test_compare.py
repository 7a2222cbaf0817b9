"""compare_models end to end: exact identity, invariances, planted changes, memory."""

import copy
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ARCHITECTURES, lora, make_tiny, perturbed, token_texts, unchecked
from memory_for_tests import PROC

from hyperlens import compare_models, load_hooked
from hyperlens.errors import ResourceError
from hyperlens.hooks.surface import import_transformer_lens
from hyperlens.pair import open_pair
from hyperlens.passes import multi_pass
from hyperlens.passes import streaming as runner
from hyperlens.passes.streams import StreamSpec
from hyperlens.probes import MeanProbe, ParticipationRatio, ResidualDrift
from hyperlens.results.rows import COLUMNS

TEXTS = token_texts()
METRICS = {
    "drift": {"cosine", "l2", "relative_l2", "l2_with_sinks", "l2_with_sinks_and_bos"},
    "participation_ratio": {
        "base", "tuned", "delta", "base_row", "tuned_row", "delta_row",
        *(f"{of}_naive{words}" for of in ("base", "tuned", "delta")
          for words in ("", "_with_sinks", "_with_sinks_and_bos")),
    },
    "logit_lens": {"top1_agreement", "kl", "base_entropy", "tuned_entropy", "median_base_rank"},
    "rank_reordering": {
        "top1_agreement", "spearman", "rank_1", "rank_2_10", "rank_gt_10", "rank_ge_200",
    },
}  # fmt: skip
UNCHANGED = {
    "cosine": 1, "l2": 0, "relative_l2": 0, "delta": 0, "delta_row": 0, "delta_naive": 0,
    "top1_agreement": 1, "kl": 0, "spearman": 1, "rank_1": 1, "rank_2_10": 0, "rank_gt_10": 0,
    "rank_ge_200": 0,
}  # fmt: skip


def compare(base, tuned, texts=TEXTS, **options):
    return compare_models(base, tuned, texts, progress=False, **options)


def numbers(comparison):
    return np.array([row[4:] for row in comparison.long], dtype=float)


def assert_same(a, b, tolerance):
    assert [r[:4] for r in a.long] == [r[:4] for r in b.long]
    np.testing.assert_allclose(
        numbers(a), numbers(b), rtol=tolerance, atol=tolerance, equal_nan=True
    )
    assert a.extras == b.extras


@pytest.fixture(scope="module")
def pair():
    base = make_tiny("llama")
    return base, perturbed(base)


@pytest.fixture(scope="module")
def compared(pair):
    """Once, for the tests that hold something against it."""
    return compare(*pair)


@pytest.mark.transformer_lens
def test_the_table_keeps_its_promise(compared):
    comparison = compared
    frame = comparison.to_frame()
    assert tuple(frame.columns) == COLUMNS
    assert {p: set(g.metric) for p, g in frame.groupby("probe") if p in METRICS} == METRICS
    layers = frame[frame.probe.isin(["drift", "participation_ratio", "logit_lens"])]
    assert set(layers.layer) == {0, 1, 2, 3}
    assert set(frame[frame.probe == "rank_reordering"].layer) == {3}
    for probe in ("drift", "participation_ratio"):
        assert set(frame[frame.probe == probe]["view"]) == {"raw", "unit_rms", "final_norm"}
    assert not frame.duplicated(["probe", "metric", "layer", "view"]).any()
    assert np.isfinite(frame.value).all()
    assert (frame.n == sum(len(t) - 1 for t in TEXTS)).sum() > 100
    lens = comparison.value("logit_lens", "top1_agreement", 3, "final_norm")
    assert lens == comparison.value("rank_reordering", "top1_agreement", 3, "final_norm")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_model_against_itself_reads_exactly_no_change(name):
    model = make_tiny(name)
    for row in compare(model, model).long:
        if row.metric in UNCHANGED:
            assert row.value == UNCHANGED[row.metric], row
            assert math.isnan(row.low) or row.low == row.high == row.value, row


def test_repeating_is_bit_identical(pair, compared):
    a, b = compared, compare(*pair)
    np.testing.assert_array_equal(numbers(a), numbers(b))
    assert a.meta == b.meta


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_batch_size_does_not_matter(pair, compared, batch_size):
    assert_same(compared, compare(*pair, batch_size=batch_size), 1e-6)


def test_text_order_does_not_matter(pair, compared):
    a, b = compared, compare(*pair, TEXTS[::-1])
    np.testing.assert_array_equal(numbers(a), numbers(b))
    assert a.meta["corpus"] == b.meta["corpus"]


@pytest.mark.transformer_lens
@pytest.mark.parametrize("backend", ["bridge", "hooked_transformer"])
def test_backends_agree(pair, compared, backend):
    if backend not in ("bridge",) and "HookedTransformer" not in dir(import_transformer_lens()):
        pytest.skip("this TransformerLens has no HookedTransformer")
    ours, theirs = compared, compare(*pair, backend=backend)
    assert theirs.meta["backend"] == backend
    np.testing.assert_allclose(numbers(ours)[:, 0], numbers(theirs)[:, 0], rtol=1e-4, atol=1e-4)


def test_hooked_models_can_be_compared(pair):
    hooked = [load_hooked(model, backend="bridge") for model in pair]
    assert_same(compare(*pair, backend="bridge"), compare(*hooked), 0)


def test_one_hooked_model_decides_how_the_other_is_hooked(pair):
    base, tuned = pair
    mixed = compare(load_hooked(base, backend="bridge"), tuned)
    assert mixed.meta["backend"] == "bridge"


@pytest.mark.transformer_lens
@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
def test_layers_before_the_first_adapted_block_do_not_drift(name, tmp_path):
    base = make_tiny(name)
    pattern = {"gpt2": "h"}.get(name, "layers")
    adapted = lora(make_tiny(name), name, layers_to_transform=[2], layers_pattern=pattern)
    adapted.save_pretrained(tmp_path / "adapter")
    comparison = compare(base, tmp_path / "adapter")
    for metric in ("l2", "relative_l2"):
        for view in ("raw", "unit_rms", "final_norm"):
            values = [row.value for row in comparison.select("drift", metric, view)]
            assert values[:3] == [0, 0, 0]
            assert values[3] > 0
    assert comparison.meta["tuned"]["kind"] == "adapter"


@pytest.mark.transformer_lens
def test_an_adapter_shares_the_bases_weights(tmp_path):
    base = make_tiny("llama")
    lora(make_tiny("llama"), "llama").save_pretrained(tmp_path / "adapter")
    opened = open_pair(base, tmp_path / "adapter")
    theirs = {p.data_ptr() for p in base.parameters()}
    held = {p.data_ptr() for p in opened.tuned.model.parameters()}
    assert theirs <= held


def test_an_adapter_and_its_merged_model_read_the_same(tmp_path):
    base = make_tiny("gpt2")
    adapted = lora(make_tiny("gpt2"), "gpt2")
    adapted.save_pretrained(tmp_path / "adapter")
    merged = adapted.merge_and_unload()
    a, b = compare(base, tmp_path / "adapter"), compare(base, merged)
    np.testing.assert_allclose(numbers(a)[:, 0], numbers(b)[:, 0], rtol=1e-3, atol=1e-3)


def test_sharpening_alone_changes_no_rank(pair):
    base = pair[0]
    sharper = copy.deepcopy(base)
    with torch.no_grad():
        sharper.lm_head.weight *= 2  # temperature one half, exactly
    comparison = compare(base, sharper)
    assert comparison.value("rank_reordering", "spearman", 3, "final_norm") == 1
    assert comparison.value("rank_reordering", "top1_agreement", 3, "final_norm") == 1
    entropies = [
        comparison.value("logit_lens", m, 3, "final_norm")
        for m in ("base_entropy", "tuned_entropy")
    ]
    assert entropies[1] < entropies[0]
    assert comparison.value("drift", "l2", 3, "raw") == 0


def test_a_change_of_the_final_norm_alone_is_not_the_blocks(pair):
    base = pair[0]
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned.model.norm.weight *= torch.linspace(0.2, 3, 32)
    comparison = compare(base, tuned)
    assert comparison.value("participation_ratio", "delta", 3, "raw") == 0
    assert comparison.value("participation_ratio", "delta", 3, "final_norm") != 0
    assert comparison.value("drift", "l2", 3, "raw") == 0


def test_sinks_are_masked_by_norm_in_either_model():
    base = make_tiny("llama")
    tuned = perturbed(base, 0.01)
    with torch.no_grad():
        tuned.model.embed_tokens.weight[7] *= 300
    texts = [[1, 3, 4, 7, 5, 6], [1, 4, 5, 6, 3, 4]] * 3
    masked = compare(base, tuned, texts)
    assert masked.meta["excluded"]["sinks_per_layer"][0] == 3
    assert masked.value("drift", "l2", 0, "raw") < 1
    kept = compare(base, tuned, texts, sink_threshold=0.0)
    assert kept.meta["excluded"]["sinks_per_layer"] == [0, 0, 0, 0]
    assert kept.value("drift", "l2", 0, "raw") > 10
    row = next(r for r in masked.long if r.probe == "drift" and r.layer == 0)
    assert row.n == 30 - 3
    decisions = next(r for r in masked.long if r.probe == "rank_reordering")
    assert decisions.n == 30


def test_bos_is_left_out_by_id_unless_asked_for(pair):
    without, with_bos = compare(*pair), compare(*pair, include_bos=True)
    n = [next(r.n for r in c.long if r.probe == "drift") for c in (without, with_bos)]
    assert n[1] - n[0] == len(TEXTS)
    assert without.meta["corpus"]["n_bos"] == len(TEXTS)
    assert with_bos.meta["corpus"]["n_bos"] == 0


@pytest.mark.transformer_lens
def test_half_precision_runs(pair):
    comparison = compare(*pair, dtype="bfloat16")
    assert comparison.meta["dtype"] == "bfloat16"
    assert np.isfinite([r.value for r in comparison.long]).all()


def test_models_of_two_dtypes_run_in_the_wider_one(pair):
    base, tuned = pair
    comparison = compare(copy.deepcopy(base).bfloat16(), tuned)
    assert comparison.meta["dtype"] == "float32"
    assert any("dtypes differ" in note for note in comparison.meta["notes"])


@pytest.mark.transformer_lens
def test_attention_of_the_pair_is_made_equal(pair):
    base, tuned = pair
    eager = copy.deepcopy(tuned)
    eager.set_attn_implementation("eager")
    comparison = compare(base, eager)
    assert any("attention differs" in note for note in comparison.meta["notes"])
    assert_same(compare(base, tuned), comparison, 0)
    assert eager.config._attn_implementation == "eager"


def test_probes_can_be_chosen_and_written(pair):
    class NormGrowth(MeanProbe):
        name = "norm_growth"
        metrics = ("ratio",)

        def measure(self, pair, layer, view):
            base, tuned = pair.vectors(layer, view)
            return {"ratio": (tuned.norm(dim=-1) / base.norm(dim=-1)).double()}

    chosen = [NormGrowth(), ResidualDrift(layers=[-1])]
    frame = compare(*pair, probes=chosen).to_frame()
    assert set(frame.probe) == {"norm_growth", "drift"}
    assert len(frame[frame.probe == "norm_growth"]) == 4
    assert (frame.low <= frame.value).all()
    assert not hasattr(chosen[0], "sums"), "the caller's probe is not used up"


def test_a_result_says_how_to_repeat_it(pair):
    meta = compare(*pair, seed=3).meta
    assert meta["seed"] == 3
    assert meta["base"]["sha256"] != meta["tuned"]["sha256"]
    assert meta["options"]["max_length"] == 256
    assert meta["versions"]["torch"]
    assert meta["corpus"]["n_sequences"] == len(TEXTS)


def test_the_seed_moves_only_what_is_sampled():
    base = make_tiny("llama")
    tuned = perturbed(base)
    texts = token_texts(n=140)
    a, b = compare(base, tuned, texts), compare(base, tuned, texts, seed=1)
    for one, other in zip(a.long, b.long, strict=True):
        sampled = one.probe == "participation_ratio" and one.metric in ("base", "tuned", "delta")
        if not sampled:
            assert one.value == other.value, one
        elif one.metric != "delta":
            # How much tokens of a text resemble each other comes from a sample of them.
            assert one.value == pytest.approx(other.value, rel=5e-3), one
    ratio = [[r.low for r in c.long if r.metric == "delta"] for c in (a, b)]
    assert ratio[0] != ratio[1]


def test_numbers_may_be_numpys(pair):
    plain = compare(*pair, batch_size=2, max_length=12, seed=3, sink_threshold=8.0)
    made = {"batch_size": np.int64(2), "max_length": np.int32(12), "seed": np.int64(3)}
    with unchecked():  # as outside the tests
        found = compare(*pair, **made, sink_threshold=np.float32(8))
    assert numbers(found).tobytes() == numbers(plain).tobytes()
    assert found.meta["options"] == plain.meta["options"]


def test_the_memory_of_the_sums_is_refused_before_the_run(pair, monkeypatch):
    for module in (runner, multi_pass):
        monkeypatch.setattr(module, "free_bytes", lambda device: 1000)
    with pytest.raises(ResourceError, match="fewer views or layers"):
        compare(*pair)


def test_fewer_views_take_less_memory():
    spec = StreamSpec(3, 32, 61, torch.device("cpu"), 8, 8)
    assert ParticipationRatio(["raw"]).state_bytes(spec) < ParticipationRatio().state_bytes(spec)


MEMORY = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from conftest import make_tiny, perturbed, token_texts
from memory_for_tests import forget_peak, peak
from hyperlens import compare_models
torch.set_num_threads(1)
base = make_tiny("llama", hidden_size=128, intermediate_size=128, vocab_size=500)
tuned = perturbed(base)
# More than are sampled for intervals in either case.
few, many = (token_texts(n=n, shortest=6, longest=6) for n in (130, 1300))
held = forget_peak()
options = {"batch_size": 32, "progress": False}
compare_models(base, tuned, few, **options)  # loads and keeps what is kept for later
# The fewer first: what a run with many has taken is not given back, and would hide what it took.
# Of two runs the lower: what the C library has to take anew differs from run to run.
peaks = [], []
for texts, seen in zip((few, many), peaks):
    for _ in range(2):
        forget_peak()
        compare_models(base, tuned, texts, **options)
        seen.append(peak() - held)
print(*map(min, peaks))
"""


@pytest.mark.slow
@pytest.mark.skipif(not PROC.exists(), reason="peak memory is read as Linux gives it")
def test_ten_times_the_tokens_take_no_more_memory():
    """Peak memory above what the process held with both models loaded."""
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(Path(__file__).parent)],
        capture_output=True,
        text=True,
        check=True,
    )
    few, many = map(int, done.stdout.split())
    assert 0 < many <= 1.1 * few, (few / 2**20, many / 2**20)
