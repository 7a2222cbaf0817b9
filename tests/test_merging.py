"""Adapter, full and merged folders: each opens in plain transformers or peft, and in ours."""

import json
import os
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from conftest import D_VOCAB, lora, make_tiny
from peft import PeftModel
from test_corpus import make_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from hyperlens import compare_models, load_hooked
from hyperlens.errors import HyperlensError, LoadingError
from hyperlens.hooks.loading import check_backend
from hyperlens.models.kinds import Backend
from hyperlens.training import hyperfit, merge

LENGTH = 8
OPTIONS: dict[str, Any] = {
    "n_sequences": 4,
    "sequence_length": LENGTH,
    "epochs": 3,
    "batch_size": 2,
    "learning_rate": 3e-2,
    "record_every": 0,
    "device": "cpu",
    "progress": False,
}
CLOSE = {"atol": 1e-4, "rtol": 1e-4}


def ids(n: int = 4, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, D_VOCAB, (n, LENGTH), generator=generator).tolist()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor(ids())).logits  # type: ignore[no-any-return]


def refusal(*args: Any, **options: Any) -> str:
    with pytest.raises(HyperlensError) as caught:
        merge(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, full, adapter and merged: folders of one Llama; not to be changed."""
    folder = tmp_path_factory.mktemp("merging")
    make_tiny("llama").save_pretrained(folder / "base")
    make_tokenizer().save_pretrained(folder / "base")
    base = folder / "base"
    hyperfit(base, ids(), "full", out=folder / "full", **OPTIONS)
    hyperfit(base, ids(), "late_lora", last_k=1, lora_r=4, out=folder / "adapter", **OPTIONS)
    assert merge(folder / "adapter", folder / "merged") == folder / "merged"
    return folder


def plain(home: Path, name: str) -> Any:
    """A folder as transformers and peft open it, without us."""
    if name != "adapter":
        return AutoModelForCausalLM.from_pretrained(home / name)
    base = AutoModelForCausalLM.from_pretrained(home / "base")
    return PeftModel.from_pretrained(base, home / name).eval()


FOLDERS = ("full", "adapter", "merged")


@pytest.mark.parametrize("backend", get_args(Backend))
@pytest.mark.parametrize("name", FOLDERS)
def test_every_folder_opens_in_every_backend(name: str, backend: Any, home: Path) -> None:
    try:
        check_backend(backend)
    except LoadingError:
        pytest.skip("the installed TransformerLens has no HookedTransformer")
    hooked = load_hooked(home / name, backend=backend, device="cpu")
    found = hooked.run_with_hooks(torch.tensor(ids()), return_type="logits", fwd_hooks=[])
    torch.testing.assert_close(found, logits(plain(home, name)), **CLOSE)


@pytest.mark.parametrize("name", FOLDERS)
def test_every_folder_can_be_compared(name: str, home: Path) -> None:
    tuned = home / name
    comparison = compare_models(home / "base", tuned, ids(6, 1), device="cpu", progress=False)
    first, last = (comparison.value("drift", "l2", layer, "raw") for layer in (2, 3))
    assert (first == 0) == (name != "full")
    assert last > 0


def test_merged_says_what_base_and_adapter_say(home: Path) -> None:
    merged, adapted = plain(home, "merged"), plain(home, "adapter")
    torch.testing.assert_close(logits(merged), logits(adapted), **CLOSE)
    assert not torch.allclose(logits(merged), logits(plain(home, "base")), atol=1e-2)
    assert type(merged).__name__ == "LlamaForCausalLM"
    # Blocks without an adapter are the base's, bit for bit.
    base = plain(home, "base").state_dict()
    same = {key for key, value in merged.state_dict().items() if torch.equal(value, base[key])}
    assert {key for key in base if ".layers.2." not in key} <= same
    assert "model.layers.2.mlp.up_proj.weight" not in same


def test_a_merged_folder_is_a_standard_one(home: Path) -> None:
    names = {path.name for path in (home / "merged").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "hyperfit.json"} <= names
    assert not any("adapter" in name for name in names)
    vocabulary = AutoTokenizer.from_pretrained(home / "merged").get_vocab()
    assert vocabulary == make_tokenizer().get_vocab()
    record = json.loads((home / "merged" / "hyperfit.json").read_text())
    made = json.loads((home / "adapter" / "hyperfit.json").read_text())
    assert record["recipe"] == made["recipe"]
    assert record["merged"] == {"adapter": str(home / "adapter"), "base": str(home / "base")}
    assert len({path.stat().st_mode for path in (home / "merged").iterdir()}) == 1


@pytest.mark.parametrize("kind", [{"lora_dora": True}, {"lora_init": "pissa"}], ids=str)
def test_a_run_is_merged_as_its_folder_is(kind: dict[str, Any], home: Path, tmp_path: Path) -> None:
    options = OPTIONS | {"lora_r": 4, "target_modules": ["down_proj"]} | kind
    run = hyperfit(home / "base", ids(), "lora", out=tmp_path / "adapter", **options)
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    merge(run, tmp_path / "a")
    merge((run.model, run.tokenizer), tmp_path / "b")
    merge(tmp_path / "adapter", tmp_path / "c")
    after = run.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    expected = logits(run.model)
    for name in "abc":
        torch.testing.assert_close(logits(plain(tmp_path, name)), expected, **CLOSE)
        assert (tmp_path / name / "tokenizer.json").exists()


def test_the_record_is_that_of_the_run_and_not_of_its_base(home: Path, tmp_path: Path) -> None:
    run = hyperfit(home / "full", ids(), "lora", **OPTIONS | {"epochs": 2, "lora_r": 4})
    merge(run, tmp_path / "a")
    record = json.loads((tmp_path / "a" / "hyperfit.json").read_text())
    assert (record["recipe"]["method"], record["recipe"]["epochs"]) == ("lora", 2)
    assert record["history"] == list(run.history)
    assert record["manifest"] == run.manifest
    assert record["merged"] == {"adapter": "PeftModelForCausalLM", "base": str(home / "full")}
    # Of a bare model nothing is known: what lies in its base's folder is about the base.
    merge((run.model, run.tokenizer), tmp_path / "b")
    record = json.loads((tmp_path / "b" / "hyperfit.json").read_text())
    assert record.keys() == {"merged", "versions"}


def test_a_saved_run_is_called_by_its_folder(home: Path, tmp_path: Path) -> None:
    options = OPTIONS | {"epochs": 1, "lora_r": 4}
    run = hyperfit(home / "base", ids(), "lora", out=tmp_path / "adapter", **options)
    for source, name in ((run, "a"), (tmp_path / "adapter", "b")):
        merge(source, tmp_path / name)
    records = [json.loads((tmp_path / n / "hyperfit.json").read_text()) for n in "ab"]
    assert records[0] == records[1]
    assert records[0]["merged"]["adapter"] == str(tmp_path / "adapter")


def test_an_adapter_of_anybody_elses(tmp_path: Path) -> None:
    adapted = lora(make_tiny("gpt2"), "gpt2")
    adapted.save_pretrained(tmp_path / "adapter")
    expected = logits(adapted)
    merge(adapted, tmp_path / "a")
    torch.testing.assert_close(logits(plain(tmp_path, "a")), expected, **CLOSE)
    merge(tmp_path / "adapter", tmp_path / "b", base=make_tiny("gpt2"))
    torch.testing.assert_close(logits(plain(tmp_path, "b")), expected, **CLOSE)
    record = json.loads((tmp_path / "b" / "hyperfit.json").read_text())
    assert record["merged"]["base"] == "GPT2LMHeadModel"


def test_a_base_of_ones_own(home: Path, tmp_path: Path) -> None:
    (tmp_path / "base").symlink_to(home / "base")
    merge(home / "adapter", tmp_path / "out", base=tmp_path / "base")
    assert torch.equal(logits(plain(tmp_path, "out")), logits(plain(home, "merged")))


def test_merged_weights_have_the_bases_dtype_or_the_one_asked_for(tmp_path: Path) -> None:
    base = make_tiny("llama").to(torch.bfloat16)
    base.save_pretrained(tmp_path / "base")
    options = OPTIONS | {"lora_r": 4}
    run = hyperfit(tmp_path / "base", ids(), "lora", out=tmp_path / "adapter", **options)
    layer = run.model.base_model.model.model.layers[0].mlp.up_proj
    exact = layer.base_layer.weight.float() + layer.get_delta_weight("default")
    found = {}
    for dtype in (None, "bfloat16", "float32"):
        folder = merge(tmp_path / "adapter", tmp_path / str(dtype), dtype=dtype)
        opened = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        expected = torch.float32 if dtype == "float32" else torch.bfloat16
        assert {p.dtype for p in opened.parameters()} == {expected}
        found[dtype] = opened.model.layers[0].mlp.up_proj.weight
    assert torch.equal(found[None], found["bfloat16"])
    torch.testing.assert_close(found["float32"], exact, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(found[None].float(), exact, atol=1e-2, rtol=1e-2)
    assert not torch.allclose(found[None].float(), exact, atol=1e-6, rtol=1e-6)


# What cannot be merged


def test_what_is_no_adapter_is_refused(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "is not an adapter folder" in refusal(home / "full", out)
    assert "does not exist" in refusal(tmp_path / "none", out)
    assert "does not exist" in refusal("owner/name", out)
    assert "got LlamaForCausalLM" in refusal(make_tiny("llama"), out)
    run = hyperfit(home / "base", ids(), **OPTIONS | {"epochs": 1})
    assert "run of lora or late_lora" in refusal(run, out)
    assert os.listdir(tmp_path) == []


def test_a_missing_or_wrong_base_is_refused(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    lora(make_tiny("llama"), "llama").save_pretrained(tmp_path / "nameless")
    assert "pass base=" in refusal(tmp_path / "nameless", out)
    config = json.loads((tmp_path / "nameless" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "gone")
    (tmp_path / "nameless" / "adapter_config.json").write_text(json.dumps(config))
    line = refusal(tmp_path / "nameless", out)
    assert "gone" in line
    assert "pass base=" in line
    assert "does not fit" in refusal(tmp_path / "nameless", out, base=make_tiny("gpt2"))
    adapted = lora(make_tiny("llama"), "llama")
    assert "already on its base" in refusal(adapted, out, base=home / "base")
    assert not out.exists()


def test_a_folder_in_use_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    assert "already exists" in refusal(tmp_path / "never-opened", tmp_path)
    assert "cannot" not in (tmp_path / "mine.txt").read_text()


def test_a_disk_that_fills_up_leaves_nothing(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", full)
    assert "No space left" in refusal(home / "adapter", tmp_path / "out")
    assert os.listdir(tmp_path) == []
