"""Fold an adapter into its base: a standard full folder that needs no PEFT to open."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from ..errors import LoadingError, TrainingError
from ..files import check_new_folder
from ..hooks.loading import parse_dtype
from ..models.adapters import ADAPTER_CONFIG
from ..models.kinds import is_peft
from ..models.sources import OpenedModel, open_source
from ..models.weight_sharing import converted, merged
from ..results.fingerprint import versions
from .hyperfitting import HyperfitRun, record_of
from .saving import RECORD, save


def merge(
    source: Any,
    out: str | Path,
    *,
    base: Any = None,
    dtype: str | torch.dtype | None = None,
) -> Path:
    """Write base and adapter as one standard Hugging Face folder, with its tokenizer.

    The folder is there as a whole or not at all; adapter and base stay as they are. In bfloat16,
    merged weights are rounded to 8 bits of precision, which an adapter beside its base is not:
    `dtype="float32"` keeps what the adapter does exactly.

    Args:
        source: an adapter folder, what `hyperfit` returned, a `PeftModel`, or a pair (PeftModel,
            tokenizer).
        out: a new folder.
        base: for an adapter folder, the model to merge it into; None takes the one it names.
        dtype: of the merged weights; None keeps the base's.

    Returns:
        The folder written.

    Raises:
        TrainingError: if there is no adapter to merge.
        LoadingError: if adapter or base cannot be opened, or this adapter cannot be merged.
        PairError: if the adapter does not fit the base.
        ResultsError: if `out` is not a new folder, or cannot be written.
    """
    folder = Path(out).expanduser()
    check_new_folder(folder)
    chosen = parse_dtype(dtype)
    # Rounding comes last: what is narrower than the base is merged before it is cast.
    wide = chosen if chosen in (torch.float32, torch.float64) else None
    opened = _opened(source, base, wide)
    if getattr(opened.model, "is_quantized", False):
        raise TrainingError(
            f"the base of {opened.name} is quantised: give one that is not with base=… (--base)"
        )
    (config, *_) = opened.model.peft_config.values()
    named = config.base_model_name_or_path if base is None else _name(base)
    about = {"adapter": _adapter_name(source, opened), "base": named}
    record = _record(source) | {"merged": about, "versions": versions()}
    model = converted(merged(opened.model), None, chosen)
    save(folder, model, opened.tokenizer, record)
    return folder


def _opened(source: Any, base: Any, dtype: torch.dtype | None) -> OpenedModel:
    if isinstance(source, HyperfitRun):
        source = (source.model, source.tokenizer)
    if isinstance(source, str | Path):
        return _opened_folder(Path(source).expanduser(), base, dtype)
    model = source[0] if isinstance(source, tuple) and len(source) == 2 else source
    if not is_peft(model):
        raise TrainingError(
            f"expected an adapter to merge, got {type(model).__name__}: give an adapter folder, a "
            "PeftModel, or a run of lora or late_lora"
        )
    if base is not None:
        raise TrainingError("base is for adapter folders: this adapter is on its base already")
    return open_source(source, dtype=dtype)


def _opened_folder(folder: Path, base: Any, dtype: torch.dtype | None) -> OpenedModel:
    if folder.is_dir() and not (folder / ADAPTER_CONFIG).exists():
        raise TrainingError(
            f"{folder} is not an adapter folder (it has no {ADAPTER_CONFIG}): there is nothing to "
            "merge"
        )
    if not folder.is_dir():
        raise TrainingError(f"adapter folder {folder} does not exist: give a folder")
    # Adding two tensors needs no accelerator.
    where = torch.device("cpu")
    if base is not None:
        on = open_source(base, device=where, dtype=dtype)
        return open_source(folder, device=where, dtype=dtype, base=on)
    try:
        return open_source(folder, device=where, dtype=dtype)
    except LoadingError as error:
        if not str(error).startswith(f"adapter {folder}, its base: "):
            raise
        raise LoadingError(f"{error}; here, pass base=… (--base on the command line)") from error


def _record(source: Any) -> dict[str, Any]:
    """What hyperfit did, if it made the adapter: what the run knows, or wrote beside it."""
    if isinstance(source, HyperfitRun):
        return record_of(source)
    if not isinstance(source, str | Path):
        return {}
    try:
        found = json.loads((Path(source).expanduser() / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _adapter_name(source: Any, opened: OpenedModel) -> str:
    if isinstance(source, HyperfitRun) and source.folder is not None:
        return str(source.folder)
    return opened.name if opened.kind == "adapter" else type(opened.model).__name__


def _name(base: Any) -> str:
    return str(base) if isinstance(base, str | Path) else type(base).__name__
