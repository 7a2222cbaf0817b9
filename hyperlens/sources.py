"""Open what people have: hub ids, folders, adapter folders, Hugging Face and PEFT models."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .errors import LoadingError, PairError
from .hooked import backend_of
from .shells import converted, is_peft, plain_model, shell_of

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
ADAPTER_CONFIG = "adapter_config.json"


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
        source: hub id, folder, adapter folder, `PreTrainedModel`, `PeftModel`, hooked model, or
            a pair (model, tokenizer).
        device: where to put it; None leaves objects where they are and lets folders go to the
            best device there is.
        dtype: None keeps the checkpoint's own.
        base: the model that an adapter folder is put on; None takes the one its config names.

    Raises:
        LoadingError: if the source is missing, incomplete, unsafe or no causal language model.
        PairError: if an adapter does not fit its base.
    """
    if isinstance(source, tuple) and len(source) == 2:
        opened = open_source(source[0], device=device, dtype=dtype, base=base)
        return Opened(opened.model, source[1], opened.name, opened.kind, opened.notes)
    if isinstance(source, nn.Module):
        return _open_object(source, device, dtype)
    if not isinstance(source, str | Path):
        raise LoadingError(
            "expected a hub id, a folder, a Hugging Face or PEFT model, or a hooked model; "
            f"got {type(source).__name__}"
        )
    folder = Path(source).expanduser()
    if folder.is_dir():
        if (folder / ADAPTER_CONFIG).exists():
            return _open_adapter(folder, base, device, dtype)
        check_checkpoint_folder(folder)
        return _from_pretrained(str(folder), "folder", device, dtype)
    if isinstance(source, Path) or not HUB_ID.fullmatch(source):
        what = "is a file" if folder.exists() else "does not exist"
        raise LoadingError(f"model folder {source} {what}: expected a folder with config.json")
    return _from_pretrained(source, "hub", device, dtype)


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
    raise LoadingError(f"{folder} has no weights: expected *.safetensors beside config.json")


def _open_object(
    model: nn.Module, device: torch.device | None, dtype: torch.dtype | None
) -> Opened:
    if backend_of(model) is not None:
        name = getattr(model.cfg, "model_name", None) or type(model).__name__  # type: ignore[union-attr]
        return Opened(model, getattr(model, "tokenizer", None), str(name), "hooked")
    if not hasattr(plain_model(model), "config"):
        raise LoadingError(
            f"{type(model).__name__} is not a Hugging Face model: expected a PreTrainedModel, a "
            "PeftModel or a hooked model"
        )
    config = plain_model(model).config
    _check_causal(config, type(plain_model(model)).__name__)
    if is_peft(model):
        _check_adapter_kind(model)
    name = getattr(config, "_name_or_path", "") or type(plain_model(model)).__name__
    tokenizer = getattr(model, "tokenizer", None) or _local_tokenizer(name)
    return Opened(converted(shell_of(model), device, dtype), tokenizer, name, "object")


def _from_pretrained(
    name: str, kind: str, device: torch.device | None, dtype: torch.dtype | None
) -> Opened:
    from transformers import AutoConfig, AutoModelForCausalLM

    with _readable_errors(name, kind):
        config = AutoConfig.from_pretrained(name)
        _check_causal(config, name)
        with _quiet_loading():
            model, info = AutoModelForCausalLM.from_pretrained(
                name,
                config=config,
                dtype="auto" if dtype is None else dtype,
                use_safetensors=True,
                output_loading_info=True,
            )
    missing = sorted(info["missing_keys"])
    if missing:
        raise LoadingError(
            f"the checkpoint {name} lacks {len(missing)} weights that the model needs "
            f"({', '.join(missing[:3])}{', …' if len(missing) > 3 else ''}); they would be "
            "random: save the whole model again"
        )
    notes = ()
    if info["unexpected_keys"]:
        keys = sorted(info["unexpected_keys"])
        notes = (f"{name}: {len(keys)} weights of the checkpoint are not used ({keys[0]}, …)",)
    model = converted(model.eval(), device or best_device(), None)
    return Opened(model, _tokenizer(name, local=kind == "folder"), name, kind, notes)


def _open_adapter(
    folder: Path,
    base: Opened | None,
    device: torch.device | None,
    dtype: torch.dtype | None,
) -> Opened:
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import safe_open

    try:
        config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LoadingError(f"{folder / ADAPTER_CONFIG} is not readable JSON: {error}") from None
    weights = folder / "adapter_model.safetensors"
    if not weights.exists():
        raise LoadingError(
            f"{folder} has no adapter_model.safetensors: expected an adapter folder written by "
            "PEFT's save_pretrained (pickled adapters are not loaded)"
        )
    named = config.get("base_model_name_or_path")
    notes: tuple[str, ...] = ()
    if base is None:
        if not named:
            raise LoadingError(
                f"{folder / ADAPTER_CONFIG} names no base model: give the base yourself"
            )
        beside = folder / named
        found = beside if not Path(named).is_absolute() and beside.is_dir() else named
        base = open_source(
            Path(found) if Path(found).is_absolute() else found, device=device, dtype=dtype
        )
    elif named and named != base.name:
        notes = (f"adapter {folder.name} names {named} as its base; it was put on {base.name}",)
    if is_peft(base.model) or backend_of(base.model) is not None:
        raise PairError(
            f"adapter {folder} needs a plain Hugging Face base, got {type(base.model).__name__}: "
            "give the base as a folder, hub id or PreTrainedModel"
        )
    misfit = PairError(
        f"adapter {folder} does not fit {base.name}: it was made for "
        f"{named or 'another base'}; give that base"
    )
    try:
        with safe_open(weights, framework="pt") as file:
            stored = set(file.keys())
        model = PeftModel.from_pretrained(shell_of(base.model), str(folder)).eval()
        expected = set(get_peft_model_state_dict(model))
    except (RuntimeError, ValueError, KeyError) as error:
        misfit.add_note(str(error))
        raise misfit from error
    except Exception as error:
        raise LoadingError(f"cannot read the adapter {folder}: {_first_line(error)}") from error
    _check_adapter_kind(model)
    if stored != expected:
        raise misfit
    tokenizer = _tokenizer(str(folder), local=True) or base.tokenizer
    return Opened(converted(model, device, dtype), tokenizer, str(folder), "adapter", notes)


def _check_adapter_kind(model: Any) -> None:
    if any(config.is_prompt_learning for config in model.peft_config.values()):
        raise LoadingError(
            "prompt-learning adapters (prompt, prefix or P-tuning) add positions rather than "
            "change weights, so streams cannot be compared token by token: not supported"
        )


def _check_causal(config: Any, name: str) -> None:
    if getattr(config, "is_encoder_decoder", False):
        raise LoadingError(
            f"{name} is an encoder-decoder model ({config.model_type}): expected a causal "
            "language model"
        )
    declared = getattr(config, "architectures", None) or []
    if declared and not any("LM" in a and "Masked" not in a for a in declared):
        raise LoadingError(
            f"{name} is a {declared[0]}: expected a causal language model (…ForCausalLM)"
        )


def _tokenizer(name: str, local: bool) -> Any:
    from transformers import AutoTokenizer

    if local and not any((Path(name) / f).exists() for f in TOKENIZER_FILES):
        return None
    try:
        return AutoTokenizer.from_pretrained(name, local_files_only=local)
    except Exception as error:
        raise LoadingError(f"cannot read the tokenizer of {name}: {_first_line(error)}") from error


TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


def _local_tokenizer(name: str) -> Any:
    """The tokenizer of an object's name, from a folder or the local cache; never the network."""
    if not name:
        return None
    if Path(name).is_dir():
        return _tokenizer(name, local=True)
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, local_files_only=True)
    except Exception:
        return None


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
            f"the safetensors of {name} are corrupt ({_first_line(error)}): copy or download "
            "them again"
        ) from error
    except Exception as error:
        where = "and the model hub has none or cannot be reached" if kind == "hub" else ""
        message = f"cannot load {name}: {_first_line(error)}"
        if where:
            message = f"no model {name}: there is no such folder {where} ({_first_line(error)})"
        raise LoadingError(message) from error


@contextmanager
def _quiet_loading() -> Iterator[None]:
    """No weight-loading bar for a model that loads in a moment; the setting is put back."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]
