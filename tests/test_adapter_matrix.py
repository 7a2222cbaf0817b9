"""Every method and option of the installed peft is read right or refused; a few by default."""

import dataclasses
import typing

import pytest
from adapters_for_tests import (
    CELLS,
    CONFIGS,
    METHODS,
    NOT_VARIED,
    OF_PEFT,
    VALUES,
    Cell,
    choices,
    outcome,
)


def placed() -> set[str]:
    return {*VALUES, *" ".join(NOT_VARIED.values()).split(), "r"}


def test_nothing_of_peft_is_new() -> None:
    """Place what is new in METHODS, VALUES or NOT_VARIED, and see what becomes of it."""
    assert CONFIGS.keys() <= METHODS.keys()
    for method, config in CONFIGS.items():
        hints = typing.get_type_hints(config)
        options = {field.name for field in dataclasses.fields(config)} - OF_PEFT
        new = {name for name in options - placed() if choices(hints[name]) is None}
        assert not new, (method, new)


# What has gone wrong, and one of each way to be refused.
SHORT = [
    Cell("ADALORA", "init_lora_weights=olora", False, "float32"),
    Cell("ADALORA", "", False, "bfloat16"),
    Cell("FOURIERFT", "", False, "bfloat16"),
    Cell("HIRA", "", True, "float32"),
    Cell("LILY", "", False, "bfloat16"),
    Cell("LN_TUNING", "modules_to_save=['lm_head']", True, "float32"),
    Cell("LORA", "bias=all", False, "float32"),
    Cell("LORA", "init_lora_weights=olora", False, "float32"),
    Cell("LORA", "init_lora_weights=lora_ga", False, "float32"),
    Cell("LORA", "init_lora_weights=eva", False, "float32"),
    Cell("LORA", "modules_to_save=['embed_tokens', 'lm_head']", True, "bfloat16"),
    Cell("LORA", "target_modules=['q_proj', 'lm_head']", True, "float32"),
    Cell("LORA", "layer_replication=[(0, 2), (1, 3)]", True, "float32"),
    Cell("OFT", "coft=True", False, "float32"),
    Cell("PVERA", "sample_at_inference=True", False, "float32"),
    Cell("SHADOW", "", False, "float32"),
]


@pytest.mark.parametrize(
    "cell",
    [
        pytest.param(cell, id=cell.name, marks=() if cell in SHORT else pytest.mark.long)
        for cell in CELLS
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_right_or_refused(cell: Cell) -> None:
    found = outcome(cell)
    assert not [answer for answer in found.values() if answer.startswith(("wrong", "error"))], found
