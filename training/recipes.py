"""How a model is fine-tuned: one flat recipe, and the presets of the papers.

The papers leave choices open. Every value that had to be chosen here is marked as ours, so that
nobody takes it for theirs.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from types import MappingProxyType
from typing import Any, Literal, get_args

from ..errors import TrainingError
from .presets import LORA_LEARNING_RATE, reported
from .presets import PRESETS as PRESETS
from .recipe_checks import check

Method = Literal["full", "lora", "late_lora"]
Schedule = Literal["constant", "linear", "cosine"]
Selection = Literal["first", "random"]
LoraInit = Literal["zero", "gaussian", "pissa"]
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
    selection: Selection = "first"
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
    blocks: tuple[int, ...] | None = None
    lora_r: int = 16
    lora_alpha: float = 32.0
    lora_dropout: float = 0.0
    lora_init: LoraInit = "zero"
    lora_dora: bool = False
    lora_rslora: bool = False
    target_modules: tuple[str, ...] | None = None
    gradient_checkpointing: bool = False
    bf16: bool = False
    record_every: int = 10
    n_validation: int = 128
    n_prompts: int = 32
    prompt_tokens: int = 32
    new_tokens: int = 96
    stop_at_plateau: bool = False
    near_zero_loss: float = 0.05
    patience: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        check(vars(self), CHOICES)

    def origins(self) -> dict[str, Origin]:
        """For each field, whether its value is the paper's, ours, or changed by you."""
        original = preset(self.preset, self.method)
        papers = reported(self.preset, self.method)
        return {
            name: "yours"
            if getattr(self, name) != getattr(original, name)
            else ("paper" if name in papers else "ours")
            for name in relevant_fields(self.method)
        }

    def describe(self) -> str:
        """A line for each field: name, value, whose choice it is, and what it means."""
        return "\n".join(
            f"{name:<22} {getattr(self, name)!s:<12} {origin:<5} {HELP[name]}"
            for name, origin in self.origins().items()
        )


HELP: Mapping[str, str] = MappingProxyType(
    {
        "preset": "the preset that this recipe started from",
        "method": "full (the weights), lora (adapters on the blocks) or late_lora (on the last)",
        "n_sequences": "training sequences, all different",
        "sequence_length": "tokens per sequence, BOS included; shorter texts are left out",
        "packed": "join consecutive texts until a sequence is full",
        "selection": "which sequences: first (as the texts come) or random (drawn from them all)",
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
        "blocks": "full, lora: 0-based indices of the blocks to train, None for all; with "
        "indices, embeddings, final norm and unembedding stay frozen",
        "lora_r": "LoRA: rank of the update",
        "lora_alpha": "LoRA: the update is scaled by alpha / r",
        "lora_dropout": "LoRA: dropout inside the adapter; the model's own dropout is always off",
        "lora_init": "LoRA: zero (B = 0), gaussian, or pissa (the weights' principal directions)",
        "lora_dora": "LoRA: DoRA, which learns magnitude and direction apart",
        "lora_rslora": "LoRA: rsLoRA, which scales by alpha / sqrt(r)",
        "target_modules": "LoRA: names of the projections to adapt; None for all linear ones",
        "gradient_checkpointing": "recompute activations in the backward pass to save memory",
        "bf16": "bfloat16 mixed precision over the weights' own dtype",
        "record_every": "epochs between two records of loss, ranks and quality; 0 keeps none",
        "n_validation": "held-out sequences for the record: given ones, or those that follow the "
        "training sequences",
        "n_prompts": "record: held-out prompts that are continued greedily",
        "prompt_tokens": "record: tokens of each prompt",
        "new_tokens": "record: tokens of each continuation",
        "stop_at_plateau": "stop when diversity at near-zero loss has stopped growing, and keep "
        "the weights that had the most",
        "near_zero_loss": "stop_at_plateau: training loss, nats, up to which a record counts",
        "patience": "stop_at_plateau: over how many records in a row diversity must rise",
        "seed": "of the order of sequences, of a random selection and of LoRA's initial values",
    }
)

LORA_FIELDS = (
    "lora_r",
    "lora_alpha",
    "lora_dropout",
    "lora_init",
    "lora_dora",
    "lora_rslora",
    "target_modules",
)

CHOICES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "preset": tuple(PRESETS),
        "method": get_args(Method),
        "schedule": get_args(Schedule),
        "selection": get_args(Selection),
        "lora_init": get_args(LoraInit),
    }
)


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
        values["learning_rate"] = LORA_LEARNING_RATE[name]
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
    return replace(recipe, **{name: _with_tuples(value) for name, value in changes.items()})


def relevant_fields(method: Method) -> tuple[str, ...]:
    """The fields that have an effect with this method."""
    left_out = set() if method != "full" else {*LORA_FIELDS}
    left_out |= {"blocks"} if method == "late_lora" else {"last_k"}
    return tuple(f.name for f in fields(Recipe) if f.name not in left_out)


def as_json(recipe: Recipe) -> dict[str, Any]:
    """Every field as a JSON value; `from_json` reads it back."""
    values = asdict(recipe)
    return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}


def from_json(values: Mapping[str, Any]) -> Recipe:
    """The recipe that `as_json` wrote.

    Raises:
        TrainingError: if fields are missing or unknown, or a value is out of range.
    """
    wanted = {field.name for field in fields(Recipe)}
    odd = sorted(wanted ^ set(values))
    if odd:
        raise TrainingError(
            f"the saved recipe {'lacks' if odd[0] in wanted else 'has an unknown field'} "
            f"{odd[0]!r}: it was written by another version of hyperlens; start anew"
        )
    return Recipe(**{name: _with_tuples(value) for name, value in values.items()})


def _with_tuples(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
