"""Load a causal LM from safetensors; every failure is a one-line LoadingError."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from ..errors import LoadingError, first_line
from .adapters import ADAPTER_CONFIG
from .weight_sharing import keep_packing

# A configuration that asks for more is damaged, and transformers would build it for hours: blocks,
# and other sizes as a multiple of the largest one of the checkpoint's own tensors.
MOST_BLOCKS, MOST_TIMES_LARGEST = 10_000, 8
BLOCKS = [
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "encoder_layers",
    "decoder_layers",
]
SIZES = [
    "hidden_size",
    "n_embd",
    "d_model",
    "vocab_size",
    "head_dim",
    "num_attention_heads",
    "num_key_value_heads",
    "n_head",
    "n_heads",
    "num_heads",
    "intermediate_size",
    "moe_intermediate_size",
    "n_inner",
    "ffn_dim",
    "d_ff",
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
]


def read_checkpoint(name: str, kind: str, dtype: torch.dtype | None) -> tuple[Any, tuple[str, ...]]:
    """A causal LM from safetensors, and notes for the reader of a result.

    Args:
        name: folder or hub id.
        kind: "folder" or "hub".
        dtype: None keeps the checkpoint's own.

    Raises:
        LoadingError: if it is missing, incomplete, corrupt or no causal language model.
    """
    from transformers import AutoConfig, PretrainedConfig

    loaded: Any
    with _readable_errors(name, kind):
        # Code from a checkpoint is never run; without False, transformers asks on the terminal.
        _check_sizes(PretrainedConfig.get_config_dict(name)[0], name)
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        check_causal(config, name, config.architectures or [])
        with _quiet_loading():
            loaded = _auto_class(config).from_pretrained(
                name,
                config=config,
                dtype="auto" if dtype is None else dtype,
                trust_remote_code=False,
                use_safetensors=True,
                # Both are refused below, in one line rather than a report.
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    model, info = loaded
    _check_complete(name, info)
    notes: tuple[str, ...] = ()
    if info["unexpected_keys"]:
        keys = sorted(info["unexpected_keys"])
        notes = (f"{name}: {len(keys)} weights of the checkpoint are not used ({keys[0]}, …)",)
    keep_packing(model)
    return model.eval(), notes


def _check_sizes(config: dict[str, Any], name: str) -> None:
    """Raise for sizes beyond any model's, before anything is built by them.

    Args:
        config: the content of config.json.
        name: folder or hub id.

    Raises:
        LoadingError: naming the size.
    """
    largest = _largest_dimension(Path(name))
    limits = dict.fromkeys(BLOCKS, MOST_BLOCKS)
    if largest > 0:  # else a hub id, or a damaged checkpoint, which is refused for that
        limits |= dict.fromkeys(SIZES, max(MOST_BLOCKS, MOST_TIMES_LARGEST * largest))
    for key, value in _whole_numbers(config):
        limit = limits.get(key, math.inf)
        if value > limit:
            raise LoadingError(
                f"the configuration of {name} says {key} = {value:.3g}, and at most {limit:,} can "
                "be right: save the model and its configuration again"
            )


def _whole_numbers(config: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """All whole numbers by name, of the configurations inside too."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _whole_numbers(value)
        elif isinstance(value, int):
            yield key, float(min(value, 10**300))


def _largest_dimension(folder: Path) -> int:
    """Of all tensors in the safetensors of a folder; 0 where there are none that can be read."""
    from safetensors import SafetensorError, safe_open

    largest = 0
    for file in folder.glob("*.safetensors"):
        with suppress(SafetensorError, OSError), safe_open(file, framework="pt") as tensors:
            shapes = (tensors.get_slice(key).get_shape() for key in tensors.keys())  # noqa: SIM118
            largest = max([largest, *(max(shape, default=0) for shape in shapes)])
    return largest


def _auto_class(config: Any) -> Any:
    """AutoModelForCausalLM; for text and images, where that knows no model, the one that does."""
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
    )

    kind = type(config)
    with_images = kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    if with_images and kind not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def check_checkpoint_folder(folder: Path) -> None:
    """Raise unless a folder holds a safetensors checkpoint with its configuration.

    Raises:
        LoadingError: naming what is missing and what to do.
    """
    if not (folder / "config.json").exists():
        raise LoadingError(
            f"{folder} has no config.json: expected a folder written by save_pretrained "
            f"(or an adapter folder with {ADAPTER_CONFIG})"
        )
    if any(folder.glob("*.safetensors")):
        return
    pickles = [p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern)]
    if pickles:
        raise LoadingError(
            f"{folder} has only pickled weights ({sorted(pickles)[0]}), which can run code when "
            "loaded: convert them to safetensors with save_pretrained and pass that folder"
        )
    raise LoadingError(
        f"{folder} has no weights: expected *.safetensors beside config.json, as save_pretrained "
        "writes them"
    )


def _check_complete(name: str, info: dict[str, Any]) -> None:
    """Raise for a checkpoint that would leave weights at random values."""
    missing = sorted(info["missing_keys"])
    if missing:
        raise LoadingError(
            f"the checkpoint {name} lacks {len(missing)} weights that the model needs "
            f"({', '.join(missing[:3])}{', …' if len(missing) > 3 else ''}); they would be "
            "random: save the whole model again"
        )
    for key, stored, expected in sorted(info["mismatched_keys"]):
        raise LoadingError(
            f"{key} in the checkpoint {name} is {tuple(stored)}, its config.json asks for "
            f"{tuple(expected)}: save the model and its configuration again"
        )


def check_causal(config: Any, name: str, declared: Sequence[str]) -> None:
    """Raise for a model whose configuration or declared class is not a causal LM's.

    Raises:
        LoadingError: saying what it is instead.
    """
    if getattr(config, "is_encoder_decoder", False):
        raise LoadingError(
            f"{name} is an encoder-decoder model ({config.model_type}): expected a …ForCausalLM"
        )
    # A text tower in a model of text and images is opened by AutoModelForCausalLM, too.
    if declared and not any(
        ("LM" in a and "Masked" not in a) or a.endswith("ForConditionalGeneration")
        for a in declared
    ):
        shown = name if declared[0] == name else f"{name} ({declared[0]})"
        raise LoadingError(f"{shown} is no causal language model: expected a …ForCausalLM")


@contextmanager
def _readable_errors(name: str, kind: str) -> Iterator[None]:
    """Turn any error of loading into a LoadingError that says what to do."""
    from safetensors import SafetensorError

    try:
        yield
    except LoadingError:
        raise
    except SafetensorError as error:
        raise LoadingError(
            f"the safetensors of {name} are corrupt ({first_line(error)}): copy or download "
            "them again"
        ) from error
    except Exception as error:
        reason = first_line(error)
        if kind == "hub":
            raise LoadingError(
                f"no model {name}: there is no such folder, and the model hub has none or cannot "
                f"be reached ({reason}); check the name"
            ) from error
        raise LoadingError(
            f"cannot load {name} ({reason}): expected a causal language model as save_pretrained "
            "writes it"
        ) from error


@contextmanager
def _quiet_loading() -> Iterator[None]:
    """Silence transformers' loading bar and report inside; both settings are restored."""
    from transformers.utils import logging

    shown, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()
