"""Models whose weights are fetched when they are needed, from disk or from the CPU."""

import copy
from pathlib import Path

import accelerate
import pytest
import torch
from conftest import lora, make_tiny, perturbed, token_texts
from transformers import AutoModelForCausalLM

from hyperlens import compare_models, load_hooked, measure_behaviour
from hyperlens.errors import LoadingError
from hyperlens.experiments import compare_weights, run_null_test, trace_provenance
from hyperlens.patching import patch_weights
from hyperlens.results.fingerprint import weights_sha256
from hyperlens.training import hyperfit

TEXTS = token_texts(6)
SPLIT = {
    "model.embed_tokens": "cpu",
    "model.rotary_emb": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.layers.2": "disk",
    "model.norm": "disk",
    "lm_head": "disk",
}
WRITING = {"n_prompts": 2, "prompt_tokens": 4, "max_new_tokens": 4, "progress": False}


@pytest.fixture(scope="module")
def whole():
    base = make_tiny("llama")
    return base, perturbed(base)


@pytest.fixture(scope="module")
def on_disk(whole, tmp_path_factory: pytest.TempPathFactory):
    """The same two, some blocks and the head on disk."""
    models = []
    for model in whole:
        folder: Path = tmp_path_factory.mktemp("model")
        model.save_pretrained(folder)
        models.append(
            AutoModelForCausalLM.from_pretrained(
                folder, device_map=SPLIT, offload_folder=folder / "offloaded"
            ).eval()
        )
    return models


def n_elsewhere(model):
    return sum(weight.device.type == "meta" for weight in model.parameters())


def test_a_model_on_disk_is_compared_as_one_in_memory(whole, on_disk):
    """Bit for bit, and stays where it is."""
    before = [n_elsewhere(model) for model in on_disk]
    assert all(before)
    options = {"probes": ["drift", "logit_lens", "rank_reordering"], "progress": False}
    expected, found = (compare_models(*models, TEXTS, **options) for models in (whole, on_disk))
    assert found.table == expected.table
    for side in ("base", "tuned"):
        assert found.meta[side]["sha256"] == expected.meta[side]["sha256"]
    assert [n_elsewhere(model) for model in on_disk] == before


def test_it_writes_and_is_traced_as_one_in_memory(whole, on_disk):
    for ask in (measure_behaviour, trace_provenance):
        expected, found = (ask(*models, TEXTS, **WRITING) for models in (whole, on_disk))
        assert found.table == expected.table


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_all_of_it_on_the_cpu(name):
    """As accelerate's cpu_offload leaves a model, tied weights too; both hold the same tensors."""
    base = make_tiny(name)
    plain = load_hooked(base, backend="residual")
    offloaded = accelerate.cpu_offload(copy.deepcopy(base), execution_device=torch.device("cpu"))
    assert n_elsewhere(offloaded) == len(list(offloaded.parameters()))
    assert weights_sha256(offloaded) == weights_sha256(base)
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        logits = load_hooked(offloaded, backend="residual")(ids)
        assert torch.equal(logits, plain(ids))


def on_adapter(model, folder):
    lora(make_tiny("llama"), "llama").save_pretrained(folder)
    return compare_models(model, folder, TEXTS, progress=False)


REFUSED = {
    "weights": lambda model, _: compare_weights(model, make_tiny("llama"), progress=False),
    "null test": lambda model, _: run_null_test(model, make_tiny("llama"), TEXTS, **WRITING),
    "transplants": lambda model, _: patch_weights(
        model, make_tiny("llama"), TEXTS, prompt_tokens=4, max_new_tokens=4, progress=False
    ),
    "training": lambda model, _: hyperfit(model, TEXTS, "full", epochs=1, progress=False),
    "bridge": lambda model, _: load_hooked(model, backend="bridge"),
    "adapter": on_adapter,
    "dtype": lambda model, _: load_hooked(model, dtype="float64", backend="residual"),
}


@pytest.mark.parametrize("use", REFUSED.values(), ids=REFUSED.keys())
def test_what_needs_the_weights_themselves_is_refused(on_disk, tmp_path, use):
    with pytest.raises(LoadingError, match=r"LlamaForCausalLM is offloaded.*(load it|leave)") as e:
        use(on_disk[0], tmp_path)
    assert "\n" not in str(e.value)
