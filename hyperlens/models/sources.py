"""Open model sources: hub ids, folders, adapter folders, Hugging Face and PEFT models."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import processes
from ..errors import LoadingError, PairError
from ..offloading import check_can_be_fetched
from .adapters import (
    ADAPTER_CONFIG,
    adapter_folder,
    check_adapter_kind,
    check_not_injected,
    named_base,
    put_on,
    read_adapter_config,
)
from .checkpoints import check_causal, check_checkpoint_folder, read_checkpoint
from .kinds import HUB_ID, backend_of, is_peft, plain_model
from .tokenizers import read_tokenizer, tokenizer_of_object
from .weight_sharing import converted, weight_sharing_copy


@dataclass(frozen=True, repr=False)
class OpenedModel:
    """A model ready to be hooked, with modules of its own that nobody else holds.

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

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name}, {self.kind})"


def open_source(
    source: Any,
    *,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    base: OpenedModel | None = None,
) -> OpenedModel:
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
        check_source(source)
        opened = open_source(source[0], device=device, dtype=dtype, base=base)
        return replace(opened, tokenizer=source[1])
    if isinstance(source, nn.Module):
        return _open_object(source, device, dtype)
    check_source(source)
    adapter = adapter_folder(source)
    if adapter is not None:
        return _open_adapter(adapter, str(source), base, device, dtype)
    folder = Path(source).expanduser()
    is_folder = folder.is_dir()
    name, kind = (str(folder), "folder") if is_folder else (str(source), "hub")
    model, notes = read_checkpoint(name, kind, dtype)
    model = converted(model, device or best_device(), None)
    return OpenedModel(model, read_tokenizer(name, local=is_folder), name, kind, notes)


def identity(name: str, kind: str) -> dict[str, str]:
    """How results call a source: its name in titles, and where it is.

    A folder is called by its own name; where it lies is recorded as `source`.
    """
    is_path = kind in ("folder", "adapter") and Path(name).is_dir()
    is_path = is_path or Path(name).is_absolute()
    return {"name": Path(name).resolve().name if is_path else name, "source": name, "kind": kind}


def check_source(source: Any) -> None:
    """Raise at once for what is clearly no model, without opening anything.

    Raises:
        LoadingError: if it is of the wrong kind, or a folder that is missing or holds no model.
    """
    if isinstance(source, tuple) and len(source) == 2:
        if source[1] is not None and not hasattr(source[1], "get_vocab"):
            raise LoadingError(
                "in a pair (model, tokenizer) the second must be a Hugging Face tokenizer, got "
                f"{type(source[1]).__name__}: open it with AutoTokenizer.from_pretrained"
            )
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
    """CUDA if there is one, of processes that share work each its own, else MPS, else the CPU."""
    if torch.cuda.is_available():
        own = torch.device("cuda", processes.number_here())
        return own if processes.sharing() else torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def _open_object(
    model: nn.Module, device: torch.device | None, dtype: torch.dtype | None
) -> OpenedModel:
    model = getattr(model, "_orig_mod", model)  # inside a compiled one
    if backend_of(model) is not None:
        name = getattr(model.cfg, "model_name", None) or type(model).__name__
        return OpenedModel(model, getattr(model, "tokenizer", None), str(name), "hooked")
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
    check_causal(config, kind, [kind] if headless or "Masked" in kind else [])
    if is_peft(model):
        configs: Any = model.peft_config
        check_adapter_kind(*configs.values())
    else:
        check_not_injected(model)
    check_can_be_fetched(plain)
    name = getattr(config, "_name_or_path", "") or kind
    tokenizer = getattr(model, "tokenizer", None) or tokenizer_of_object(name)
    return OpenedModel(
        converted(weight_sharing_copy(model), device, dtype), tokenizer, name, "object"
    )


def _open_adapter(
    folder: Path,
    name: str,
    base: OpenedModel | None,
    device: torch.device | None,
    dtype: torch.dtype | None,
) -> OpenedModel:
    config = read_adapter_config(folder)
    named = config.get("base_model_name_or_path")
    notes: tuple[str, ...] = ()
    if base is None:
        try:
            base = open_source(named_base(folder, config), device=device, dtype=dtype)
        except LoadingError as error:
            raise LoadingError(f"adapter {name}, its base: {error}") from error
    elif named and not same_source(named, base.name):
        notes = (f"adapter {Path(name).name} names {named} as its base; it was put on {base.name}",)
    if is_peft(base.model) or backend_of(base.model) is not None:
        raise PairError(
            f"adapter {folder} needs a plain Hugging Face base, got {type(base.model).__name__}: "
            "give the base as a folder, hub id or PreTrainedModel"
        )
    model, unused = put_on(base.model, base.name, folder, named)
    tokenizer = read_tokenizer(str(folder), local=True) or base.tokenizer
    return OpenedModel(converted(model, device, dtype), tokenizer, name, "adapter", notes + unused)


def same_source(first: str, second: str) -> bool:
    """Whether two names are the same hub id, or lead to the same folder."""
    first, second = (
        os.path.realpath(name) if os.path.isdir(name) else name for name in (first, second)
    )
    return first == second
