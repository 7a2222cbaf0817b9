"""Adapters on bases of 4 bits (QLoRA): the same as on the numbers that those bits stand for."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_tiny
from torch import nn

from hyperlens import compare_models
from hyperlens.errors import TrainingError
from hyperlens.models.weight_sharing import REPACKS, keep_packing, weight_sharing_copy
from hyperlens.results.fingerprint import weights_sha256
from hyperlens.training import hyperfit, merge, to_hooked

# Rows and columns that are multiples of 64, as a block of one scale.
SIZES = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "vocab_size": 61}
OPTIONS = {
    "n_sequences": 6,
    "sequence_length": 12,
    "batch_size": 3,
    "epochs": 4,
    "learning_rate": 1e-2,
    "record_every": 2,
    "n_validation": 4,
    "n_prompts": 2,
    "prompt_tokens": 4,
    "new_tokens": 6,
    "progress": False,
}
IDS = torch.randint(3, 61, (10, 14), generator=torch.Generator().manual_seed(0)).tolist()


def quantised() -> Any:
    """A tiny Llama that says what transformers' models of 4 bits say of themselves."""
    model = make_tiny("llama")
    model.is_quantized, model.is_loaded_in_4bit = True, True
    model.quantization_method = "bitsandbytes"
    return model


def refusal(model: Any, method: str) -> str:
    with pytest.raises(TrainingError) as caught:
        hyperfit(model, IDS, method, **OPTIONS)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_cannot_be_trained_is_refused() -> None:
    model = quantised()
    assert "choose the method lora or late_lora" in refusal(model, "full")
    model.is_loaded_in_4bit = False
    assert "quantised (bitsandbytes)" in refusal(model, "lora")


def test_copies_are_not_repacked() -> None:
    """Repacking rounds scales, in weights that a copy shares with the caller's model."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    setattr(model[0], REPACKS, True)
    assert not getattr(weight_sharing_copy(model)[0], REPACKS)
    assert getattr(model[0], REPACKS)
    keep_packing(model)
    assert [vars(layer).get(REPACKS) for layer in model] == [False, None]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of a base of 4 bits, and of the float32 numbers that these stand for."""
    bitsandbytes = pytest.importorskip(
        "bitsandbytes", reason="no bitsandbytes: pip install 'hyperlens[qlora]'"
    )
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    folder = tmp_path_factory.mktemp("bases")
    make_tiny("llama", **SIZES).save_pretrained(folder / "whole")
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    four = AutoModelForCausalLM.from_pretrained(folder / "whole", quantization_config=config)
    four.save_pretrained(folder / "4 bits")
    whole = AutoModelForCausalLM.from_pretrained(folder / "whole")
    with torch.no_grad():
        for name, weight in four.named_parameters():
            if hasattr(weight, "quant_state"):
                numbers = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
                whole.get_parameter(name).copy_(numbers)
    whole.save_pretrained(folder / "its numbers")
    return folder / "4 bits", folder / "its numbers"


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("method", ["lora", "late_lora"])
def test_training_is_that_on_the_numbers(bases: tuple[Path, Path], tmp_path: Path, method: str):
    four, _ = bases
    late = {"last_k": 1} if method == "late_lora" else {}
    runs = [
        hyperfit(base, IDS, method, **OPTIONS | late, out=tmp_path / base.name) for base in bases
    ]
    one, other = runs
    assert one.history[-1] < one.history[0] - 0.1
    assert one.history == pytest.approx(other.history, abs=1e-4)
    for a, b in zip(one.records, other.records, strict=True):
        assert a.validation_loss == pytest.approx(b.validation_loss, abs=1e-4)
    assert bool(one.manifest["prefix_cache"]) == (method == "late_lora")
    if method == "late_lora":
        without = hyperfit(four, IDS, method, **OPTIONS | late, prefix_cache=False)
        assert without.history == one.history
    # The adapter names its base, and both are opened with the same 4 bits.
    name = json.loads((one.folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert name == str(four)
    table, expected = (
        compare_models(base, run.folder, IDS, probes=["drift"], progress=False)
        for base, run in zip(bases, runs, strict=True)
    )
    for row, wanted in zip(table.long, expected.long, strict=True):
        assert row.value == pytest.approx(wanted.value, abs=1e-3)
        if method == "late_lora" and row.metric == "l2" and row.layer < 3:
            assert row.value == 0.0


@pytest.mark.filterwarnings("ignore:Merge lora module to 4-bit linear:UserWarning")
def test_it_comes_back_hooked_and_merges_into_whole_weights(
    bases: tuple[Path, Path], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    four, numbers = bases
    run = hyperfit(four, IDS, "lora", **OPTIONS, out=tmp_path / "adapter")
    tokens = torch.tensor(IDS)
    with torch.no_grad():
        wanted = run.model(tokens).logits
        assert torch.equal(to_hooked(run, "residual")(tokens), wanted)
        with pytest.raises(TrainingError, match="is quantised: give one that is not"):
            merge(tmp_path / "adapter", tmp_path / "merged")
        merge(tmp_path / "adapter", tmp_path / "merged", base=numbers)
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        torch.testing.assert_close(merged(tokens).logits, wanted, atol=1e-3, rtol=1e-3)


def test_the_callers_model_is_left_as_it_is(bases: tuple[Path, Path]) -> None:
    from transformers import AutoModelForCausalLM

    four = AutoModelForCausalLM.from_pretrained(bases[0])
    before, sha256 = copy.deepcopy(four.state_dict()), weights_sha256(four)
    run = hyperfit(four, IDS, "late_lora", last_k=1, **OPTIONS)
    assert run.manifest["base"]["sha256"] == sha256 == weights_sha256(four)
    compare_models(four, run.model, IDS, probes=["drift"], progress=False)
    after = four.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    # Twice the base has the same packed weights: only the scales are others.
    for weight in four.parameters():
        if hasattr(weight, "quant_state"):
            weight.quant_state.absmax = 2 * weight.quant_state.absmax
    assert weights_sha256(four) != sha256
    four.model.layers[0].mlp.up_proj.weight.quant_state.packing_format_for_cpu = True
    assert "load it anew" in refusal(four, "lora")
