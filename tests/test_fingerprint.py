"""The hash of a model's weights: what it depends on, and what is read for it."""

import copy

import pytest
import torch
from conftest import lora

from hyperlens import compare_models
from hyperlens.results.fingerprint import Known, weights_sha256

pytestmark = pytest.mark.transformer_lens


def test_it_is_of_names_shapes_types_and_values(tiny):
    said = {weights_sha256(tiny)}
    assert said == {weights_sha256(copy.deepcopy(tiny).train())}
    nudged = copy.deepcopy(tiny)
    with torch.no_grad():
        nudged.model.layers[1].mlp.up_proj.weight[3, 4] += 1e-3
    renamed, reshaped = torch.nn.ModuleDict({"other": tiny}), copy.deepcopy(tiny)
    weight = reshaped.model.layers[0].mlp.up_proj.weight
    weight.data = weight.data.reshape(weight.shape[1], weight.shape[0])
    for other in (nudged, renamed, reshaped, copy.deepcopy(tiny).bfloat16()):
        said.add(weights_sha256(other))
    assert len(said) == 5


def test_tensors_in_other_orders_of_memory_have_the_same_hash(tiny):
    turned = copy.deepcopy(tiny)
    weight = turned.model.layers[0].mlp.up_proj.weight
    weight.data = weight.data.T.contiguous().T
    assert not weight.is_contiguous()
    assert weights_sha256(turned) == weights_sha256(tiny)


def test_what_two_models_share_is_read_once(tiny):
    known: Known = {}
    assert weights_sha256(tiny, known) == weights_sha256(tiny)
    n_base = len(known)
    assert n_base == len(list(tiny.named_parameters()))
    adapted = lora(copy.deepcopy(tiny), "llama")
    alone = weights_sha256(adapted)
    adapted = lora(tiny, "llama")  # around the same tensors
    assert weights_sha256(adapted, known) == alone
    added = sum("lora_" in name for name, _ in adapted.named_parameters())
    assert len(known) == n_base + added


@pytest.mark.parametrize("threads", [1, 16])
def test_threads_do_not_matter(tiny, monkeypatch, threads):
    expected = weights_sha256(tiny)
    monkeypatch.setattr("os.cpu_count", lambda: threads)
    assert weights_sha256(tiny) == expected


def test_a_result_says_both_hashes(tiny):
    tuned = lora(copy.deepcopy(tiny), "llama")
    meta = compare_models(tiny, tuned, [[1, 5, 9, 4]], progress=False).meta
    assert meta["base"]["sha256"] == weights_sha256(tiny)
    assert meta["tuned"]["sha256"] == weights_sha256(tuned)
