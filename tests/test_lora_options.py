"""Which weights are trained, and every kind of LoRA: each folder opens right on its base."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import D_VOCAB, make_tiny, short, unchecked
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM

from hyperlens import compare_models, load_hooked
from hyperlens.errors import HyperlensError, TrainingError
from hyperlens.training import hyperfit, pissa, preset, to_hooked
from hyperlens.training.adapters import (
    BlockList,
    find_block_list,
    projections,
    train_only,
    trained_blocks,
    with_adapter,
)
from hyperlens.training.folders import save

LENGTH = 8
FEW = {
    "n_sequences": 4,
    "sequence_length": LENGTH,
    "batch_size": 2,
    "epochs": 2,
    "record_every": 0,
    "progress": False,
}
# What has to come out the same whichever way a folder is opened.
CLOSE = {"atol": 1e-4, "rtol": 1e-4}


def ids(n: int = 4, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, D_VOCAB, (n, LENGTH), generator=generator).tolist()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor(ids())).logits  # type: ignore[no-any-return]


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def refusal(*args: Any, **options: Any) -> str:
    with pytest.raises(HyperlensError) as caught:
        hyperfit(*args, **(FEW | options))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Which blocks


def test_a_method_trains_its_blocks() -> None:
    assert trained_blocks(4, preset("li2026")) == (0, 1, 2, 3)
    assert trained_blocks(4, preset("li2026", "late_lora", last_k=3)) == (1, 2, 3)
    assert trained_blocks(4, preset("li2026", "lora", blocks=(3, 0))) == (0, 3)
    assert trained_blocks(4, preset("li2026", "full", blocks=(2,))) == (2,)


def test_blocks_that_are_not_there_are_refused() -> None:
    assert "choose 1 to 3" in refusal(make_tiny("llama"), ids(), "late_lora", last_k=4)
    line = refusal(make_tiny("llama"), ids(), "lora", blocks=(1, 3))
    assert "blocks has 3" in line
    assert "from 0 to 2" in line


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
def test_full_training_of_some_blocks_leaves_all_else_alone(name: str) -> None:
    base = make_tiny(name)
    run = hyperfit(base, ids(), "full", blocks=[2, 0], learning_rate=1e-2, **FEW)
    assert run.manifest["trained_blocks"] == [0, 2]
    blocks = find_block_list(base).blocks
    counted = sum(p.numel() for i in (0, 2) for p in blocks[i].parameters())
    assert run.manifest["trained_parameters"] == counted
    before, after = weights(base), weights(run.model)
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    where = {key.split(".")[2] for key in changed}
    assert where == {"0", "2"}
    assert all(f".{find_block_list(base).container}." in key for key in changed)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_lora_on_any_set_of_blocks(name: str, tmp_path: Path) -> None:
    base = make_tiny(name)
    options = {"blocks": (0, 2), "learning_rate": 1e-1, "lora_r": 2, "out": tmp_path / "run"}
    run = hyperfit(base, ids(), "lora", **FEW, **options)
    container = find_block_list(base).container
    trained = [n for n, p in run.model.named_parameters() if p.requires_grad]
    assert {n.split(f".{container}.")[1].split(".")[0] for n in trained} == {"0", "2"}
    config = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert config["layers_to_transform"] == [0, 2]


def test_weights_shared_with_a_frozen_block_cannot_be_trained() -> None:
    base = make_tiny("llama")
    block_list = find_block_list(base)
    layers = base.model.layers
    layers[2].mlp.down_proj.weight = layers[1].mlp.down_proj.weight
    with pytest.raises(TrainingError, match=r"layers\.2\.mlp\.down_proj\.weight shares"):
        train_only(base, block_list, (1,))
    train_only(base, block_list, (1, 2))
    assert not base.model.embed_tokens.weight.requires_grad


def test_tied_embeddings_stay_frozen_and_tied() -> None:
    base = make_tiny("qwen2")
    run = hyperfit(base, ids(), "full", blocks=(1,), learning_rate=1e-2, **FEW)
    model = run.model
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert torch.equal(model.get_input_embeddings().weight, base.get_input_embeddings().weight)


# Which projections


def test_only_the_named_projections_are_adapted() -> None:
    options = {"last_k": 1, "lora_r": 2, "target_modules": ("mlp.down_proj",)}
    run = hyperfit(make_tiny("llama"), ids(), "late_lora", **FEW, **options)
    assert run.manifest["trained_parameters"] == 2 * (32 + 48)


@pytest.mark.parametrize(
    ("asked", "near"),
    [("q_porj", "q_proj"), ("mlp.up_prj", "mlp.up_proj"), ("gate", "gate_proj")],
)
def test_an_unknown_projection_is_answered_with_the_nearest(asked: str, near: str) -> None:
    line = refusal(make_tiny("llama"), ids(), "lora", target_modules=(asked,))
    assert f"no module {asked!r}" in line
    hint, everything = line.split("the projections are ")
    assert near in hint
    assert everything == "q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj"


def test_a_projection_like_no_other_gets_the_list() -> None:
    line = refusal(make_tiny("llama"), ids(), "lora", target_modules=("wte",))
    assert "did you mean" not in line
    assert "the projections are q_proj" in line


def test_a_module_that_is_no_projection_is_refused() -> None:
    assert "PEFT cannot adapt mlp" in refusal(
        make_tiny("llama"), ids(), "lora", target_modules=("mlp",)
    )


def test_blocks_without_projections_are_refused() -> None:
    with pytest.raises(TrainingError, match="method='full'"):
        projections(BlockList((nn.LayerNorm(3),), "h"), preset("li2026", "lora"))


# Kinds of LoRA

KINDS = {
    "rslora": {"lora_rslora": True},
    "dora": {"lora_dora": True},
    "dora-rslora": {"lora_dora": True, "lora_rslora": True},
    "gaussian": {"lora_init": "gaussian"},
    "pissa": {"lora_init": "pissa"},
    "pissa-rslora": {"lora_init": "pissa", "lora_rslora": True, "lora_dropout": 0.25},
}
# A plain model; one with transposed and fused projections; one with fused and gated ones.
NAMES = ("llama", "gpt2", "phi3")
PAIRS = [
    *(("llama", kind) for kind in KINDS),
    *((name, kind) for name in NAMES[1:] for kind in ("dora-rslora", "pissa-rslora")),
]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases")
    for name in NAMES:
        make_tiny(name).save_pretrained(folder / name)
    return folder


def late(base: Any, **options: Any) -> Any:
    """Late-stage LoRA on the last of three blocks, with steps large enough to be seen."""
    given = {"last_k": 1, "lora_r": 4, "learning_rate": 3e-2, **FEW, **options}
    return hyperfit(base, ids(), "late_lora", **given)


@pytest.mark.parametrize(
    ("name", "kind"),
    short(PAIRS, ("llama", "gaussian"), ("gpt2", "dora-rslora"), ("phi3", "pissa-rslora")),
)
def test_every_kind_opens_right_everywhere(
    name: str, kind: str, bases: Path, tmp_path: Path
) -> None:
    base, out = bases / name, tmp_path / "run"
    run = late(base, out=out, device="cpu", **KINDS[kind])
    original = AutoModelForCausalLM.from_pretrained(base)
    assert not torch.allclose(logits(run.model), logits(original), atol=1e-2)
    # As peft opens it, on the base as it is on disk.
    opened = PeftModel.from_pretrained(original, out).eval()
    expected = logits(opened)
    torch.testing.assert_close(logits(run.model), expected, **CLOSE)
    assert list(out.glob("*/")) == []
    # As we open it.
    tokens = torch.tensor(ids())
    for backend in ("residual", "bridge"):
        hooked = load_hooked(out, backend=backend, device="cpu")
        found = hooked.run_with_hooks(tokens, return_type="logits", fwd_hooks=[])
        torch.testing.assert_close(found, expected, **CLOSE)
    # Nothing has moved before the one adapted block, and something has after it.
    comparison = compare_models(base, out, ids(6, seed=1), device="cpu", progress=False)
    drift = [comparison.value("drift", "l2", layer, "raw") for layer in range(4)]
    assert drift[:3] == [0, 0, 0]
    assert drift[3] > 0


@pytest.mark.parametrize(
    ("name", "kind"),
    short(PAIRS, ("llama", "gaussian"), ("gpt2", "dora-rslora"), ("phi3", "pissa-rslora")),
)
def test_every_kind_leaves_the_base_alone_and_starts_from_it(name: str, kind: str) -> None:
    base = make_tiny(name)
    before = weights(base)
    own_copy = copy.deepcopy(base)
    block_list = find_block_list(own_copy)
    recipe = preset("li2026", "late_lora", last_k=1, lora_r=4, **KINDS[kind])
    targets = projections(block_list, recipe)
    adapted = with_adapter(own_copy, None, block_list, (2,), targets, recipe).eval()
    torch.testing.assert_close(logits(adapted), logits(base), **CLOSE)
    run = late(base, **KINDS[kind])
    for model in (adapted, run.model):
        own = {
            key.removeprefix("base_model.model.").replace(".base_layer", ""): value
            for key, value in weights(model).items()
            if "lora_" not in key
        }
        assert own.keys() == before.keys()
        assert all(torch.equal(own[key], before[key]) for key in own)


@pytest.mark.parametrize("kind", short(KINDS, "dora-rslora"))
def test_every_kind_learns(kind: str) -> None:
    options = {"lora_r": 4, "lora_alpha": 4.0, "learning_rate": 2e-2} | FEW | {"epochs": 40}
    run = hyperfit(make_tiny("llama"), ids(), "lora", **options, **KINDS[kind])
    assert run.history[-1] < run.history[0] - 1


@pytest.mark.parametrize("kind", short(KINDS, "pissa-rslora"))
def test_the_seed_decides_every_bit(kind: str) -> None:
    first, again = (weights(late(make_tiny("llama"), **KINDS[kind]).model) for _ in range(2))
    assert first.keys() == again.keys()
    assert all(torch.equal(first[key], again[key]) for key in first)


def test_kinds_are_what_they_say(bases: Path, tmp_path: Path) -> None:
    for kind, options in KINDS.items():
        with unchecked():
            late(bases / "llama", out=tmp_path / kind, device="cpu", **options)
        config = json.loads((tmp_path / kind / "adapter_config.json").read_text())
        assert config["use_dora"] == ("dora" in kind)
        assert config["use_rslora"] == ("rslora" in kind)
        assert config["r"] == (8 if "pissa" in kind else 4)
        # Opening it must not decompose the base a second time.
        assert config["init_lora_weights"] in (True, "gaussian")
        assert config["base_model_name_or_path"] == str(bases / "llama")


def test_dora_trains_one_magnitude_per_output() -> None:
    options = {"target_modules": ("down_proj", "k_proj")}
    plain = late(make_tiny("llama"), **options).manifest["trained_parameters"]
    dora = late(make_tiny("llama"), lora_dora=True, **options).manifest["trained_parameters"]
    assert dora - plain == 32 + 16


def test_rslora_scales_by_the_root_of_the_rank() -> None:
    base = make_tiny("llama")
    recipe = preset("li2026", "lora", lora_r=4, lora_alpha=6.0, lora_rslora=True)
    adapted = with_adapter(base, None, find_block_list(base), (0,), ("q_proj",), recipe)
    assert adapted.base_model.model.model.layers[0].self_attn.q_proj.scaling == {"default": 3.0}


# PiSSA


def pissa_layer(**changes: Any) -> tuple[Any, Any, torch.Tensor]:
    """A model with a PiSSA adapter on one projection, that projection, and its original weight."""
    base = make_tiny("llama")
    weight = base.model.layers[1].mlp.down_proj.weight.detach().clone()
    recipe = preset("li2026", "lora", lora_r=4, lora_init="pissa", **changes)
    block_list = find_block_list(base)
    adapted = with_adapter(base, None, block_list, (1,), ("down_proj",), recipe).eval()
    return adapted, adapted.base_model.model.model.layers[1].mlp.down_proj, weight


def test_pissa_starts_from_the_principal_directions() -> None:
    _, layer, weight = pissa_layer()
    start = layer.get_delta_weight("default").detach()
    values = torch.linalg.svdvals(weight)
    found = torch.linalg.svdvals(start)
    torch.testing.assert_close(found[:4], values[:4], **CLOSE)
    torch.testing.assert_close(found[4:], torch.zeros_like(found[4:]), atol=1e-4, rtol=0.0)
    # What is left is the rest: taking the directions away was right.
    rest = torch.linalg.svdvals(weight - start)
    torch.testing.assert_close(rest[:-4], values[4:], **CLOSE)


def test_only_half_of_pissa_is_trained() -> None:
    adapted, layer, _ = pissa_layer(lora_dropout=0.5)
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert [name.split("down_proj.")[1] for name in trained] == [
        "lora_A.default.weight",
        "lora_B.default.weight",
    ]
    # What is taken away is taken away whole.
    assert isinstance(layer.lora_dropout["default"], nn.Dropout)
    assert isinstance(layer.lora_dropout[pissa.SUBTRACTED], nn.Identity)


@pytest.mark.parametrize("rslora", [False, True])
def test_joining_changes_nothing_but_the_form(rslora: bool) -> None:
    adapted, layer, weight = pissa_layer(lora_rslora=rslora)
    with torch.no_grad():
        layer.lora_B["default"].weight += 0.1
    before, scale = logits(adapted), layer.scaling["default"]
    assert not torch.allclose(before, logits(make_tiny("llama")), atol=1e-3)
    pissa.join(adapted)
    torch.testing.assert_close(logits(adapted), before, **CLOSE)
    assert list(adapted.peft_config) == ["default"]
    assert adapted.peft_config["default"].r == layer.r["default"] == 8
    alpha = adapted.peft_config["default"].lora_alpha
    assert alpha / (8**0.5 if rslora else 8) == pytest.approx(scale)
    assert torch.equal(layer.base_layer.weight, weight)
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted), logits(make_tiny("llama")))
    once = weights(adapted)
    pissa.join(adapted)
    assert all(torch.equal(once[key], value) for key, value in weights(adapted).items())


@pytest.mark.parametrize("backend", ["residual", "bridge"])
def test_a_run_that_is_not_saved_comes_back_hooked(backend: Any) -> None:
    run = late(make_tiny("phi3"), lora_init="pissa")
    tokens = torch.tensor(ids())
    found = to_hooked(run, backend).run_with_hooks(tokens, return_type="logits", fwd_hooks=[])
    torch.testing.assert_close(found, logits(run.model), **CLOSE)


def test_saving_joins_what_is_not_joined_yet(tmp_path: Path) -> None:
    adapted, _, _ = pissa_layer()
    before = logits(adapted)
    save(tmp_path / "run", adapted, None, {})
    opened = PeftModel.from_pretrained(make_tiny("llama"), tmp_path / "run").eval()
    torch.testing.assert_close(logits(opened), before, **CLOSE)


def test_pissa_that_cannot_be_is_refused() -> None:
    options = {"lora_init": "pissa", "target_modules": ("k_proj",)}
    line = refusal(make_tiny("llama"), ids(), "lora", lora_r=17, **options)
    assert "lora_r is 17" in line
    assert "16 principal directions" in line
    double = make_tiny("llama").double()
    assert "float64" in refusal(double, ids(), "lora", lora_r=4, **options)


def test_pissa_over_bfloat16_weights(tmp_path: Path) -> None:
    base = make_tiny("llama").to(torch.bfloat16)
    before = weights(base)
    run = late(base, lora_init="pissa", out=tmp_path / "run")
    assert all(torch.equal(before[key], value) for key, value in weights(base).items())
    opened = PeftModel.from_pretrained(make_tiny("llama").to(torch.bfloat16), tmp_path / "run")
    found, expected = logits(opened.eval()), logits(run.model)
    # The last bits of bfloat16, which the two halves being added in another order may move.
    torch.testing.assert_close(found.float(), expected.float(), atol=5e-2, rtol=2e-2)
