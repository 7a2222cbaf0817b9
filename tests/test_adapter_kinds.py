"""Adapters that could go wrong without a word, beside the matrix of all kinds."""

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from conftest import lora, make_tiny, token_texts
from memory_for_tests import PROC
from peft.tuners.lora.config import CordaConfig, LoraGAConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga
from transformers import AutoModelForCausalLM

from hyperlens import compare_models, run_null_test
from hyperlens.errors import LoadingError, PairError
from hyperlens.models.adapters import LOST
from hyperlens.models.sources import open_source
from hyperlens.training import merge

TOKENS = torch.arange(3, 23).view(2, 10)
CLOSE = {"atol": 1e-4, "rtol": 1e-4}
LINEAR = ["q_proj", "v_proj", "down_proj"]
LORA: dict[str, dict[str, Any]] = {
    "plain": {},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "pissa_niter": {"init_lora_weights": "pissa_niter_2"},
    "lora_ga": {"init_lora_weights": "lora_ga", "lora_ga_config": LoraGAConfig()},
    "corda": {"init_lora_weights": "corda", "corda_config": CordaConfig()},
}


def config_of(kind: str) -> Any:
    if kind == "hira":
        return peft.HiraConfig(target_modules=LINEAR, r=4)
    return peft.LoraConfig(**{"r": 4, "target_modules": LINEAR} | LORA[kind])


def saved(kind: str, tied: bool, folder: Path) -> tuple[Any, Path]:
    """A base, and the folder of an adapter with every trainable weight moved.

    Beside it is `converted`, the same adapter as plain LoRA.
    """
    base = make_tiny("llama", tie_word_embeddings=tied, attention_bias=True)
    base.save_pretrained(folder / "base")
    own, config = AutoModelForCausalLM.from_pretrained(folder / "base"), config_of(kind)
    if kind == "corda":
        preprocess_corda(own, config, run_model=lambda: own(input_ids=TOKENS[:1]))
    if kind == "lora_ga":
        preprocess_loraga(own, config, lambda: own(TOKENS, labels=TOKENS).loss.backward())
    trained = peft.get_peft_model(own, config)
    if kind in LOST:
        trained.save_pretrained(folder / "initial")
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in trained.parameters():
            if weight.requires_grad:
                weight += 0.1 * torch.randn_like(weight)
    trained.save_pretrained(folder / "adapter")
    if kind in LOST:
        torch.save(logits(trained), folder / "as_trained")
        initial = str(folder / "initial")
        trained.save_pretrained(
            folder / "converted", path_initial_model_for_weight_conversion=initial
        )
    return base, folder / "adapter"


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS, use_cache=False).logits.float()


def by_peft(folder: Path) -> torch.Tensor:
    base = AutoModelForCausalLM.from_pretrained(folder.parent / "base")
    return logits(peft.PeftModel.from_pretrained(base, str(folder)))


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


@pytest.mark.parametrize("kind", LOST)
@pytest.mark.filterwarnings("ignore")
def test_an_adapter_that_peft_reads_otherwise_is_refused(kind: str, tmp_path: Path) -> None:
    """How it changed the base when it was made is not in its folder; the converted one has it."""
    base, folder = saved(kind, False, tmp_path)
    wanted = torch.load(tmp_path / "as_trained")
    if kind != "corda":  # which peft does not open at all
        assert not torch.allclose(by_peft(folder), wanted, atol=1e-3)
    with pytest.raises(LoadingError, match=rf"{kind}.*path_initial_model_for_weight_conversion"):
        open_source(folder, base=open_source(base))
    opened = open_source(tmp_path / "converted", base=open_source(base))
    torch.testing.assert_close(logits(opened.model), wanted, **CLOSE)


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
    with pytest.raises(LoadingError, match=r"does \d+% of what the adapter does .*--dtype float32"):
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


MEMORY = """
import copy, os, sys, tempfile, warnings
sys.path.insert(0, sys.argv[1])
import peft, torch
from conftest import make_tiny
from memory_for_tests import forget_peak, peak
from hyperlens.models.sources import open_source
torch.set_num_threads(1)
warnings.simplefilter("ignore")
sizes = {"hidden_size": 512, "intermediate_size": 1024, "vocab_size": 8000}
base = make_tiny("llama", attention_bias=True, **sizes)
opened = open_source(base)
shared = {weight.untyped_storage().data_ptr() for weight in base.parameters()}
folders = []
for options in (
    {},
    {"bias": "all"},
    {"init_lora_weights": "orthogonal"},
    {"modules_to_save": ["lm_head"]},
    {"modules_to_save": ["mlp"], "target_modules": ["q_proj"]},
    {"embeddings": True},
):
    embeddings = options.pop("embeddings", False)
    config = peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj", "down_proj"]} | options)
    adapted = peft.get_peft_model(copy.deepcopy(base), config)
    if embeddings:
        adapted.get_input_embeddings().weight.data += 1
    folders.append(tempfile.mkdtemp())
    adapted.save_pretrained(folders[-1], save_embedding_layers=embeddings)
    del adapted
open_source(folders[0], base=opened)  # loads what is loaded once
for folder in folders:
    held = forget_peak()
    adapter = open_source(folder, base=opened)
    most = peak() - held
    own = {w.untyped_storage().data_ptr(): w.nbytes for w in adapter.model.parameters()}
    stored = os.path.getsize(folder + "/adapter_model.safetensors")
    print(most, sum(size for place, size in own.items() if place not in shared), stored)
    del adapter
"""


@pytest.mark.long
@pytest.mark.skipif(not PROC.exists(), reason="peak memory is read as Linux gives it")
def test_an_adapter_takes_what_it_stores_and_no_copy_of_the_base() -> None:
    """Whole modules and embeddings in its file included; the base has 58 MiB."""
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(Path(__file__).parent)],
        capture_output=True,
        text=True,
        check=True,
    )
    for line in done.stdout.splitlines():
        most, own, stored = map(int, line.split())
        assert own <= stored
        assert most <= own + 2 * 2**20


def test_what_is_tied_to_a_saved_module_is_not_held_twice(tmp_path: Path) -> None:
    """With `ensure_weight_tying` peft makes a copy for the tied head, as it does for the module."""
    base = make_tiny("llama", tie_word_embeddings=True)
    options = {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    trained = lora(copy.deepcopy(base), "llama", **options)
    trained.save_pretrained(tmp_path / "adapter")
    opened = open_source(tmp_path / "adapter", base=open_source(base)).model.base_model.model
    for module in (opened.model.embed_tokens, opened.lm_head):
        assert module.original_module.weight.data_ptr() == base.lm_head.weight.data_ptr()
        assert module.modules_to_save.default.weight.data_ptr() != base.lm_head.weight.data_ptr()
