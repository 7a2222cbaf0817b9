"""Adapters of many kinds: read as plain peft reads them, merged right, and the base left alone."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from conftest import make_tiny, short, token_texts
from transformers import AutoModelForCausalLM

from hyperlens import compare_models, run_null_test
from hyperlens.errors import LoadingError, PairError
from hyperlens.models.sources import open_source
from hyperlens.training import merge

LINEAR = ["q_proj", "v_proj", "down_proj"]
LORA: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias lora_only": {"bias": "lora_only"},
    "bias all": {"bias": "all"},
    "dora rslora": {"use_dora": True, "use_rslora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "head saved": {"modules_to_save": ["lm_head"]},
    "embedding saved": {"modules_to_save": ["embed_tokens"]},
    "tokens": {"trainable_token_indices": [3, 4, 5]},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    "parameters": {"target_parameters": ["mlp.up_proj.weight"]},
    "replicated blocks": {"layer_replication": [(0, 2), (1, 3)]},
}
OTHERS: dict[str, Any] = {
    "ia3": lambda: peft.IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "loha": lambda: peft.LoHaConfig(target_modules=LINEAR, r=2),
    "lokr": lambda: peft.LoKrConfig(target_modules=LINEAR, r=2),
    "oft": lambda: peft.OFTConfig(target_modules=LINEAR, oft_block_size=4, r=0),
    "vera": lambda: peft.VeraConfig(target_modules=["q_proj"], r=4),
    "hira": lambda: peft.HiraConfig(target_modules=LINEAR, r=4),
    "hra": lambda: peft.HRAConfig(target_modules=LINEAR, r=2),
    "fourier": lambda: peft.FourierFTConfig(target_modules=LINEAR, n_frequency=8),
    "ln": lambda: peft.LNTuningConfig(target_modules=["input_layernorm"], task_type="CAUSAL_LM"),
    "adalora": lambda: peft.AdaLoraConfig(target_modules=LINEAR, total_step=10),
}
CASES = [(kind, tied) for kind in [*LORA, *OTHERS] for tied in (False, True)]
QUICK = [
    ("bias all", False),
    ("olora", False),
    ("head", True),
    ("embedding", True),
    ("tokens", True),
    ("replicated blocks", True),
    ("hira", False),
]


def config_of(kind: str) -> Any:
    if kind in OTHERS:
        return OTHERS[kind]()
    return peft.LoraConfig(**{"r": 4, "target_modules": LINEAR} | LORA[kind])


def saved(kind: str, tied: bool, folder: Path) -> tuple[Any, Path]:
    """A base, and the folder of an adapter with every trainable weight moved."""
    base = make_tiny("llama", tie_word_embeddings=tied, attention_bias=True)
    base.save_pretrained(folder / "base")
    trained = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder / "base"), config_of(kind)
    )
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in trained.parameters():
            if weight.requires_grad:
                weight += 0.1 * torch.randn_like(weight)
    trained.save_pretrained(folder / "adapter")
    return base, folder / "adapter"


def logits(model: Any) -> torch.Tensor:
    tokens = torch.arange(3, 23).view(2, 10)
    with torch.no_grad():
        return model.eval()(input_ids=tokens, use_cache=False).logits.float()


def by_peft(folder: Path) -> torch.Tensor:
    base = AutoModelForCausalLM.from_pretrained(folder.parent / "base")
    return logits(peft.PeftModel.from_pretrained(base, str(folder)))


@pytest.mark.parametrize(("kind", "tied"), short(CASES, *QUICK))
@pytest.mark.filterwarnings("ignore")
def test_read_as_plain_peft_reads_it_and_the_base_is_left_alone(
    kind: str, tied: bool, tmp_path: Path
) -> None:
    base, folder = saved(kind, tied, tmp_path)
    before = copy.deepcopy(base.state_dict())
    wanted = by_peft(folder)
    for _ in range(2):
        opened = open_source(folder, base=open_source(base))
        torch.testing.assert_close(logits(opened.model), wanted, atol=1e-5, rtol=1e-5)
        for name, weight in base.state_dict().items():
            assert torch.equal(weight, before[name]), name
    merged = merge(folder, tmp_path / "merged", base=base)
    again = logits(AutoModelForCausalLM.from_pretrained(merged))
    torch.testing.assert_close(again, wanted, atol=1e-4, rtol=1e-3)
    for name, weight in base.state_dict().items():
        assert torch.equal(weight, before[name]), name


@pytest.mark.filterwarnings("ignore")
def test_embeddings_stored_beside_an_adapter_are_its_own(tmp_path: Path) -> None:
    base, _ = saved("plain", False, tmp_path)
    trained = peft.get_peft_model(copy.deepcopy(base), config_of("plain"))
    with torch.no_grad():
        trained.get_input_embeddings().weight[3:7] += 1
    trained.save_pretrained(tmp_path / "whole", save_embedding_layers=True)
    before = copy.deepcopy(base.state_dict())
    opened = open_source(tmp_path / "whole", base=open_source(base))
    torch.testing.assert_close(logits(opened.model), by_peft(tmp_path / "whole"))
    assert all(torch.equal(weight, before[name]) for name, weight in base.state_dict().items())


@pytest.mark.filterwarnings("ignore")
def test_merging_leaves_the_callers_adapter_alone(tmp_path: Path) -> None:
    """HiRA merges in place, into tensors that the caller's model has too."""
    base, folder = saved("hira", False, tmp_path)
    adapted = peft.PeftModel.from_pretrained(base, str(folder))
    before = copy.deepcopy(adapted.state_dict())
    merge(adapted, tmp_path / "merged")
    assert all(torch.equal(weight, before[name]) for name, weight in adapted.state_dict().items())


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_that_peft_reads_anew_each_time_is_refused(tmp_path: Path) -> None:
    """Its directions are drawn at random when it is made, and again whenever it is read."""
    LORA["pissa_niter"] = {"init_lora_weights": "pissa_niter_2"}
    try:
        base, folder = saved("pissa_niter", False, tmp_path)
    finally:
        del LORA["pissa_niter"]
    assert not torch.allclose(by_peft(folder), by_peft(folder), atol=1e-3)
    with pytest.raises(LoadingError, match=r"pissa_niter_2.*path_initial_model_for_weight_conv"):
        open_source(folder, base=open_source(base))


@pytest.mark.filterwarnings("ignore")
def test_a_merge_that_rounds_the_adapter_away_is_refused(tmp_path: Path) -> None:
    """In bfloat16 a change below half a unit in the last place of a weight is none."""
    base = make_tiny("llama").to(torch.bfloat16)
    trained = peft.get_peft_model(copy.deepcopy(base), config_of("plain"))
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in trained.parameters():
            if weight.requires_grad:
                weight += 1e-4 * torch.randn_like(weight)
    trained.save_pretrained(tmp_path / "adapter")
    with pytest.raises(LoadingError, match=r"does \d+% of what it does .*--dtype float32"):
        merge(tmp_path / "adapter", tmp_path / "merged", base=base)
    assert not (tmp_path / "merged").exists()
    assert merge(tmp_path / "adapter", tmp_path / "wide", base=base, dtype="float32").exists()


@pytest.mark.filterwarnings("ignore")
def test_a_resized_vocabulary_is_said(tmp_path: Path) -> None:
    base = make_tiny("llama")
    larger = copy.deepcopy(base)
    larger.resize_token_embeddings(64, mean_resizing=False)
    trained = peft.get_peft_model(larger, config_of("head"))
    trained.save_pretrained(tmp_path / "adapter")
    with pytest.raises(PairError, match=r"trained with 64 tokens, .* has 61: resize the base"):
        open_source(tmp_path / "adapter", base=open_source(base))


@pytest.mark.filterwarnings("ignore")
def test_a_tie_that_an_adapter_breaks_is_broken_everywhere(tmp_path: Path) -> None:
    base, folder = saved("head", True, tmp_path)
    texts = token_texts(8)
    adapter = compare_models(base, folder, texts, progress=False)
    merged = compare_models(
        base, merge(folder, tmp_path / "merged", base=base), texts, progress=False
    )
    for one, other in zip(adapter.long, merged.long, strict=True):
        assert one.value == pytest.approx(other.value, rel=1e-3, abs=1e-3), one
    few = {"prompt_tokens": 4, "max_new_tokens": 2, "n_prompts": 2, "n_controls": 1}
    found = run_null_test(base, folder, texts, **few, progress=False)
    assert found.extras["changed_tensors"] == 4
