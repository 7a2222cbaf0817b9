"""The model to train: a copy of the caller's, its trained weights, and settings that are restored.

The Trainer and mixed precision change a model for good; each context manager here restores one
such change.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ..errors import TrainingError
from ..models.kinds import is_peft, quantisation_of
from ..models.sources import OpenedModel
from ..models.weight_sharing import is_repacked, merged
from ..randomness import own_randomness
from .recipes import Recipe

# The file of a checkpoint with the weights that are trained.
WEIGHTS = "trained.safetensors"


def private_copy(opened: OpenedModel, recipe: Recipe) -> Any:
    """A plain model in evaluation mode that shares no storage with anything the caller holds.

    Ties between weights are kept. An unmerged adapter is folded in for full fine-tuning.

    Raises:
        TrainingError: if this source cannot be trained, or not by this method.
        LoadingError: if an adapter cannot be merged.
    """
    model = opened.model
    if opened.kind == "hooked":
        raise TrainingError(
            f"{opened.name} is a hooked model: pass the Hugging Face model, folder or hub id that "
            "it was made from, and hook the result with to_hooked"
        )
    if is_peft(model):
        model = merged(model)
    if getattr(model, "_hf_peft_config_loaded", False):
        raise TrainingError(
            f"{opened.name} already has an adapter, put in by load_adapter or add_adapter: open it "
            "with PeftModel.from_pretrained, or pass the adapter's folder"
        )
    _check_quantisation(model, opened.name, recipe)
    # A model from a folder or the hub was opened for this run; an object is also the caller's.
    return copy.deepcopy(model) if opened.kind == "object" else model


def _check_quantisation(model: Any, name: str, recipe: Recipe) -> None:
    """An adapter learns beside weights of 4 bits (QLoRA); they themselves cannot be trained."""
    if not getattr(model, "is_quantized", False):
        return
    if not getattr(model, "is_loaded_in_4bit", False):
        raise TrainingError(
            f"{name} is quantised ({quantisation_of(model)}): train it without quantisation, or an "
            "adapter on 4 bits of bitsandbytes"
        )
    if is_repacked(model):
        raise TrainingError(
            f"{name} has been run on this CPU, for which bitsandbytes repacked its weights, and no "
            "gradient passes through them any more: pass its folder, or load it anew"
        )
    if recipe.method == "full":
        raise TrainingError(
            f"{name} is quantised to 4 bits, which cannot be trained: choose the method lora or "
            "late_lora, or load it without quantisation"
        )


def context_length(model: Any) -> int | None:
    """The longest sequence the model has positions for, None if it sets no limit."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def save_trained_weights(model: nn.Module, file: Path) -> None:
    """Write the weights that require gradients, each once."""
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    save_file({name: p.contiguous().cpu() for name, p in trained.items()}, file)


def load_trained_weights(model: nn.Module, file: Path) -> None:
    """Put back what `save_trained_weights` wrote."""
    saved = load_file(file)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(saved[name])


@contextmanager
def trainers_randomness(seed: int, device: torch.device) -> Iterator[None]:
    """Seed every generator that the Trainer seeds; the caller's states are restored afterwards."""
    python, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002 - Trainer seeds it
    with own_randomness(seed, device):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(legacy)  # noqa: NPY002


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Set every rate of dropout and other noise in the model to zero, and restore it afterwards.

    Evaluation mode is no alternative: it also turns off gradient checkpointing, and the dropout of
    an adapter added later. Some models keep the rate in a module, some in an attribute, and some
    read it from the configuration in every forward pass.
    """
    rates = _rates(model, _is_dropout_rate)
    with _zeroed(rates), _zeroed(_noise(model)):
        yield


# A setting that may be a rate of noise: its holder, its name there, and its value.
Rate = tuple[Any, str, float]


def _rates(model: nn.Module, is_rate: Callable[[Any, str], bool]) -> list[Rate]:
    holders: list[Any] = [*model.modules()]
    holders += {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values()
    return [
        (holder, name, value)
        for holder in holders
        for name, value in vars(holder).items()
        if isinstance(value, float) and value > 0 and is_rate(holder, name)
    ]


@contextmanager
def _zeroed(rates: Sequence[Rate]) -> Iterator[None]:
    for holder, name, _ in rates:
        setattr(holder, name, 0.0)
    try:
        yield
    finally:
        for holder, name, value in rates:
            setattr(holder, name, value)


def _is_dropout_rate(holder: Any, name: str) -> bool:
    return "drop" in name or (name == "p" and "Dropout" in type(holder).__name__)


def _may_be_noise(holder: Any, name: str) -> bool:
    """Such as the jitter of what routers of experts read."""
    return "drop" not in name and ("jitter" in name or "noise" in name)


def _noise(model: Any) -> list[Rate]:
    """Rates without which a forward pass draws fewer random numbers.

    A name is not enough: what Phi-MoE calls router_jitter_noise is a threshold.
    """
    found: list[Rate] = []
    rates = _rates(model, _may_be_noise)
    drawn = _numbers_after_a_pass(model) if rates else ()
    for name in dict.fromkeys(name for _, name, _ in rates):
        named = [rate for rate in rates if rate[1] == name]
        with _zeroed(named):
            if _numbers_after_a_pass(model) != drawn:
                found += named
    return found


def _numbers_after_a_pass(model: Any) -> tuple[float, ...]:
    device = model.get_input_embeddings().weight.device
    tokens = torch.zeros((1, 4), dtype=torch.long, device=device)
    with training_mode(model), torch.no_grad(), trainers_randomness(0, device):
        model(input_ids=tokens, use_cache=False)
        return next_numbers(device)


def next_numbers(device: torch.device) -> tuple[float, ...]:
    """What the generators that models use draw next: other numbers if they have been used."""
    legacy = np.random.rand()  # noqa: NPY002 - some models draw from it
    return float(legacy), float(torch.rand(())), float(torch.rand((), device=device))


@contextmanager
def training_mode(model: nn.Module) -> Iterator[None]:
    """Training mode inside; every module's own mode back afterwards."""
    evaluated = [module for module in model.modules() if not module.training]
    for module in evaluated:
        module.training = True
    try:
        yield
    finally:
        for module in evaluated:
            module.training = False


@contextmanager
def restored_use_cache(model: Any) -> Iterator[None]:
    """Restore `config.use_cache` afterwards, which transformers' Trainer turns off for good."""
    before = use_cache_of(model)
    try:
        yield
    finally:
        set_use_cache(model, before)


def use_cache_of(model: Any) -> bool | None:
    """What a model's configuration says of its cache; None where it says nothing."""
    use_cache: bool | None = vars(model.config).get("use_cache")
    return use_cache


def set_use_cache(model: Any, use_cache: bool | None) -> None:
    """Let a configuration say what `use_cache_of` has found."""
    if use_cache is not None:
        model.config.use_cache = use_cache
    else:
        vars(model.config).pop("use_cache", None)


@contextmanager
def restored_forward(model: nn.Module) -> Iterator[None]:
    """Restore the model's `forward` afterwards, which mixed precision wraps for good."""
    before = vars(model).get("forward")
    try:
        yield
    finally:
        vars(model).pop("forward", None)
        vars(model).pop("_original_forward", None)
        if before is not None:
            vars(model)["forward"] = before


@contextmanager
def gradient_checkpointing(model: Any, enabled: bool) -> Iterator[None]:
    """Gradient checkpointing inside, if enabled."""
    if not enabled:
        yield
        return
    # transformers renamed the pair; both names are supported.
    renamed = hasattr(model, "activation_checkpointing_enable")
    name = "activation_checkpointing" if renamed else "gradient_checkpointing"
    try:
        getattr(model, f"{name}_enable")(**{f"{name}_kwargs": {"use_reentrant": False}})
    except ValueError as error:
        raise TrainingError(
            f"{type(model).__name__} does not support gradient_checkpointing: turn it off"
        ) from error
    try:
        yield
    finally:
        getattr(model, f"{name}_disable")()
