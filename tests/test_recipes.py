"""Recipes: what the papers say is theirs, what they leave open is ours, and nonsense is refused."""

import json
from dataclasses import fields
from typing import Any

import pytest

from hyperlens.errors import TrainingError
from hyperlens.training import hyperfit
from hyperlens.training.recipes import (
    HELP,
    PRESETS,
    Recipe,
    changed,
    check,
    preset,
    relevant_fields,
    reported,
)

METHODS = ("full", "lora", "late_lora")


def refusal(**changes: Any) -> str:
    """The one line that answers these changes to the default recipe."""
    with pytest.raises(TrainingError) as caught:
        changed(Recipe(), **changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_field_has_a_line_of_help() -> None:
    assert list(HELP) == [field.name for field in fields(Recipe)]
    assert all(line and "\n" not in line for line in HELP.values())


@pytest.mark.parametrize("name", [field.name for field in fields(Recipe)])
def test_every_field_is_checked(name: str) -> None:
    with pytest.raises(TrainingError, match=name):
        check({**vars(Recipe()), name: object()})


# Whose choice


def test_the_defaults_are_this_papers() -> None:
    assert Recipe() == preset("li2026")


def test_this_paper_reports_little() -> None:
    recipe = preset("li2026", "late_lora")
    values = (recipe.n_sequences, recipe.epochs, recipe.weight_decay, recipe.last_k)
    assert values == (2000, 260, 0, 5)
    theirs = {name for name, origin in recipe.origins().items() if origin == "paper"}
    assert theirs == {"preset", "method", "n_sequences", "epochs", "weight_decay", "last_k"}


def test_the_original_reports_its_training_and_its_evaluation() -> None:
    recipe = preset("carlsson2025")
    assert (recipe.learning_rate, recipe.weight_decay, recipe.batch_size) == (5e-6, 0.01, 8)
    assert (recipe.epochs, recipe.drop_last, recipe.max_grad_norm) == (30, True, 0)
    assert recipe.prompt_tokens + recipe.new_tokens == recipe.sequence_length == 256
    assert (recipe.n_validation, recipe.n_prompts, recipe.record_every) == (128, 32, 1)
    origins = recipe.origins()
    theirs = ("learning_rate", "selection", "n_validation", "n_prompts", "new_tokens", "method")
    assert {origins[name] for name in theirs} == {"paper"}
    assert {origins[name] for name in ("seed", "patience", "gradient_checkpointing")} == {"ours"}
    # They trained all weights only.
    adapted = preset("carlsson2025", "lora").origins()
    assert adapted["learning_rate"] == adapted["method"] == "ours"


def test_the_demonstration_is_all_ours() -> None:
    assert set(preset("demo").origins().values()) == {"ours"}


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("method", METHODS)
def test_only_what_a_preset_sets_is_a_papers(name: str, method: Any) -> None:
    recipe = preset(name, method)
    origins = recipe.origins()
    assert tuple(origins) == relevant_fields(method)
    theirs = {field for field, origin in origins.items() if origin == "paper"}
    assert theirs == reported(name, method) & origins.keys()
    assert theirs <= {"preset", "method", *PRESETS[name]}
    assert "yours" not in origins.values()


def test_a_changed_value_is_yours() -> None:
    recipe = preset("li2026", "lora", epochs=7, target_modules=["q_proj"], blocks=[3, 1])
    assert recipe.target_modules == ("q_proj",)
    assert recipe.blocks == (3, 1)
    origins = recipe.origins()
    yours = {name for name, origin in origins.items() if origin == "yours"}
    assert yours == {"epochs", "target_modules", "blocks"}
    lines = {line.split()[0]: line.split() for line in recipe.describe().splitlines()}
    assert lines["epochs"][1:3] == ["7", "yours"]
    assert lines["lora_r"][1:3] == ["16", "ours"]
    assert lines["weight_decay"][1:3] == ["0.0", "paper"]
    assert "last_k" not in lines


def test_only_fields_that_matter_are_shown() -> None:
    full, late = relevant_fields("full"), relevant_fields("late_lora")
    assert "blocks" in full
    assert not {"last_k", "lora_r", "lora_init"} & set(full)
    assert {"last_k", "lora_r", "lora_init", "lora_dora"} <= set(late)
    assert "blocks" not in late


# To JSON and back


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("method", METHODS)
def test_a_recipe_survives_json(name: str, method: Any) -> None:
    changes: dict[str, Any] = {"full": {"blocks": (0, 4)}, "late_lora": {"target_modules": ("q",)}}
    for recipe in (preset(name, method), preset(name, method, **changes.get(method, {}))):
        values = recipe.to_json()
        assert json.loads(json.dumps(values)) == values
        again = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        assert Recipe(**again) == recipe


# Settings without effect


@pytest.mark.parametrize(
    ("method", "change", "users"),
    [
        ("full", {"lora_r": 8}, "lora or late_lora"),
        ("full", {"lora_dora": False}, "lora or late_lora"),
        ("full", {"target_modules": ("q_proj",)}, "lora or late_lora"),
        ("full", {"last_k": 5}, "late_lora"),
        ("lora", {"last_k": 2}, "late_lora"),
        ("late_lora", {"blocks": (1,)}, "lora with blocks"),
    ],
    ids=str,
)
def test_a_setting_that_the_method_ignores_is_refused(
    method: Any, change: dict[str, Any], users: str
) -> None:
    name = next(iter(change))
    with pytest.raises(TrainingError, match=f"{name} .*{method}") as caught:
        preset("demo", method, **change)
    assert f"the method {users}" in str(caught.value)


def test_what_nobody_asked_for_is_not_refused() -> None:
    """A recipe's own values, defaults, and None, which leaves the choice open."""
    adapted = preset("demo", "late_lora", lora_r=8, last_k=2, patience=2, stop_at_plateau=True)
    full = changed(adapted, method="full", stop_at_plateau=False, target_modules=None, blocks=None)
    assert (full.lora_r, full.last_k, full.patience) == (8, 2, 2)
    for name in PRESETS:
        for method in METHODS:
            preset(name, method)  # type: ignore[arg-type]


def test_the_stopping_rule_needs_to_be_on() -> None:
    assert "set stop_at_plateau=True" in refusal(patience=5)
    assert "near_zero_loss has no effect" in refusal(near_zero_loss=0.1)
    assert changed(Recipe(), patience=5, stop_at_plateau=True).patience == 5


# Nonsense


@pytest.mark.parametrize(
    "change",
    [
        {"epochs": 0},
        {"epochs": True},
        {"batch_size": 0},
        {"sequence_length": 1},
        {"learning_rate": 0.0},
        {"learning_rate": float("nan")},
        {"weight_decay": -0.1},
        {"lora_dropout": 1.0},
        {"target_modules": ()},
        {"target_modules": ("",)},
        {"blocks": ()},
        {"blocks": (0, 0)},
        {"blocks": (-1,)},
        {"blocks": (True,)},
        {"record_every": -1},
        {"n_validation": 0},
        {"n_prompts": 0},
        {"prompt_tokens": 0},
        {"new_tokens": 1},
        {"near_zero_loss": 0.0},
        {"patience": 0},
        {"seed": -1},
        {"seed": 2**32},
        {"epoch": 3},
        {"preset": "demo"},
    ],
    ids=str,
)
def test_a_value_that_makes_no_sense_is_refused_by_name(change: dict[str, Any]) -> None:
    assert next(iter(change)) in refusal(**change)


@pytest.mark.parametrize(
    "change",
    [
        {"method": "qlora"},
        {"schedule": "step"},
        {"selection": "last"},
        {"lora_init": "olora"},
        {"packed": "yes"},
        {"epochs": 1.5},
        {"learning_rate": "fast"},
        {"blocks": [0]},
        {"blocks": ("0",)},
        {"target_modules": "q_proj"},
    ],
    ids=str,
)
def test_a_value_of_the_wrong_kind_is_refused_by_name(change: dict[str, Any]) -> None:
    # Not through Recipe, whose types are checked while the tests run.
    with pytest.raises(TrainingError, match=next(iter(change))):
        check(vars(Recipe()) | change)


def test_values_that_do_not_go_together_are_refused() -> None:
    assert "set last_k" in refusal(method="late_lora", blocks=(0, 1))
    assert "set record_every" in refusal(stop_at_plateau=True, record_every=0)
    assert "choose one" in refusal(lora_dora=True, lora_init="pissa")
    changed(Recipe(), method="lora", blocks=(0, 1), lora_rslora=True, lora_init="pissa")
    changed(Recipe(), stop_at_plateau=True, record_every=1)


def test_what_is_misspelt_is_answered_with_what_is_right() -> None:
    assert "did you mean learning_rate?" in refusal(learnin_rate=1.0)
    assert "did you mean learning_rate?" in refusal(lr=1.0)
    for options, meant in (
        ({"prefix_cach": False}, "prefix_cache"),
        ({"reciep": "demo"}, "recipe"),
    ):
        with pytest.raises(TrainingError, match=f"did you mean {meant}"):
            hyperfit("no/such-model", ["never read"], **options)
    with pytest.raises(TrainingError, match="li2026, carlsson2025, demo"):
        preset("carlson")
