"""LoRA on mixtures of experts: no block is trained that is said to be frozen, and all is said."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import D_VOCAB, SIZES, make_tiny
from peft import PeftModel
from transformers import AutoModelForCausalLM

from hyperlens.errors import TrainingError
from hyperlens.training import hyperfit
from hyperlens.training.adapters import find_block_list, projections
from hyperlens.training.recipes import preset

LENGTH = 8
FEW = {
    "n_sequences": 4,
    "sequence_length": LENGTH,
    "batch_size": 2,
    "epochs": 2,
    "lora_r": 2,
    "learning_rate": 1e-1,
    "record_every": 0,
    "progress": False,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
MIXTURES = {
    # A dense block, then two with experts and a shared one, whose projections have the names that
    # experts' weights once had.
    "glm": (
        "Glm4MoeConfig",
        {"n_routed_experts": 4, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
    ),
    # Projections of attention and experts, nothing else.
    "mixtral": ("MixtralConfig", {"num_local_experts": 4}),
    # A router that is a linear layer by its class and returns a tuple.
    "llama4": (
        "Llama4TextConfig",
        {"num_local_experts": 4, "interleave_moe_layer_step": 1, "intermediate_size_mlp": 48},
    ),
    "phimoe": ("PhimoeConfig", {"num_local_experts": 4}),
}


def make(name: str) -> Any:
    kind, options = MIXTURES[name]
    torch.manual_seed(0)
    config = getattr(transformers, kind)(**(SIZES | {"head_dim": 8} | EXPERTS | options))
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model


def ids() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, D_VOCAB, (4, LENGTH), generator=generator).tolist()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor(ids())).logits  # type: ignore[no-any-return]


def adapted(run: Any) -> dict[str, set[str]]:
    """What has an adapter, by block."""
    found: dict[str, set[str]] = {}
    for name, _ in run.model.named_parameters():
        if ".lora_" in name:
            block, path = name.split(".lora_")[0].split(".layers.")[1].split(".", 1)
            found.setdefault(block, set()).add(path.replace(".base_layer", ""))
    return found


# Of peft, which looks for its own ranks of experts among modules.
@pytest.mark.filterwarnings("ignore:.*_pattern keys did not match:RuntimeWarning")
def test_experts_of_frozen_blocks_get_no_adapter(tmp_path: Path) -> None:
    base, out = make("glm"), tmp_path / "run"
    run = hyperfit(base, ids(), "late_lora", last_k=1, out=out, **FEW)
    assert run.manifest["trained_blocks"] == [2]
    assert adapted(run).keys() == {"2"}
    assert "mlp.experts" in adapted(run)["2"]
    assert run.manifest["target_modules"] == ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert run.manifest["target_parameters"] == [
        f"model.layers.2.mlp.experts.{name}" for name in ("down_proj", "gate_up_proj")
    ]
    (note,) = [note for note in run.manifest["notes"] if "no adapter on" in note]
    assert "mlp.shared_experts.gate_proj" in note
    assert "experts.gate_up_proj" not in note
    # As peft itself opens what was saved.
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["layers_to_transform"] == [2]
    opened = PeftModel.from_pretrained(make("glm"), out).eval()
    torch.testing.assert_close(logits(opened), logits(run.model), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits(opened), logits(base), atol=1e-3)


def test_a_dense_block_of_a_mixture_says_what_it_lacks() -> None:
    run = hyperfit(make("glm"), ids(), "lora", blocks=(0,), **FEW)
    attention = {f"self_attn.{name}_proj" for name in "qkvo"}
    assert adapted(run) == {"0": attention}
    assert run.manifest["target_parameters"] == []
    assert "no adapter on the linear layers mlp.gate_proj, mlp.up_proj" in run.manifest["notes"][-1]
    names = ("gate_proj", "up_proj", "down_proj")
    with pytest.raises(TrainingError, match="PEFT cannot adapt"):
        hyperfit(make("glm"), ids(), "lora", blocks=(0,), target_modules=names, **FEW)


def test_experts_that_are_left_out_are_named() -> None:
    run = hyperfit(make("mixtral"), ids(), "late_lora", last_k=1, **FEW)
    assert run.manifest["target_modules"] == ["q_proj", "k_proj", "v_proj", "o_proj"]
    said = "no adapter on mlp.experts.gate_up_proj, mlp.experts.down_proj"
    assert said in run.manifest["notes"][-1]
    # Whoever names projections knows what is left out.
    options = {"last_k": 1, "target_modules": ("q_proj",)}
    for model in (make("mixtral"), make_tiny("llama")):
        run = hyperfit(model, ids(), "late_lora", **FEW, **options)
        assert not any("no adapter" in note for note in run.manifest["notes"])
    run = hyperfit(make_tiny("llama"), ids(), "late_lora", last_k=1, **FEW)
    assert not any("no adapter" in note for note in run.manifest["notes"])


@pytest.mark.parametrize("name", ["llama4", "phimoe"])
def test_a_router_is_no_projection(name: str) -> None:
    run = hyperfit(make(name), ids(), "late_lora", last_k=1, **FEW)
    assert run.history[-1] < run.history[0]
    assert "router" not in run.manifest["target_modules"]
    with pytest.raises(TrainingError, match="router does not return what a linear projection does"):
        hyperfit(make(name), ids(), "lora", target_modules=("router",), **FEW)


def test_a_linear_layer_with_a_forward_of_its_own_is_one() -> None:
    torch.manual_seed(0)
    config = transformers.FalconConfig(
        vocab_size=D_VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4
    )
    stack = find_block_list(AutoModelForCausalLM.from_config(config).eval())
    found = projections(stack, preset("li2026", "lora"))
    assert set(found) == {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}


def test_pissa_has_no_directions_for_several_experts() -> None:
    with pytest.raises(TrainingError, match=r"layers\.2\.mlp\.experts holds several experts"):
        hyperfit(make("glm"), ids(), "late_lora", last_k=1, lora_init="pissa", **FEW)
