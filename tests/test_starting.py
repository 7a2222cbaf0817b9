"""Going on from an adapter: the same base, the adapter's weights, a new optimiser."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_tiny
from safetensors.torch import load_file
from test_quantised import IDS, OPTIONS

from hyperlens.errors import TrainingError
from hyperlens.training import HyperfitRun, Recipe, hyperfit, read_history, sweep
from hyperlens.training.data import training_data
from hyperlens.training.recipes import read_recipe, recipe_of


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    make_tiny("llama").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def first(base: Path, tmp_path_factory: pytest.TempPathFactory) -> HyperfitRun:
    """A run whose recipe differs from the defaults in what decides its adapter."""
    own = {"last_k": 2, "lora_r": 4, "lora_alpha": 6.0, "target_modules": ("q_proj", "up_proj")}
    out = tmp_path_factory.mktemp("runs") / "first"
    return hyperfit(base, IDS, "late_lora", **own, **OPTIONS, out=out)


def adapter_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def test_a_run_goes_on_from_an_adapter(base: Path, first: HyperfitRun, tmp_path: Path) -> None:
    """With steps too small to see, it is the adapter itself; the base is still what it was."""
    for i, source in enumerate((first.folder, first.model)):
        out = tmp_path / str(i)
        run = hyperfit(
            source, IDS, recipe=first.folder, learning_rate=1e-20, epochs=1, out=out, progress=False
        )
        before, after = adapter_of(first.folder), adapter_of(out)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert run.history[0] < first.history[-1] < first.history[0]
        # Ranks and quality are against the base, not against the adapter.
        assert run.records[0].validation_loss == first.records[0].validation_loss
        assert run.records[0].rank_1 == 1.0
        assert run.records[1].validation_loss == pytest.approx(first.records[-1].validation_loss)
        config = json.loads((out / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str(base)
        assert run.manifest["base"]["sha256"] == first.manifest["base"]["sha256"]
        assert run.manifest["start"]["sha256"]
    assert first.model.peft_config["default"].r == 4


@pytest.mark.long
def test_it_learns_on_and_a_killed_run_ends_the_same(
    first: HyperfitRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"recipe": first.folder, "epochs": 3, "progress": False}
    whole = hyperfit(first.folder, IDS, **options, out=tmp_path / "whole")
    assert whole.history[-1] < first.history[-1]

    from hyperlens.training import callbacks

    def killed(*_: Any, **__: Any) -> None:
        raise ConnectionAbortedError

    options |= {"out": tmp_path / "killed", "checkpoint_minutes": 0.0}
    with monkeypatch.context() as patch:
        save = callbacks.Checkpoints.on_save
        patch.setattr(
            callbacks.Checkpoints,
            "on_save",
            lambda self, args, state, control, **k: (
                killed() if state.global_step == 3 else save(self, args, state, control, **k)
            ),
        )
        with pytest.raises(ConnectionAbortedError):
            hyperfit(first.folder, IDS, **options)
    # What is unfinished began elsewhere than the same recipe on the base.
    with pytest.raises(TrainingError, match="start"):
        hyperfit(first.manifest["base"]["name"], IDS, **options)
    hyperfit(first.folder, IDS, **options)
    one, other = adapter_of(tmp_path / "whole"), adapter_of(tmp_path / "killed")
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora_r": 8}, "lora_A.weight it has 4 x 32, and this run 8 x 32"),
        ({"last_k": 1}, "and this run nothing"),
        ({"lora_init": "pissa", "lora_r": 2}, "it has 4 x 32, and this run 2 x 32"),
        ({"lora_alpha": 7.0}, "its lora_alpha is 6.0, and this run's 7.0"),
        ({"lora_rslora": True}, "its use_rslora is False"),
    ],
)
def test_an_adapter_that_does_not_fit_the_recipe_is_refused(
    first: HyperfitRun, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(TrainingError, match=r"recipe.*or merge it first") as caught:
        hyperfit(first.folder, IDS, recipe=first.folder, **change, progress=False)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_sweep_begins_anew(first: HyperfitRun) -> None:
    with pytest.raises(TrainingError, match="give its base"):
        sweep(first.folder, IDS, recipe=first.recipe, progress=False)


def test_a_recipe_is_read_from_a_run(first: HyperfitRun, tmp_path: Path) -> None:
    assert read_recipe(first.folder) == read_recipe(first.folder / "hyperfit.json") == first.recipe
    assert recipe_of(first.folder, epochs=9) == Recipe(**vars(first.recipe) | {"epochs": 9})
    assert recipe_of("demo", "lora").method == "lora"
    assert len(read_history(first.folder)) == 3
    for content in ("{", "[1]", '{"recipe": 3}', "{}"):
        (tmp_path / "hyperfit.json").write_text(content)
        with pytest.raises(TrainingError, match="cannot read a recipe from"):
            recipe_of(tmp_path)
    (tmp_path / "hyperfit.json").write_text('{"recipe": {"momentum": 1}}')
    with pytest.raises(TrainingError, match="momentum, which this version does not know"):
        recipe_of(tmp_path)
    with pytest.raises(TrainingError, match=r"no recipe 'nowhere'.*or the folder of a run"):
        recipe_of("nowhere")


def test_what_the_run_would_lose_of_an_adapter_is_refused(first: HyperfitRun) -> None:
    model = copy.deepcopy(first.model)
    for module in model.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", 3.0)
    with pytest.raises(TrainingError, match="the logits differ by"):
        hyperfit(model, IDS, recipe=first.folder, progress=False)
    model.peft_config["default"].alora_invocation_tokens = [1]
    with pytest.raises(TrainingError, match="alora_invocation_tokens"):
        hyperfit(model, IDS, recipe=first.folder, progress=False)


def test_pissa_says_how_to_go_on(first: HyperfitRun) -> None:
    """Of the same shape, too: the weights would be decomposed under the adapter."""
    for rank in (2, 4):
        with pytest.raises(TrainingError, match="lora_init='zero'"):
            hyperfit(
                first.model,
                IDS,
                recipe=first.folder,
                lora_init="pissa",
                lora_r=rank,
                progress=False,
            )


def test_a_step_too_small_for_float32(base: Path) -> None:
    with pytest.raises(TrainingError, match="float32 weights: raise learning_rate"):
        hyperfit(base, IDS, **OPTIONS | {"learning_rate": 1e-12})


def test_packed_ids_without_a_tokenizer_have_a_note() -> None:
    recipe = Recipe(packed=True, sequence_length=4, record_every=0)
    data = training_data([[1, 2, 3], [4, 5, 6]], None, recipe, 9)
    assert any("no EOS stands between" in note for note in data.notes)
