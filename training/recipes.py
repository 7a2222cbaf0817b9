"""How a model is fine-tuned: the `Recipe`, the presets of the papers, and what values are valid.

The papers leave choices open. A value listed in a paper's preset is the paper's own; every other
value is a default of `Recipe` that we chose, and it is marked as ours wherever it is shown or
saved.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ..checks import LARGEST_COUNT, check_choice, check_types, is_number
from ..errors import TrainingError, first_line, shortened

Method = Literal["full", "lora", "late_lora"]
Schedule = Literal["constant", "linear", "cosine"]
Selection = Literal["first", "random"]
LoraInit = Literal["zero", "gaussian", "pissa"]
LossOn = Literal["completions", "all"]
Origin = Literal["paper", "ours", "yours"]

# What `hyperfit` writes beside the weights: how the model was made.
RUN_FILE = "hyperfit.json"

# arXiv 2605.22579, sections 2.1 and 5: 2,000 samples, 260 epochs, no weight decay; "last 5 layers"
# in the text, though some captions leave 4 blocks unfrozen. Nothing else of the training, and
# nothing of the evaluation during training, is reported.
_LI2026 = {
    "n_sequences": 2000,
    "epochs": 260,
    "weight_decay": 0.0,
    "last_k": 5,
}

# Carlsson et al. 2025 (arXiv 2412.04318) and their public code: AdamW at 5e-6 with PyTorch's
# default decay, batches of 8, float32, no schedule, no clipping; the first 2,000 texts of at least
# 256 tokens, cut there. Evaluated every 250 steps, which is every epoch: on the 128 sequences that
# follow, and on greedy continuations of 32 of them from 32 tokens to 256 in all.
_CARLSSON2025 = {
    "n_sequences": 2000,
    "sequence_length": 256,
    "packed": False,
    "selection": "first",
    "epochs": 30,
    "batch_size": 8,
    "drop_last": True,
    "learning_rate": 5e-6,
    "schedule": "constant",
    "warmup_steps": 0,
    "weight_decay": 0.01,
    "max_grad_norm": 0.0,
    "bf16": False,
    "record_every": 1,
    "n_validation": 128,
    "n_prompts": 32,
    "prompt_tokens": 32,
    "new_tokens": 224,
}

# Shows hyperfitting on a small model and two CPU cores within a minute or two. All ours. Few
# records: five of them take about a seventh as long as the late-stage training that they watch.
_DEMO = {
    "n_sequences": 32,
    "sequence_length": 192,
    "epochs": 60,
    "learning_rate": 2e-3,
    "record_every": 15,
    "n_validation": 32,
    "new_tokens": 96,
}

PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "li2026": MappingProxyType(_LI2026),
        "carlsson2025": MappingProxyType(_CARLSSON2025),
        "demo": MappingProxyType(_DEMO),
    }
)

# Ours: an adapter starts from zero and needs larger steps than weights that are already trained.
LORA_LEARNING_RATE = MappingProxyType({"li2026": 2e-4, "carlsson2025": 2e-4, "demo": 4e-3})


def reported(name: str, method: str) -> frozenset[str]:
    """The fields of a preset whose values a paper reports, for one training method.

    Args:
        name: of the preset.
        method: "full", "lora" or "late_lora".
    """
    if name == "demo":
        return frozenset()
    names = {"preset", *PRESETS[name]}
    if name == "li2026" or method == "full":  # Carlsson et al. train all weights only
        names.add("method")
    if method != "full":
        names.discard("learning_rate")
    return frozenset(names)


# ruff: noqa: RUF009 - what `_field` returns is made anew for each field and never changed
def _field(default: Any, text: str, *, least: int = 1, positive: bool = False) -> Any:
    """A field of `Recipe`.

    Args:
        default: its value in "li2026" with the method "full".
        text: what it means, for `HELP`.
        least: the smallest value of a whole number.
        positive: whether a fraction must be above 0; others may be 0.
    """
    return field(default=default, metadata={"help": text, "least": least, "positive": positive})


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what training does; `HELP` has a line on each field.

    The defaults are the preset "li2026" with the method "full". Start from another preset with
    `preset(name, method, **changes)`.

    Raises:
        TrainingError: if a value is out of range.
    """

    preset: str = _field("li2026", "the preset that this recipe started from")
    method: Method = _field(
        "full", "full (the weights), lora (adapters on the blocks) or late_lora (on the last)"
    )
    n_sequences: int = _field(2000, "training sequences, all different")
    sequence_length: int = _field(
        256, "tokens per sequence, BOS included; shorter texts are left out", least=2
    )
    pad_short: bool = _field(False, "pad shorter texts at their ends instead; pads never count")
    packed: bool = _field(False, "join all texts, EOS after each, and cut them into sequences")
    selection: Selection = _field(
        "first", "which sequences: the first ones, or a random sample of them all"
    )
    loss_on: LossOn = _field(
        "completions",
        "of conversations and prompts with completions: the loss on what the assistant says and "
        "completions only, or on all tokens; texts have it on all",
    )
    add_eos: bool = _field(
        False, "put EOS at the end of each text that does not end in it, if it fits"
    )
    epochs: int = _field(260, "passes over the sequences")
    batch_size: int = _field(8, "sequences per forward pass")
    drop_last: bool = _field(False, "leave out the last batch of an epoch if it is not full")
    gradient_accumulation: int = _field(1, "forward passes per optimiser step")
    learning_rate: float = _field(5e-6, "peak learning rate of AdamW", positive=True)
    schedule: Schedule = _field(
        "constant", "constant, linear or cosine decay to 0 after the warm-up"
    )
    warmup_steps: int = _field(0, "optimiser steps of linear warm-up", least=0)
    weight_decay: float = _field(0.0, "AdamW's decoupled weight decay, on every trained weight")
    max_grad_norm: float = _field(0.0, "clip gradients to this norm; 0 does not clip")
    last_k: int = _field(5, "late_lora: how many of the last blocks to train")
    blocks: tuple[int, ...] | None = _field(
        None,
        "full, lora: 0-based indices of the blocks to train; with "
        "indices, embeddings, final norm and unembedding stay frozen",
    )
    lora_r: int = _field(16, "LoRA: rank of the update")
    lora_alpha: float = _field(32.0, "LoRA: the update is scaled by alpha / r", positive=True)
    lora_dropout: float = _field(
        0.0, "LoRA: dropout inside the adapter; the model's own dropout is always off"
    )
    lora_init: LoraInit = _field(
        "zero", "LoRA: zero (B = 0), gaussian, or pissa (the weights' principal directions)"
    )
    lora_dora: bool = _field(False, "LoRA: DoRA, which learns magnitude and direction separately")
    lora_rslora: bool = _field(False, "LoRA: rsLoRA, which scales by alpha / sqrt(r)")
    target_modules: tuple[str, ...] | None = _field(
        None, "LoRA: names of the projections to adapt, the linear ones"
    )
    gradient_checkpointing: bool = _field(
        False, "recompute activations in the backward pass to save memory"
    )
    bf16: bool = _field(False, "bfloat16 mixed precision over the weights' own dtype")
    record_every: int = _field(
        10, "epochs between two records of loss, ranks and quality; 0 for no records", least=0
    )
    n_validation: int = _field(
        128,
        "held-out sequences for the record: validation texts, or those that follow "
        "the training sequences",
    )
    n_prompts: int = _field(32, "record: held-out prompts to generate from, greedily")
    prompt_tokens: int = _field(32, "record: tokens of each prompt")
    new_tokens: int = _field(96, "record: tokens to generate after each prompt", least=2)
    stop_at_plateau: bool = _field(
        False,
        "stop when diversity at near-zero loss has stopped rising, and keep "
        "the weights that had the highest",
    )
    near_zero_loss: float = _field(
        0.05,
        "to stop at a plateau: training loss, nats, up to which a record counts",
        positive=True,
    )
    patience: int = _field(
        3, "to stop at a plateau: over how many records in a row diversity must rise"
    )
    keep_every: int = _field(
        0,
        "epochs between two checkpoints that are kept beside the result, and the last one; 0 "
        "keeps none",
        least=0,
    )
    seed: int = _field(
        0, "random seed: order of sequences, random selection, LoRA's initial values", least=0
    )

    def __post_init__(self) -> None:
        check(vars(self))

    def origins(self) -> dict[str, Origin]:
        """Whose choice each field's value is: the paper's, ours (hyperlens's default), or yours."""
        original = preset(self.preset, self.method)
        papers = reported(self.preset, self.method)
        return {
            name: "yours"
            if getattr(self, name) != getattr(original, name)
            else ("paper" if name in papers else "ours")
            for name in relevant_fields(self.method)
        }

    def describe(self) -> str:
        """A line per field: name, value, whose choice it is, and what it means."""
        return "\n".join(
            f"{name:<22} {getattr(self, name)!s:<12} {origin:<5} {HELP[name]}"
            for name, origin in self.origins().items()
        )

    def to_json(self) -> dict[str, Any]:
        """Every field as a JSON value."""
        values = asdict(self)
        return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}


HELP: Mapping[str, str] = MappingProxyType({f.name: f.metadata["help"] for f in fields(Recipe)})
KINDS = MappingProxyType(get_type_hints(Recipe))

LORA_FIELDS = (
    "lora_r",
    "lora_alpha",
    "lora_dropout",
    "lora_init",
    "lora_dora",
    "lora_rslora",
    "target_modules",
)
# What other libraries call some fields.
ALIASES: Mapping[str, str] = MappingProxyType(
    {
        "alpha": "lora_alpha",
        "block_size": "sequence_length",
        "dropout": "lora_dropout",
        "gradient_accumulation_steps": "gradient_accumulation",
        "lr": "learning_rate",
        "lr_scheduler_type": "schedule",
        "max_length": "sequence_length",
        "num_epochs": "epochs",
        "num_train_epochs": "epochs",
        "per_device_train_batch_size": "batch_size",
        "r": "lora_r",
        "rank": "lora_r",
        "use_dora": "lora_dora",
        "use_rslora": "lora_rslora",
    }
)
PLATEAU_FIELDS = ("near_zero_loss", "patience")

CHOICES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"preset": tuple(PRESETS)}
    | {name: get_args(kind) for name, kind in KINDS.items() if get_origin(kind) is Literal}
)


@check_types
def preset(name: str, method: Method = "full", **changes: Any) -> Recipe:
    """The recipe of a paper, or of the demonstration, with changes.

    Args:
        name: "li2026" (arXiv 2605.22579), "carlsson2025" (arXiv 2412.04318) or "demo".
        method: "full", "lora" or "late_lora"; LoRA gets a learning rate of its own.
        changes: other values for fields of `Recipe`.

    Raises:
        TrainingError: if there is no such preset or field, a value is out of range, or a changed
            field has no effect with this method.

    >>> recipe = preset("demo", "late_lora", epochs=20)
    >>> recipe.epochs, recipe.last_k, recipe.learning_rate
    (20, 5, 0.004)
    >>> recipe.origins()["epochs"]
    'yours'
    """
    if name not in PRESETS:
        meant = nearest(name, PRESETS)
        hint = f"; did you mean {meant}?" if meant else ""
        raise TrainingError(
            f"no recipe {name!r}: choose one of {', '.join(PRESETS)}, or the folder of a run{hint}"
        )
    values = dict(PRESETS[name])
    if method != "full":
        values["learning_rate"] = LORA_LEARNING_RATE[name]
    return changed(Recipe(**{**values, "preset": name, "method": method}), **changes)


def recipe_of(source: str | Path, method: Method | None = None, **changes: Any) -> Recipe:
    """The recipe of a preset, or of a run, with changes.

    Args:
        source: name of a preset; or the folder of a run, or its hyperfit.json.
        method: None takes the run's own, and "full" with a preset.
        changes: other values for fields of `Recipe`.

    Raises:
        TrainingError: if there is no such preset or file, or as in `preset`.
    """
    if source in PRESETS or not Path(source).expanduser().exists():
        return preset(str(source), **({"method": method or "full"} | changes))
    method_change = {} if method is None else {"method": method}
    return changed(read_recipe(Path(source).expanduser()), **method_change | changes)


def read_recipe(path: Path) -> Recipe:
    """The recipe that a run was made with.

    Args:
        path: its folder, or the hyperfit.json in it.

    Raises:
        TrainingError: if there is none, or one of another version.
    """
    file = path / RUN_FILE if path.is_dir() else path
    try:
        saved = dict(json.loads(file.read_text(encoding="utf-8"))["recipe"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise TrainingError(
            f"cannot read a recipe from {file} ({first_line(error)}): give the folder of a run, "
            f"its {RUN_FILE}, or one of {', '.join(PRESETS)}"
        ) from None
    unknown = [name for name in saved if name not in HELP]
    if unknown:
        raise TrainingError(
            f"{file} has a recipe with {unknown[0]}, which this version does not know"
        )
    values: dict[str, Any] = {
        name: tuple(v) if isinstance(v, list) else v for name, v in saved.items()
    }
    return Recipe(**values)


def changed(recipe: Recipe, **changes: Any) -> Recipe:
    """The recipe with some fields changed.

    Raises:
        TrainingError: if there is no such field, a value is out of range, or a changed field has
            no effect in the new recipe. Values that the recipe already had are not checked for
            having an effect: nobody asked for them.
    """
    for name in changes:
        if name not in HELP or name == "preset":
            meant = nearest(name, HELP)
            hint = f"did you mean {meant}?" if meant else f"the fields are {', '.join(HELP)}"
            raise TrainingError(f"a recipe has no field {name!r}: {hint}")
    values: dict[str, Any] = {
        name: tuple(v) if isinstance(v, list) else v for name, v in changes.items()
    }
    result = replace(recipe, **values)
    _check_have_effect([name for name, value in values.items() if value is not None], result)
    return result


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that was probably meant, if there is one.

    >>> nearest("lr", ["lora_r", "learning_rate"])
    'learning_rate'
    """
    known = list(known)
    if ALIASES.get(name) in known:
        return ALIASES[name]
    return next(iter(difflib.get_close_matches(name, known, 1)), None)


def relevant_fields(method: Method) -> tuple[str, ...]:
    """The fields that have an effect with this method."""
    ignored = set() if method != "full" else {*LORA_FIELDS}
    ignored |= {"blocks"} if method == "late_lora" else {"last_k"}
    return tuple(f.name for f in fields(Recipe) if f.name not in ignored)


def _check_have_effect(names: list[str], recipe: Recipe) -> None:
    for name in names:
        if name not in relevant_fields(recipe.method):
            users = [method for method in get_args(Method) if name in relevant_fields(method)]
            raise TrainingError(
                f"{name} has no effect with the method {recipe.method}: leave it out, or choose "
                f"the method {' or '.join(users)}"
            )
        if name in PLATEAU_FIELDS and not recipe.stop_at_plateau:
            raise TrainingError(
                f"{name} has no effect without stop_at_plateau: leave it out, or set "
                "stop_at_plateau=True (--stop-at-plateau)"
            )


# What values a recipe may have


# The largest seed that numpy's global generator, which transformers seeds too, accepts.
LARGEST_SEED = 2**32 - 1


def check(values: Mapping[str, Any]) -> None:
    """Check every field of a recipe by itself, then the ones that depend on each other.

    Args:
        values: all fields of a recipe, by name.

    Raises:
        TrainingError: naming the field, what was expected and what came.
    """
    for one in fields(Recipe):
        _check_value(one.name, values[one.name], KINDS[one.name], one.metadata)
    if values["lora_dropout"] >= 1:
        raise TrainingError(f"lora_dropout must be below 1, got {values['lora_dropout']}")
    _check_names(values["target_modules"])
    _check_blocks(values["blocks"])
    _check_together(values)


def _check_value(name: str, value: Any, kind: Any, about: Mapping[str, Any]) -> None:
    if name in CHOICES:
        check_choice(name, value, CHOICES[name], TrainingError)
    if kind is bool and not isinstance(value, bool):
        raise TrainingError(f"{name} must be True or False, got {shortened(value)}")
    least = about["least"]
    if kind is int and (not _is_int(value) or value < least):
        raise TrainingError(
            f"{name} must be a whole number from {least} up, got {shortened(value)}"
        )
    most = LARGEST_SEED if name == "seed" else LARGEST_COUNT
    if kind is int and value > most:
        raise TrainingError(f"{name} must be at most {most}, got {value}")
    if kind is float:
        is_real = is_number(value, float) and math.isfinite(value)
        if not is_real or value < 0 or (value == 0 and about["positive"]):
            allowed = "above 0" if about["positive"] else "of at least 0"
            raise TrainingError(f"{name} must be a number {allowed}, got {shortened(value)}")


def _check_names(names: Any) -> None:
    are_strings = isinstance(names, tuple) and all(isinstance(n, str) and n for n in names)
    if names is not None and not (are_strings and names):
        raise TrainingError(
            "target_modules must be a tuple of module names, or None for all; got "
            f"{shortened(names)}"
        )


def _check_blocks(blocks: Any) -> None:
    are_indices = isinstance(blocks, tuple) and all(_is_int(b) and b >= 0 for b in blocks)
    if blocks is not None and not (are_indices and blocks and len(set(blocks)) == len(blocks)):
        raise TrainingError(
            "blocks must be a tuple of different block indices from 0 up, or None for all; "
            f"got {shortened(blocks)}"
        )


def _check_together(values: Mapping[str, Any]) -> None:
    if values["method"] == "late_lora" and values["blocks"] is not None:
        raise TrainingError(
            "blocks does not go with late_lora, which trains the last blocks: set last_k, or "
            "choose the method lora with blocks"
        )
    if values["stop_at_plateau"] and not values["record_every"]:
        raise TrainingError(
            "stop_at_plateau needs records, and record_every is 0: set record_every to 1 or more"
        )
    if values["pad_short"] and values["packed"]:
        raise TrainingError(
            "pad_short does not go with packed, which joins texts until none is short: leave it out"
        )
    if values["add_eos"] and values["packed"]:
        raise TrainingError(
            "add_eos does not go with packed, which puts the tokenizer's EOS after each text: "
            "leave it out"
        )
    if values["lora_dora"] and values["lora_init"] == "pissa":
        raise TrainingError(
            "lora_dora does not go with lora_init pissa, as both decompose the weights: choose "
            "one of them"
        )


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and is_number(value, int)
