"""`keep_every`: checkpoints beside the result are the model as it was after those epochs."""

import copy
import json

import pytest
import torch
from conftest import make_tiny, token_texts
from surface_for_tests import words_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from hyperlens import read_results, trace_trajectory
from hyperlens.errors import TrainingError
from hyperlens.models.sources import OpenedModel, open_source
from hyperlens.models.training_steps import find_checkpoints
from hyperlens.training import hyperfit, sweep
from hyperlens.training.hyperfitting import identity_of
from hyperlens.training.recipes import preset

TEXTS = token_texts(10, shortest=8, longest=12)
# Two steps an epoch, five epochs.
SHORT = {
    "recipe": "demo",
    "n_sequences": 6,
    "batch_size": 3,
    "sequence_length": 8,
    "epochs": 5,
    "record_every": 0,
    "progress": False,
}
METHODS = {
    "full": {"method": "full"},
    "late_lora": {"method": "late_lora", "last_k": 1},
    "pissa": {"method": "lora", "lora_init": "pissa", "lora_r": 2},
}


def base():
    return make_tiny("llama", num_hidden_layers=2), words_tokenizer()


def logits(model) -> torch.Tensor:
    """In float64, where joining PiSSA's two adapters changes next to nothing."""
    model = copy.deepcopy(model).double()
    with torch.no_grad():
        return model(input_ids=torch.tensor(TEXTS[0])[None], use_cache=False).logits


def logits_of(folder) -> torch.Tensor:
    """Of a folder, an adapter being put on the base."""
    return logits(open_source(folder, base=OpenedModel(base()[0], None, "base", "object")).model)


class Remembers(TrainerCallback):
    """Logits after each epoch; may end the run in the middle of one."""

    def __init__(self, ends_at: int | None = None) -> None:
        self.seen: dict[int, torch.Tensor] = {}
        self.ends_at = ends_at

    def on_epoch_end(self, args, state, control, **kwargs) -> None:
        model = kwargs["model"]
        model.eval()
        self.seen[state.global_step] = logits(model)
        model.train()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step == self.ends_at:
            raise ConnectionError("the machine is gone")


@pytest.mark.parametrize("name", METHODS)
def test_they_are_the_model_after_these_epochs(name: str, tmp_path) -> None:
    memory = Remembers()
    out = tmp_path / "run"
    run = hyperfit(
        base(), TEXTS, out=out, keep_every=2, callbacks=[memory], **METHODS[name], **SHORT
    )
    kept = find_checkpoints(out)
    assert [*kept] == [4, 8, 10]  # after epochs 2 and 4, and at the end
    near = {"rtol": 0, "atol": 1e-7} if name == "pissa" else {"rtol": 0, "atol": 0}
    for step, folder in kept.items():
        assert torch.allclose(logits_of(folder), memory.seen[step], **near), step
        state = json.loads((folder / "trainer_state.json").read_text())
        assert state == {"global_step": step, "epoch": step / 2}
    assert torch.equal(logits_of(kept[10]), logits_of(out))
    assert not torch.equal(logits_of(kept[4]), logits_of(kept[8]))
    assert "checkpoints in" in run.summary()
    assert not (tmp_path / "run.partial" / "kept").exists()


def test_keeping_changes_neither_the_weights_nor_what_is_saved(tmp_path) -> None:
    plain = hyperfit(base(), TEXTS, out=tmp_path / "plain", **SHORT)
    kept = hyperfit(base(), TEXTS, out=tmp_path / "kept", keep_every=3, **SHORT)
    for a, b in zip(plain.model.parameters(), kept.model.parameters(), strict=True):
        assert torch.equal(a, b)
    names = [{p.name for p in (tmp_path / run).iterdir()} for run in ("plain", "kept")]
    assert names[1] - names[0] == {"checkpoints"}
    last = tmp_path / "kept" / "checkpoints" / "checkpoint-10"
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        assert (last / name).read_bytes() == (tmp_path / "kept" / name).read_bytes(), name
    # Transformers itself opens them.
    AutoModelForCausalLM.from_pretrained(last)
    assert len(AutoTokenizer.from_pretrained(last)) == len(words_tokenizer())


@pytest.mark.parametrize("ends_at", [1, 5, 9])
def test_a_killed_run_keeps_the_same(ends_at: int, tmp_path) -> None:
    options = SHORT | {"keep_every": 1, "checkpoint_minutes": 0.0}
    hyperfit(base(), TEXTS, out=tmp_path / "whole", **options)
    out = tmp_path / "killed"
    with pytest.raises(ConnectionError):
        hyperfit(base(), TEXTS, out=out, callbacks=[Remembers(ends_at)], **options)
    if ends_at > 1:
        with pytest.raises(TrainingError, match="keep_every 1 there, 2 here"):
            hyperfit(base(), TEXTS, out=out, **options | {"keep_every": 2})
    hyperfit(base(), TEXTS, out=out, **options)
    for step in (2, 4, 6, 8, 10):
        files = [
            tmp_path / run / "checkpoints" / f"checkpoint-{step}" / "model.safetensors"
            for run in ("whole", "killed")
        ]
        assert files[0].read_bytes() == files[1].read_bytes(), step
    assert [*find_checkpoints(out)] == [2, 4, 6, 8, 10]


def test_a_run_begun_without_such_a_field_goes_on() -> None:
    manifest = {
        "base": {"sha256": "a"},
        "data": {"sha256": "b", "held_out_sha256": None},
        "device": "cpu",
        "dtype": "float32",
    }
    assert not {"keep_every", "pad_short"} & identity_of(preset("demo"), manifest).keys()
    assert identity_of(preset("demo", keep_every=2), manifest)["keep_every"] == 2


def test_there_must_be_a_folder() -> None:
    with pytest.raises(TrainingError, match="keep_every keeps checkpoints in the folder"):
        hyperfit(base(), TEXTS, keep_every=1, **SHORT)
    with pytest.raises(TrainingError, match="keep_every keeps checkpoints in the folder"):
        sweep(base(), TEXTS, keep_every=1, recipe="demo")
    with pytest.raises(TrainingError, match="keep_every must be a whole number from 0 up"):
        hyperfit(base(), TEXTS, keep_every=-1, **SHORT)


def test_a_run_is_one_run_and_a_trajectory(tmp_path) -> None:
    base()[0].save_pretrained(tmp_path / "base")
    base()[1].save_pretrained(tmp_path / "base")
    out = tmp_path / "run"
    hyperfit(tmp_path / "base", TEXTS, out=out, keep_every=2, **METHODS["late_lora"], **SHORT)
    found = trace_trajectory(tmp_path / "base", out, TEXTS, progress=False)
    assert found.steps == [4, 8, 10]
    assert {one["kind"] for one in found.meta["checkpoints"]} == {"adapter"}
    # The first block is frozen: nothing changes at its end, and something at the last.
    for step in found.steps:
        assert found.value(step=step, probe="drift", metric="l2", layer=1, view="raw") == 0
        assert found.value(step=step, probe="drift", metric="l2", layer=2, view="raw") > 0
    (training,) = read_results([out])
    assert training.name == "training"
    assert {row["run"] for row in training.table} == {"run"}
