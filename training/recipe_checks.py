"""What the values of a recipe may be; each mistake is answered in one line."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..errors import TrainingError

# The smallest value of each whole number.
LEAST_WHOLE = {
    "n_sequences": 1,
    "sequence_length": 2,
    "epochs": 1,
    "batch_size": 1,
    "gradient_accumulation": 1,
    "warmup_steps": 0,
    "last_k": 1,
    "lora_r": 1,
    "record_every": 0,
    "n_validation": 1,
    "n_prompts": 1,
    "prompt_tokens": 1,
    "new_tokens": 2,
    "patience": 1,
    "seed": 0,
}
POSITIVE = ("learning_rate", "lora_alpha", "near_zero_loss")
NOT_NEGATIVE = ("weight_decay", "max_grad_norm", "lora_dropout")
FLAGS = (
    "packed",
    "drop_last",
    "lora_dora",
    "lora_rslora",
    "gradient_checkpointing",
    "bf16",
    "stop_at_plateau",
)
# The largest seed that numpy's global generator, which transformers seeds too, accepts.
LARGEST_SEED = 2**32 - 1


def check(values: Mapping[str, Any], choices: Mapping[str, tuple[str, ...]]) -> None:
    """Refuse values that make no sense, alone or together.

    Args:
        values: all fields of a recipe.
        choices: the values that some of them are limited to.

    Raises:
        TrainingError: naming the field, what was expected and what came.
    """
    for name, allowed in choices.items():
        if values[name] not in allowed:
            raise TrainingError(f"{name} must be one of {', '.join(allowed)}; got {values[name]!r}")
    for name in FLAGS:
        if not isinstance(values[name], bool):
            raise TrainingError(f"{name} must be True or False, got {values[name]!r}")
    _check_numbers(values)
    _check_names(values["target_modules"])
    _check_blocks(values["blocks"])
    _check_together(values)


def _check_numbers(values: Mapping[str, Any]) -> None:
    for name, least in LEAST_WHOLE.items():
        value = values[name]
        if not _whole(value) or value < least:
            raise TrainingError(f"{name} must be a whole number from {least} up, got {value!r}")
    for name in (*POSITIVE, *NOT_NEGATIVE):
        value = values[name]
        real = isinstance(value, int | float) and math.isfinite(value)
        if not real or value < 0 or (value == 0 and name in POSITIVE):
            least_real = "above 0" if name in POSITIVE else "of at least 0"
            raise TrainingError(f"{name} must be a number {least_real}, got {value!r}")
    if values["lora_dropout"] >= 1:
        raise TrainingError(f"lora_dropout must be below 1, got {values['lora_dropout']}")
    if values["seed"] > LARGEST_SEED:
        raise TrainingError(f"seed must be at most {LARGEST_SEED}, got {values['seed']}")


def _check_names(names: Any) -> None:
    strings = isinstance(names, tuple) and all(isinstance(n, str) and n for n in names)
    if names is not None and not (names and strings):
        raise TrainingError(
            f"target_modules must be a tuple of module names, or None for all; got {names!r}"
        )


def _check_blocks(blocks: Any) -> None:
    indices = isinstance(blocks, tuple) and all(_whole(b) and b >= 0 for b in blocks)
    if blocks is not None and not (blocks and indices and len(set(blocks)) == len(blocks)):
        raise TrainingError(
            "blocks must be a tuple of different block indices from 0 up, or None for all; "
            f"got {blocks!r}"
        )


def _check_together(values: Mapping[str, Any]) -> None:
    if values["method"] == "late_lora" and values["blocks"] is not None:
        raise TrainingError(
            "blocks does not go with late_lora, which trains the last blocks: set last_k, or use "
            "the method lora with blocks"
        )
    if values["stop_at_plateau"] and not values["record_every"]:
        raise TrainingError(
            "stop_at_plateau decides by the record, and record_every is 0: set record_every to 1 "
            "or more"
        )
    if values["lora_dora"] and values["lora_init"] == "pissa":
        raise TrainingError(
            "lora_dora does not go with lora_init pissa, which both take the weights apart: "
            "choose one of them"
        )


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
