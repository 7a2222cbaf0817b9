"""How a model is fine-tuned: one flat recipe, and the presets of the papers.

The papers leave choices open. Every value that had to be chosen here is marked as ours, so that
nobody takes it for theirs.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from types import MappingProxyType
from typing import Any, Literal, get_args

from ..errors import TrainingError

Method = Literal["full", "lora", "late_lora"]
Schedule = Literal["constant", "linear", "cosine"]
Origin = Literal["paper", "ours", "yours"]


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what training does; `HELP` has a line on each field.

    The defaults are the preset "li2026" with the method "full". Start from another preset with
    `preset(name, method, **changes)`.

    Raises:
        TrainingError: if a value is out of range.
    """

    preset: str = "li2026"
    method: Method = "full"
    n_sequences: int = 2000
    sequence_length: int = 256
    packed: bool = False
    epochs: int = 260
    batch_size: int = 8
    drop_last: bool = False
    gradient_accumulation: int = 1
    learning_rate: float = 5e-6
    schedule: Schedule = "constant"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    max_grad_norm: float = 0.0
    last_k: int = 5
    lora_r: int = 16
    lora_alpha: float = 32.0
    lora_dropout: float = 0.0
    target_modules: tuple[str, ...] | None = None
    gradient_checkpointing: bool = False
    bf16: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        _check_choices(self)
        _check_numbers(self)
        names = self.target_modules
        if names is not None and not (names and isinstance(names, tuple)):
            raise TrainingError(
                f"target_modules must be a tuple of module names, or None for all; got {names!r}"
            )

    def origins(self) -> dict[str, Origin]:
        """For each field, whether its value is the paper's, ours, or changed by you."""
        ours = _ours(self.preset, self.method)
        original = preset(self.preset, self.method)
        return {
            name: "yours"
            if getattr(self, name) != getattr(original, name)
            else ("ours" if name in ours else "paper")
            for name in relevant_fields(self.method)
        }

    def describe(self) -> str:
        """A line for each field: name, value, whose choice it is, and what it means."""
        origins = self.origins()
        marks = {"paper": "", "ours": "ours", "yours": "yours"}
        return "\n".join(
            f"{name:<22} {getattr(self, name)!s:<10} {marks[origin]:<5} {HELP[name]}"
            for name, origin in origins.items()
        )


HELP: Mapping[str, str] = MappingProxyType(
    {
        "preset": "the preset that this recipe started from",
        "method": "full (all weights), lora (all blocks) or late_lora (the last blocks)",
        "n_sequences": "training sequences; the first so many that are long enough",
        "sequence_length": "tokens per sequence, BOS included; shorter texts are left out",
        "packed": "join consecutive texts until a sequence is full",
        "epochs": "passes over the sequences",
        "batch_size": "sequences per forward pass",
        "drop_last": "leave out the last batch of an epoch if it is not full",
        "gradient_accumulation": "forward passes per optimiser step",
        "learning_rate": "peak learning rate of AdamW",
        "schedule": "constant, linear or cosine decay to 0 after the warm-up",
        "warmup_steps": "optimiser steps of linear warm-up",
        "weight_decay": "AdamW's decoupled weight decay, on every trained weight",
        "max_grad_norm": "clip gradients to this norm; 0 does not clip",
        "last_k": "late_lora: how many of the last blocks to train",
        "lora_r": "LoRA: rank of the update",
        "lora_alpha": "LoRA: the update is scaled by alpha / r",
        "lora_dropout": "LoRA: dropout inside the adapter; the model's own dropout is always off",
        "target_modules": "LoRA: names of the projections to adapt; None for all linear ones",
        "gradient_checkpointing": "recompute activations in the backward pass to save memory",
        "bf16": "bfloat16 mixed precision over the weights' own dtype",
        "seed": "of the order of sequences and of LoRA's initial values",
    }
)

LORA_FIELDS = ("lora_r", "lora_alpha", "lora_dropout", "target_modules")

# arXiv 2605.22579: 2,000 samples, 260 epochs, no weight decay; "last 5 layers" in the text, though
# some captions leave 4 blocks unfrozen. Nothing else of the training is reported.
_LI2026 = {
    "n_sequences": 2000,
    "epochs": 260,
    "weight_decay": 0.0,
    "last_k": 5,
}

# Carlsson et al. 2025 and their public code: AdamW at 5e-6 with PyTorch's default decay, batches
# of 8, float32, no schedule, no clipping; the first 2,000 texts of at least 256 tokens, cut there.
_CARLSSON2025 = {
    "n_sequences": 2000,
    "sequence_length": 256,
    "packed": False,
    "epochs": 30,
    "batch_size": 8,
    "drop_last": True,
    "learning_rate": 5e-6,
    "schedule": "constant",
    "warmup_steps": 0,
    "weight_decay": 0.01,
    "max_grad_norm": 0.0,
    "bf16": False,
}

# Shows the phenomenon on a small model and two cores within a minute or two.
_DEMO = {
    "n_sequences": 32,
    "sequence_length": 192,
    "packed": True,
    "epochs": 60,
    "learning_rate": 2e-3,
}

PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "li2026": MappingProxyType(_LI2026),
        "carlsson2025": MappingProxyType(_CARLSSON2025),
        "demo": MappingProxyType(_DEMO),
    }
)

# An adapter starts from zero and needs larger steps than weights that are already trained.
_LORA_LEARNING_RATE = {"li2026": 2e-4, "carlsson2025": 2e-4, "demo": 4e-3}


def preset(name: str, method: Method = "full", **changes: Any) -> Recipe:
    """The recipe of a paper, or of the demonstration, with changes.

    Args:
        name: "li2026" (arXiv 2605.22579), "carlsson2025" (the original recipe) or "demo".
        method: "full", "lora" or "late_lora"; LoRA gets a learning rate of its own.
        changes: other values for fields of `Recipe`.

    Raises:
        TrainingError: if there is no such preset or field, or a value is out of range.
    """
    if name not in PRESETS:
        raise TrainingError(f"no recipe {name!r}: choose one of {', '.join(PRESETS)}")
    values = dict(PRESETS[name])
    if method != "full":
        values["learning_rate"] = _LORA_LEARNING_RATE[name]
    return changed(Recipe(**{**values, "preset": name, "method": method}), **changes)


def changed(recipe: Recipe, **changes: Any) -> Recipe:
    """The recipe with some fields changed.

    Raises:
        TrainingError: if there is no such field, or a value is out of range.
    """
    for name in changes:
        if name not in HELP or name == "preset":
            near = difflib.get_close_matches(name, HELP, 1)
            hint = f"did you mean {near[0]}?" if near else f"the fields are {', '.join(HELP)}"
            raise TrainingError(f"a recipe has no field {name!r}: {hint}")
    if isinstance(changes.get("target_modules"), list):
        changes["target_modules"] = tuple(changes["target_modules"])
    return replace(recipe, **changes)


def relevant_fields(method: Method) -> tuple[str, ...]:
    """The fields that have an effect with this method."""
    left_out = set() if method != "full" else {*LORA_FIELDS}
    if method != "late_lora":
        left_out |= {"last_k"}
    return tuple(f.name for f in fields(Recipe) if f.name not in left_out)


def as_json(recipe: Recipe) -> dict[str, Any]:
    """Every field as a JSON value."""
    names = recipe.target_modules
    return asdict(recipe) | {"target_modules": None if names is None else list(names)}


def _ours(name: str, method: Method) -> frozenset[str]:
    """The fields whose value in a preset is our choice, because no paper reports it."""
    everything = frozenset(HELP) - {"preset"}
    if name == "demo":
        return everything
    reported = set(PRESETS[name])
    if name == "li2026" or method == "full":
        reported.add("method")
    if method != "full":
        reported.discard("learning_rate")
    return everything - reported


def _check_choices(recipe: Recipe) -> None:
    for name, choices in (
        ("preset", tuple(PRESETS)),
        ("method", get_args(Method)),
        ("schedule", get_args(Schedule)),
    ):
        value = getattr(recipe, name)
        if value not in choices:
            raise TrainingError(f"{name} must be one of {', '.join(choices)}; got {value!r}")


_LEAST_WHOLE = {
    "n_sequences": 1,
    "sequence_length": 2,
    "epochs": 1,
    "batch_size": 1,
    "gradient_accumulation": 1,
    "warmup_steps": 0,
    "last_k": 1,
    "lora_r": 1,
    "seed": 0,
}
_POSITIVE = ("learning_rate", "lora_alpha")
_NOT_NEGATIVE = ("weight_decay", "max_grad_norm", "lora_dropout")
# The largest seed that numpy's global generator, which transformers seeds too, accepts.
_LARGEST_SEED = 2**32 - 1


def _check_numbers(recipe: Recipe) -> None:
    for name, least in _LEAST_WHOLE.items():
        value = getattr(recipe, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise TrainingError(f"{name} must be a whole number from {least} up, got {value!r}")
    for name in (*_POSITIVE, *_NOT_NEGATIVE):
        value = getattr(recipe, name)
        real = isinstance(value, int | float) and math.isfinite(value)
        if not real or value < 0 or (value == 0 and name in _POSITIVE):
            least_real = "above 0" if name in _POSITIVE else "of at least 0"
            raise TrainingError(f"{name} must be a number {least_real}, got {value!r}")
    if recipe.lora_dropout >= 1:
        raise TrainingError(f"lora_dropout must be below 1, got {recipe.lora_dropout}")
    if recipe.seed > _LARGEST_SEED:
        raise TrainingError(f"seed must be at most {_LARGEST_SEED}, got {recipe.seed}")
