"""Anatomies that are easily mistaken: huge activations, mild logits, narrower unembeddings."""

import copy
import gc
import weakref

import pytest
import torch
from conftest import ARCHITECTURES, lora, make_tiny, perturbed, token_texts

from hyperlens import compare_models, load_hooked, patch_blocks
from hyperlens.errors import LoadingError
from hyperlens.hooks.residual import ResidualModel
from hyperlens.models import structure as structure_module
from hyperlens.models.structure import find_structure

pytestmark = pytest.mark.transformer_lens

# What each architecture calls the parts that its blocks add; Gemma-2 norms them once more.
BRANCHES = {
    "gemma2": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "gpt2": ("attn", "mlp"),
    "gpt_neox": ("attention", "mlp"),
}


def branches(model):
    names = {id(module): name.rpartition(".")[2] for name, module in model.named_modules()}
    found = find_structure(model).branches
    return found and {tuple(names[id(part)] for part in pair) for pair in found}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_branches_in_every_precision(name, dtype):
    assert branches(make_tiny(name).to(dtype)) == {BRANCHES.get(name, ("self_attn", "mlp"))}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [50.0, 1000.0, 2000.0])
def test_one_huge_activation_does_not_hide_the_others(size, dtype):
    model = make_tiny("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 3] = size
    assert branches(model.to(dtype)) == {("self_attn", "mlp")}


def test_blocks_that_add_something_else_have_no_branches():
    from transformers import GraniteConfig, GraniteForCausalLM

    sizes = ARCHITECTURES["llama"][1] | {"residual_multiplier": 0.9}
    assert find_structure(GraniteForCausalLM(GraniteConfig(**sizes)).eval()).branches is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [0.05, 1.0, 20.0])
def test_a_soft_cap_is_found_however_small_the_logits(scale, dtype):
    model = make_tiny("gemma2", final_logit_softcapping=30.0)
    with torch.no_grad():
        model.model.norm.weight.copy_(scale * (1 + model.model.norm.weight) - 1)
    assert find_structure(model.to(dtype)).soft_cap == 30.0


def test_an_unembedding_of_another_width_is_refused():
    from transformers import OPTConfig, OPTForCausalLM

    sizes = {
        "vocab_size": 61, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 64,
    }  # fmt: skip
    assert load_hooked(OPTForCausalLM(OPTConfig(**sizes)), backend="residual").cfg.d_model == 32
    narrow = OPTForCausalLM(OPTConfig(**sizes, word_embed_proj_dim=16))
    with pytest.raises(LoadingError, match="unembeds vectors of 16 numbers from a stream of 32"):
        load_hooked(narrow, backend="residual")


def test_layers_that_share_keys_and_values_are_read_whole():
    transformers = pytest.importorskip("transformers", minversion="5.20")
    torch.manual_seed(0)
    config = transformers.Gemma4TextConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, global_head_dim=8,
        num_kv_shared_layers=2, hidden_size_per_layer_input=8, vocab_size_per_layer_input=61,
        max_position_embeddings=64, sliding_window=8,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )  # fmt: skip
    model = transformers.Gemma4ForCausalLM(config).eval()
    texts = [list(range(3, 20)), list(range(9, 18))]
    comparison = compare_models(model, copy.deepcopy(model), texts, progress=False)
    assert {row.value for row in comparison.select("drift", "l2")} == {0.0}


@pytest.fixture
def traced(monkeypatch):
    """The models that were run to find their structure, one after another."""
    models = []
    trace = structure_module._trace

    def counted(model):
        models.append(model)
        return trace(model)

    monkeypatch.setattr(structure_module, "_trace", counted)
    return models


def test_a_structure_is_found_once(traced):
    model = make_tiny("llama")
    found = find_structure(model)
    assert find_structure(model) is found
    assert ResidualModel(model).structure is found
    adapter = lora(model, "llama")
    # Its linear layers are wrapped now: these are other modules.
    assert find_structure(adapter) is find_structure(adapter) is not found
    assert traced == [model, model]


def test_a_changed_module_tree_is_not_read_from_memory(traced):
    model = make_tiny("llama")
    before = find_structure(model)
    model.model.layers[1] = copy.deepcopy(model.model.layers[1])
    after = find_structure(model)
    assert after.blocks[1] is model.model.layers[1] is not before.blocks[1]
    model.lm_head = copy.deepcopy(model.lm_head)
    assert find_structure(model).head is model.lm_head
    assert find_structure(copy.deepcopy(model)).head is not model.lm_head
    assert len(traced) == 4


def test_a_known_structure_keeps_no_model_alive():
    model = make_tiny("llama")
    find_structure(model)
    held = weakref.ref(model)
    del model
    gc.collect()
    assert held() is None


def test_a_sweep_finds_the_structure_of_each_model_once(traced):
    base, tuned = make_tiny("llama"), perturbed(make_tiny("llama"), 0.1)
    patch_blocks(
        base, tuned, token_texts(4, shortest=6, longest=9),
        n_prompts=2, prompt_tokens=5, max_new_tokens=2, progress=False,
    )  # fmt: skip
    # Weight-sharing copies of the two.
    assert len(traced) == len(set(traced)) == 2
