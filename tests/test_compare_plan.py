"""`compare --dry-run`: the size of a comparison from configurations alone."""

import json
from pathlib import Path

import pytest
import torch
from conftest import lora, make_tiny, token_texts
from torch.utils.flop_counter import FlopCounterMode

from hyperlens.compare.plan import plan_comparison
from hyperlens.errors import LoadingError

# All of one length, so that no pads are read.
TEXTS = token_texts(6, shortest=9, longest=9)
N = sum(map(len, TEXTS))


def planned(*models, **options):
    found = plan_comparison(*models, TEXTS, device="cpu", **options)
    return found, {part.name: part for part in found.parts}


@pytest.fixture(scope="module")
def model():
    return make_tiny("llama")


@pytest.fixture(scope="module")
def config_folder(model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("config")
    (folder / "config.json").write_text(json.dumps(model.config.to_dict()))
    return folder


@pytest.fixture(scope="module")
def whole(config_folder: Path):
    return planned(str(config_folder), str(config_folder))


def test_operations_are_those_that_torch_counts(model, whole) -> None:
    """Of the blocks' products and attention; and of the head at every layer of both models."""
    found, parts = whole
    seen = make_tiny("llama")
    seen.set_attn_implementation("eager")  # its products are not counted where they are one call
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        seen(input_ids=torch.tensor(TEXTS))
    head = 2 * N * model.lm_head.weight.numel()
    in_blocks = counter.get_total_flops() - head
    # Norms and biases are counted as products here: a few numbers beside the matrices.
    assert parts["reading"].flops == pytest.approx(2 * in_blocks, rel=0.02)
    decisions, layers = N - len(TEXTS), model.config.num_hidden_layers + 1
    assert parts["logit lens"].flops == pytest.approx(2 * layers * head * decisions / N)
    assert (found.n_texts, found.n_tokens, found.n_passes) == (len(TEXTS), N, 1)
    assert found.seconds == sum(part.seconds for part in found.parts) > 0
    assert "logit lens" in str(found)


def test_weights_are_neither_needed_nor_forgotten(model, whole, config_folder, tmp_path) -> None:
    found, _ = whole
    weights = 4 * sum(one.numel() for one in model.parameters())
    assert found.bytes_read == 2 * weights
    lora(make_tiny("llama"), "llama", layers_to_transform=[2]).save_pretrained(tmp_path / "adapter")
    late, parts = planned(str(config_folder), str(tmp_path / "adapter"))
    assert found.memory - late.memory == pytest.approx(weights - (late.bytes_read - weights))
    blocks = model.config.num_hidden_layers
    reading = parts["reading"].flops / whole[1]["reading"].flops
    assert reading == pytest.approx((2 * blocks - 2) / (2 * blocks))
    # Layers 0 to 2 are the same in both.
    assert parts["logit lens"].flops / whole[1]["logit lens"].flops == pytest.approx(
        (blocks + 1 - 1.5) / (blocks + 1)
    )
    with pytest.raises(LoadingError, match="cannot read a configuration"):
        planned(str(tmp_path), str(tmp_path))


def test_a_plan_follows_the_options(whole, config_folder) -> None:
    both = (str(config_folder), str(config_folder))
    _, parts = planned(*both, probes=["logit_lens"], lens_tokens=3)
    assert set(parts) == {"hashing the weights", "reading", "logit lens"}
    layers, decisions = 4, N - len(TEXTS)
    of_sample = (3 * len(TEXTS) * (layers - 1) + decisions) / (decisions * layers)
    assert parts["logit lens"].flops / whole[1]["logit lens"].flops == pytest.approx(of_sample)
    many, parts = planned(*both, probes=["logit_lens"], n_tuned=3)
    assert parts["logit lens"].flops == 3 * whole[1]["logit lens"].flops
    assert many.bytes_read == 2 * whole[0].bytes_read  # four models instead of two
    texts = ["once upon a time there was a plan"] * 3
    guessed = plan_comparison(*both, texts, device="cpu", probes=["drift"])
    assert guessed.n_tokens == 3 * (len(texts[0]) // 4)
    assert "no tokenizer" in guessed.notes[0]
