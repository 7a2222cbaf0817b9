"""On a GPU: the numbers of the CPU, the same exactness, and the memory that was promised."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ARCHITECTURES, lora, make_tiny, perturbed, token_texts
from scipy.stats import spearmanr
from test_compare import UNCHANGED, assert_same, compare, numbers

from hyperlens import (
    compare_models,
    inject_static_bias,
    load_hooked,
    match_temperature,
    measure_behaviour,
    patch_blocks,
    run_null_test,
    trace_provenance,
)
from hyperlens.data.corpus import build_corpus
from hyperlens.decoding.generate import continuations
from hyperlens.errors import ResourceError
from hyperlens.experiments import compare_decoding, compare_domains
from hyperlens.hooks.surface import import_transformer_lens
from hyperlens.passes import multi_pass
from hyperlens.passes import streaming as runner
from hyperlens.passes.memory import free_bytes
from hyperlens.passes.streaming import PassOptions, pass_memory
from hyperlens.patching import patch_expansion, patch_norm, patch_positions, patch_weights
from hyperlens.probes import default_probes
from hyperlens.statistics import rank_correlation
from hyperlens.statistics.moments import moments_of
from hyperlens.training import hyperfit, to_hooked
from hyperlens.training.trainer import TokenTrainer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CUDA = torch.device("cuda")
TEXTS = token_texts(16, shortest=14, longest=24)
PROMPTS = {"n_prompts": 4, "prompt_tokens": 6, "max_new_tokens": 6, "progress": False}
EXPERIMENTS = {
    "measure_behaviour": (measure_behaviour, PROMPTS | {"strategies": ["greedy"]}),
    "match_temperature": (match_temperature, PROMPTS),
    "provenance": (trace_provenance, PROMPTS),
    "inject_static_bias": (inject_static_bias, PROMPTS | {"k": 8, "alphas": [0.5]}),
    "null_test": (run_null_test, PROMPTS | {"n_controls": 1}),
    "compare_decoding": (compare_decoding, PROMPTS | {"methods": ["greedy", "contrastive"]}),
    "patch_blocks": (patch_blocks, PROMPTS),
    "patch_positions": (patch_positions, {"offsets": 4, "progress": False}),
    "patch_weights": (patch_weights, PROMPTS),
    "patch_expansion": (patch_expansion, PROMPTS | {"n_random": 1}),
    "patch_norm": (patch_norm, {"progress": False}),
}


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any]:
    base = make_tiny("llama")
    return base, perturbed(base)


def close(a: Any, b: Any, where: str = "") -> None:
    """The same structure, and numbers but for the rounding of float32."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            close(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            close(x, y, f"{where}[{i}]")
    elif isinstance(a, float):
        both_nan = math.isnan(a) and math.isnan(b)
        assert both_nan or b == pytest.approx(a, rel=2e-3, abs=2e-4), where
    else:
        assert a == b, where


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_comparison_reads_as_on_the_cpu(name: str) -> None:
    base = make_tiny(name)
    tuned = perturbed(base)
    here, there = compare(base, tuned), compare(base, tuned, device="cuda")
    assert there.meta["device"].startswith("cuda")
    np.testing.assert_allclose(numbers(there)[:, 0], numbers(here)[:, 0], rtol=1e-4, atol=1e-5)
    assert next(base.parameters()).device.type == "cpu", "the caller's model moved"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_model_against_itself_reads_exactly_no_change(name: str) -> None:
    base = make_tiny(name).to(CUDA)
    for row in compare(base, copy.deepcopy(base)).long:
        if row.metric in UNCHANGED:
            assert row.value == UNCHANGED[row.metric], row


def test_repeating_and_the_order_of_texts_change_no_bit(pair: Any) -> None:
    first = compare(*pair, device="cuda")
    np.testing.assert_array_equal(numbers(first), numbers(compare(*pair, device="cuda")))
    turned = compare_models(*pair, TEXTS[::-1], device="cuda", progress=False)
    straight = compare_models(*pair, TEXTS, device="cuda", progress=False)
    np.testing.assert_array_equal(numbers(straight), numbers(turned))


def test_batch_size_does_not_matter(pair: Any) -> None:
    whole = compare(*pair, device="cuda")
    for batch_size in (1, 3):
        # Not the 1e-6 of the CPU: a GPU multiplies batches of another shape in another order.
        assert_same(whole, compare(*pair, device="cuda", batch_size=batch_size), 1e-5)


@pytest.mark.parametrize("backend", ["bridge", "hooked_transformer"])
def test_backends_agree(pair: Any, backend: str) -> None:
    if backend not in ("bridge",) and "HookedTransformer" not in dir(import_transformer_lens()):
        pytest.skip("this TransformerLens has no HookedTransformer")
    ours, theirs = (compare(*pair, device="cuda", backend=b) for b in ("residual", backend))
    np.testing.assert_allclose(numbers(ours)[:, 0], numbers(theirs)[:, 0], rtol=1e-3, atol=1e-3)
    assert load_hooked(pair[0], backend=backend, device="cuda").W_U.device.type == "cuda"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_close_to_float32(pair: Any, dtype: str) -> None:
    found = compare(*pair, device="cuda", dtype=dtype)
    assert found.meta["dtype"] == dtype
    exact = compare(*pair, device="cuda").value("drift", "cosine", 3, "raw")
    assert found.value("drift", "cosine", 3, "raw") == pytest.approx(exact, abs=0.01)
    self_compared = compare(pair[0], copy.deepcopy(pair[0]), device="cuda", dtype=dtype)
    assert {r.value for r in self_compared.long if r.metric == "l2"} == {0}


def test_an_unmerged_adapter_drifts_nowhere_before_its_first_block(pair: Any) -> None:
    tuned = lora(copy.deepcopy(pair[0]), "llama", layers_to_transform=[2])
    found = compare(pair[0], tuned, device="cuda")
    drift = [found.value("drift", "l2", layer, "raw") for layer in range(4)]
    assert drift[:3] == [0, 0, 0]
    assert drift[3] > 0


def peak_of(*args: Any) -> int:
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    compare_models(*args, progress=False)
    return torch.cuda.max_memory_allocated() - held


def test_ten_times_the_tokens_take_no_more_memory() -> None:
    base = make_tiny("llama", hidden_size=128, intermediate_size=128, vocab_size=2000).to(CUDA)
    tuned = perturbed(base)
    few, many = (token_texts(n=n, shortest=60, longest=60) for n in (100, 1000))
    peak_of(base, tuned, few)  # libraries set up their workspaces
    peaks = [peak_of(base, tuned, texts) for texts in (few, many)]
    assert 0 < peaks[1] <= 1.1 * peaks[0], peaks


@pytest.mark.parametrize("width", [256, 1024])
def test_no_pass_takes_more_than_was_foreseen(width: int) -> None:
    sizes = {"hidden_size": width, "intermediate_size": width, "vocab_size": 4000}
    base = make_tiny("llama", **sizes).to(CUDA)
    tuned = perturbed(base)
    texts = token_texts(n=100, shortest=60, longest=60)
    peak_of(base, tuned, texts[:2])
    found = compare_models(base, tuned, texts, progress=False)
    assert not any("read 2 times" in note for note in found.meta["notes"])
    corpus = build_corpus(
        texts, None, max_length=64, context_length=None, d_vocab=4000, include_bos=False,
        bos_id=None,
    )  # fmt: skip
    options = PassOptions(batch_size=8, sink_threshold=10.0, seed=0, progress=False)
    hooked = load_hooked(base, backend="residual")
    foreseen = pass_memory(hooked, corpus, default_probes(), options).total
    assert 0 < peak_of(base, tuned, texts) <= foreseen


def test_several_passes_give_the_numbers_of_one(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    foreseen = []

    def recorded(*args: Any) -> Any:
        foreseen.append(pass_memory(*args))
        return foreseen[-1]

    with monkeypatch.context() as patch:
        patch.setattr(multi_pass, "pass_memory", recorded)
        once = compare(*pair, device="cuda")
    for module in (multi_pass, runner):
        monkeypatch.setattr(module, "free_bytes", lambda _: foreseen[0].total - 1)
    apart = compare(*pair, device="cuda")
    assert any("read 2 times" in note for note in apart.meta["notes"])
    np.testing.assert_array_equal(numbers(once), numbers(apart))


def test_what_a_gpu_cannot_hold_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_tiny("llama", hidden_size=512, intermediate_size=2048).to(CUDA)
    tuned = perturbed(base)
    texts = token_texts(64, shortest=60, longest=60)
    monkeypatch.setattr(runner, "free_bytes", lambda _: 2**60)
    monkeypatch.setattr(multi_pass, "free_bytes", lambda _: 2**60)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(CUDA).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 4 * 2**20) / total)
    try:
        with pytest.raises(ResourceError, match="out of memory"):
            compare_models(base, tuned, texts, batch_size=64, progress=False)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.parametrize("d", [1, 61, 5000])
def test_rank_correlations_are_scipys(d: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_correlation, "ACCELERATOR_ENTRIES", 4 * d)
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(10, d, generator=generator)
    b = (a + torch.randn(10, d, generator=generator)).round(decimals=1)  # with ties
    found = rank_correlation.spearman(a.to(CUDA), b.to(CUDA)).cpu()
    expected = [spearmanr(x, y).statistic for x, y in zip(a, b, strict=True)] if d > 1 else [1] * 10
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert rank_correlation.spearman(b.to(CUDA), b.to(CUDA)).tolist() == [1] * 10
    assert len(rank_correlation.spearman(a[:0].to(CUDA), b[:0].to(CUDA))) == 0


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_moments_are_not_rounded_to_tensor_floats(precision: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 256, generator=generator)
    exact = x.double().T @ x.double()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        x = x.to(CUDA)
        found = moments_of(x, torch.zeros(256, device=CUDA)).outer.cpu()
        rounded = (x.T @ x).double().cpu()
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)
    scale = exact.diagonal().mean()
    assert ((found - exact).abs().max() / scale) < 1e-6
    if precision != "highest" and torch.cuda.get_device_capability() >= (8, 0):
        assert ((rounded - exact).abs().max() / scale) > 1e-5, "nothing was rounded to begin with"


def test_free_memory_counts_what_torch_keeps_for_itself() -> None:
    torch.cuda.empty_cache()
    before = free_bytes(CUDA)
    block = torch.empty(256 * 2**20, dtype=torch.uint8, device=CUDA)
    held = free_bytes(CUDA)
    del block
    after = free_bytes(CUDA)
    assert before - held == pytest.approx(256 * 2**20, rel=0.2)
    assert after == pytest.approx(before, rel=0.01)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_finds_what_it_finds_on_the_cpu(pair: Any, name: str) -> None:
    run, options = EXPERIMENTS[name]
    state = torch.cuda.get_rng_state(CUDA)
    here, there = (run(*pair, TEXTS, device=device, **options) for device in ("cpu", "cuda"))
    # What is drawn at random is drawn from another generator there.
    tables = [
        [dict(row) for row in found.table if row.get("decoding") != "sampled"]
        for found in (here, there)
    ]
    close(*tables)
    assert torch.equal(state, torch.cuda.get_rng_state(CUDA)), "the caller's random numbers moved"
    json.dumps(there.meta)


def test_several_corpora_on_a_gpu(pair: Any) -> None:
    found = compare_domains(
        {"pair": pair}, {"texts": TEXTS}, device="cuda", **PROMPTS
    )  # fmt: skip
    assert found.table


def test_tokens_are_drawn_from_the_seed_alone(pair: Any) -> None:
    model = copy.deepcopy(pair[0]).to(CUDA)
    prompts = [text[:n] for text, n in zip(TEXTS, (4, 6, 6, 9), strict=False)]
    options = {"max_new_tokens": 8, "stop_at_eos": False, "progress": False}

    def drawn(seed: int) -> list[list[int]]:
        return continuations(model, None, prompts, do_sample=True, seed=seed, **options)

    state = torch.cuda.get_rng_state(CUDA)
    assert drawn(3) == drawn(3)
    assert drawn(3) != drawn(4)
    assert torch.equal(state, torch.cuda.get_rng_state(CUDA))
    greedy = [continuations(one, None, prompts, **options) for one in (pair[0], model)]
    assert greedy[0] == greedy[1]


TRAINING = {
    "n_sequences": 4, "sequence_length": 12, "batch_size": 2, "record_every": 2,
    "prompt_tokens": 4, "new_tokens": 6, "progress": False,
}  # fmt: skip


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("full", {"learning_rate": 1e-3}),
        ("lora", {"lora_r": 4}),
        ("late_lora", {"lora_r": 4, "last_k": 1}),
    ],
)
def test_training_learns_as_on_the_cpu(pair: Any, method: str, options: dict[str, Any]) -> None:
    base = pair[0]
    before = copy.deepcopy(base.state_dict())
    state = torch.cuda.get_rng_state(CUDA)
    runs = [
        hyperfit(base, TEXTS, method, epochs=4, device=device, **options, **TRAINING)
        for device in ("cpu", "cuda", "cuda")
    ]
    np.testing.assert_allclose(runs[1].history, runs[0].history, rtol=1e-3)
    assert runs[1].history == runs[2].history
    assert next(runs[1].model.parameters()).device.type == "cuda"
    assert all(torch.equal(before[name], value) for name, value in base.state_dict().items())
    assert torch.equal(state, torch.cuda.get_rng_state(CUDA))
    weights = [dict(run.model.named_parameters()) for run in runs[1:]]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert next(to_hooked(runs[1]).parameters()).device.type == "cuda"
    found = compare(base, runs[1].model, device="cuda")
    assert found.value("drift", "l2", 3, "raw") > 0


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("method", ["full", "late_lora"])
def test_an_interrupted_run_goes_on_to_the_same_weights(
    pair: Any, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"epochs": 4, "device": "cuda", "checkpoint_minutes": 0.0, **TRAINING}
    if method == "late_lora":
        options |= {"last_k": 1, "lora_r": 4}
    compute = TokenTrainer.compute_loss

    def breaks(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 5:
            raise Interrupted
        return compute(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(TokenTrainer, "compute_loss", breaks)
        with pytest.raises(Interrupted):
            hyperfit(pair[0], TEXTS, method, out=tmp_path / "run", **options)
    again = hyperfit(pair[0], TEXTS, method, out=tmp_path / "run", **options)
    whole = hyperfit(pair[0], TEXTS, method, out=tmp_path / "whole", **options)
    assert again.history == whole.history
    files = [next((tmp_path / name).glob("*.safetensors")) for name in ("run", "whole")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_training_in_bfloat16(pair: Any) -> None:
    run = hyperfit(pair[0], TEXTS, "full", epochs=2, device="cuda", bf16=True, **TRAINING)
    assert all(math.isfinite(loss) for loss in run.history)
