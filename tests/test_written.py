"""A folder that a run writes is opened anew, and a conversion that goes wrong leaves none."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_tiny
from peft import PeftModel
from safetensors.torch import load_file, save_file
from surface_for_tests import TRAINING, words_tokenizer

from hyperlens.errors import TrainingError
from hyperlens.training import folders, hyperfit, pissa
from hyperlens.training.written import check_written

WORDS = [" ".join(f"w{i * j % 50 + 3}" for i in range(1, 12)) for j in range(1, 6)]
LORA = {"lora_r": 4, "lora_alpha": 8.0}


def run(out: Path, method: str, dtype: str = "float32", **options: Any) -> Any:
    base = make_tiny("llama", num_hidden_layers=2).to(getattr(torch, dtype))
    options = TRAINING | {"epochs": 2} | options
    return hyperfit(
        (base, words_tokenizer()), WORDS, method=method, out=out, progress=False, **options
    )


def refuses(out: Path, method: str, dtype: str, **options: Any) -> None:
    with pytest.raises(TrainingError, match="written and opened anew") as error:
        run(out, method, dtype, **options)
    assert len(str(error.value).splitlines()) == 1
    assert not out.exists()


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.long)])
def test_pissa_joined_with_another_scale_is_refused(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """rsLoRA divides by the root of the rank, and a doubled one needs another alpha."""
    options = {"lora_init": "pissa", "lora_rslora": True, "learning_rate": 0.05} | LORA
    run(tmp_path / "right", "lora", dtype, **options)
    join = pissa.join

    def forgetful(model: Any) -> None:
        config = model.peft_config[pissa.TRAINED]
        config.use_rslora = False
        join(model)
        config.use_rslora = True

    monkeypatch.setattr(pissa, "join", forgetful)
    refuses(tmp_path / "wrong", "lora", dtype, **options)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.long)])
@pytest.mark.parametrize("method", ["full", pytest.param("lora", marks=pytest.mark.long)])
def test_weights_that_are_not_those_trained_are_refused(
    method: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = folders._write
    options = LORA | {"learning_rate": 0.05} if method == "lora" else {}

    def damaged(folder: Path, *given: Any) -> None:
        write(folder, *given)
        (file,) = folder.glob("*.safetensors")
        weights = load_file(file)
        name = max(name for name in weights if "down_proj" in name)
        weights[name] = torch.zeros_like(weights[name])
        save_file(weights, file, metadata={"format": "pt"})

    run(tmp_path / "right", method, dtype, **options)
    monkeypatch.setattr(folders, "_write", damaged)
    refuses(tmp_path / "wrong", method, dtype, **options)


def test_a_written_model_with_another_tie_is_refused(tmp_path: Path) -> None:
    """Saved as tied, weights that have parted would be read as one."""
    model = make_tiny("llama", num_hidden_layers=2, tie_word_embeddings=False)
    check = check_written(model)
    model.save_pretrained(tmp_path / "right")
    check(tmp_path / "right")
    tied = copy.deepcopy(model)
    tied.config.tie_word_embeddings = True
    tied.tie_weights()
    tied.save_pretrained(tmp_path / "wrong")
    with pytest.raises(TrainingError, match=r"lm_head.weight is another"):
        check(tmp_path / "wrong")


def test_checking_leaves_the_run_alone(tmp_path: Path) -> None:
    trained = run(tmp_path / "out", "late_lora", last_k=1, **LORA)
    assert isinstance(trained.model, PeftModel)
    before = {name: weight.clone() for name, weight in trained.model.state_dict().items()}
    check_written(trained.model)(tmp_path / "out")
    after = trained.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


def test_a_run_does_not_fail_for_want_of_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hyperlens.training.written.free_bytes", lambda device: 0)
    monkeypatch.setattr("hyperlens.training.written.open_source", None)
    assert run(tmp_path / "out", "full").folder == tmp_path / "out"
