"""Open what people have: hub ids, folders, adapter folders, Hugging Face and PEFT models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .adapters import (
    ADAPTER_CONFIG,
    adapter_folder,
    check_adapter_kind,
    named_base,
    put_on,
    read_adapter_config,
)
from .errors import LoadingError, PairError
from .hooked import backend_of
from .hub import HUB_ID, first_line
from .shells import converted, is_peft, plain_model, shell_of
from .tokenizers import read_tokenizer, tokenizer_of_object


@dataclass(frozen=True)
class Opened:
    """A model ready to be hooked, that nobody else holds.

    Attributes:
        model: Hugging Face model, PeftModel, or an already hooked model (then the caller's own).
        tokenizer: its tokenizer if one was found without the network, else None.
        name: how to call it in results.
        kind: "hub", "folder", "adapter", "object" or "hooked".
        notes: what the reader of a result should know about how it was opened.
    """

    model: Any
    tokenizer: Any
    name: str
    kind: str
    notes: tuple[str, ...] = field(default=())


def open_source(
    source: Any,
    *,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    base: Opened | None = None,
) -> Opened:
    """Open one model source without changing anything the caller holds.

    Args:
        source: hub id or folder of a model or an adapter, `PreTrainedModel`, `PeftModel`, hooked
            model, or a pair (model, tokenizer).
        device: where to put it; None leaves objects where they are and lets folders go to the
            best device there is.
        dtype: None keeps the checkpoint's own.
        base: the model to put an adapter on (any other source ignores it); None takes
            the one that the adapter names.

    Raises:
        LoadingError: if the source is missing, incomplete, unsafe or no causal language model.
        PairError: if an adapter does not fit its base.
    """
    if isinstance(source, tuple) and len(source) == 2:
        opened = open_source(source[0], device=device, dtype=dtype, base=base)
        return Opened(opened.model, source[1], opened.name, opened.kind, opened.notes)
    if isinstance(source, nn.Module):
        return _open_object(source, device, dtype)
    check_source(source)
    adapter = adapter_folder(source)
    if adapter is not None:
        return _open_adapter(adapter, str(source), base, device, dtype)
    folder = Path(source).expanduser()
    if folder.is_dir():
        return _from_pretrained(str(folder), "folder", device, dtype)
    return _from_pretrained(str(source), "hub", device, dtype)


def check_source(source: Any) -> None:
    """Refuse at once what can be told from its name alone to be no model, opening nothing.

    Raises:
        LoadingError: if it is of the wrong kind, or a folder that is missing or holds no model.
    """
    if isinstance(source, tuple) and len(source) == 2:
        return check_source(source[0])
    if isinstance(source, nn.Module):
        return None
    if not isinstance(source, str | Path):
        raise LoadingError(
            "expected a hub id, a folder, a Hugging Face or PEFT model, or a hooked model; "
            f"got {type(source).__name__}"
        )
    folder = Path(source).expanduser()
    if folder.is_dir():
        if not (folder / ADAPTER_CONFIG).exists():
            check_checkpoint_folder(folder)
    elif isinstance(source, Path) or not HUB_ID.fullmatch(source):
        what = "is a file" if folder.exists() else "does not exist"
        raise LoadingError(
            f"model folder {source} {what}: give a folder written by save_pretrained, or a hub id"
        )
    return None


def best_device() -> torch.device:
    """CUDA if there is one, else MPS, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def check_checkpoint_folder(folder: Path) -> None:
    """Refuse a folder that holds no readable safetensors checkpoint of a causal LM.

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


def _open_object(
    model: nn.Module, device: torch.device | None, dtype: torch.dtype | None
) -> Opened:
    if backend_of(model) is not None:
        name = getattr(model.cfg, "model_name", None) or type(model).__name__
        return Opened(model, getattr(model, "tokenizer", None), str(name), "hooked")
    plain = plain_model(model)
    kind = type(plain).__name__
    config = getattr(plain, "config", None)
    if not hasattr(config, "get_text_config"):
        raise LoadingError(
            f"{kind} is not a Hugging Face model: expected a PreTrainedModel, a PeftModel or a "
            "hooked model"
        )
    # The class tells, not config.architectures: that is of the checkpoint it was read from.
    headless = plain.get_output_embeddings() is None
    _check_causal(config, kind, [kind] if headless or "Masked" in kind else [])
    if is_peft(model):
        check_adapter_kind(model)
    name = getattr(config, "_name_or_path", "") or kind
    tokenizer = getattr(model, "tokenizer", None) or tokenizer_of_object(name)
    return Opened(converted(shell_of(model), device, dtype), tokenizer, name, "object")


def _from_pretrained(
    name: str, kind: str, device: torch.device | None, dtype: torch.dtype | None
) -> Opened:
    from transformers import AutoConfig, AutoModelForCausalLM

    loaded: Any
    with _readable_errors(name, kind):
        # Without code from a checkpoint, which would be asked about on the terminal.
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        _check_causal(config, name, config.architectures or [])
        with _quiet_loading():
            loaded = AutoModelForCausalLM.from_pretrained(
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
    model = converted(model.eval(), device or best_device(), None)
    return Opened(model, read_tokenizer(name, local=kind == "folder"), name, kind, notes)


def _open_adapter(
    folder: Path,
    name: str,
    base: Opened | None,
    device: torch.device | None,
    dtype: torch.dtype | None,
) -> Opened:
    config = read_adapter_config(folder)
    named = config.get("base_model_name_or_path")
    notes: tuple[str, ...] = ()
    if base is None:
        try:
            base = open_source(named_base(folder, config), device=device, dtype=dtype)
        except LoadingError as error:
            raise LoadingError(f"adapter {name}, its base: {error}") from error
    elif named and named != base.name:
        notes = (f"adapter {Path(name).name} names {named} as its base; it was put on {base.name}",)
    if is_peft(base.model) or backend_of(base.model) is not None:
        raise PairError(
            f"adapter {folder} needs a plain Hugging Face base, got {type(base.model).__name__}: "
            "give the base as a folder, hub id or PreTrainedModel"
        )
    model = put_on(base.model, base.name, folder, named)
    tokenizer = read_tokenizer(str(folder), local=True) or base.tokenizer
    return Opened(converted(model, device, dtype), tokenizer, name, "adapter", notes)


def _check_complete(name: str, info: dict[str, Any]) -> None:
    """Refuse a checkpoint that would leave weights at random values."""
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


def _check_causal(config: Any, name: str, declared: Sequence[str]) -> None:
    """Refuse what its configuration, or its declared class, says is no causal language model."""
    if getattr(config, "is_encoder_decoder", False):
        raise LoadingError(
            f"{name} is an encoder-decoder model ({config.model_type}): expected a …ForCausalLM"
        )
    if declared and not any("LM" in a and "Masked" not in a for a in declared):
        shown = name if declared[0] == name else f"{name} ({declared[0]})"
        raise LoadingError(f"{shown} is no causal language model: expected a …ForCausalLM")


@contextmanager
def _readable_errors(name: str, kind: str) -> Iterator[None]:
    """Turn the many errors of loading into one line that says what to do."""
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
    """No weight-loading bar and no report of what is refused here; both settings are put back."""
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
