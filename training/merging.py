"""Fold an adapter into its base: a standard model folder, which opens without PEFT."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..checks import check_types
from ..errors import LoadingError, TrainingError
from ..files import check_new_folder
from ..hooks.loading import parse_dtype
from ..models.adapters import ADAPTER_CONFIG
from ..models.kinds import is_peft
from ..models.sources import OpenedModel, open_source
from ..models.weight_sharing import (
    compute_in_float32,
    converted,
    merged,
    weight_sharing_copy,
)
from ..results.fingerprint import versions
from .folders import save
from .hyperfitting import HyperfitRun, run_to_json
from .recipes import RUN_FILE
from .written import difference, few_tokens, is_exact, logits_of, logits_without

ROUNDED_AWAY = (
    'rounding the merged weights can do that; pass dtype="float32" (--dtype float32), or use the '
    "adapter on its base"
)


@check_types
def merge(
    source: Any,
    out: str | Path,
    *,
    base: Any = None,
    dtype: str | torch.dtype | None = None,
) -> Path:
    """Write base and adapter as one standard Hugging Face folder, with its tokenizer.

    The folder is written completely or not at all; adapter and base stay as they are. In bfloat16,
    merged weights are rounded to 8 bits of precision, which changes the model slightly, while an
    adapter beside its base is not rounded; `dtype="float32"` merges without that change.

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
    merged_dtype = parse_dtype(dtype)
    # Round once, at the end: cast before merging only to a wide dtype.
    wide_dtype = merged_dtype if merged_dtype in (torch.float32, torch.float64) else None
    opened = _open(source, base, wide_dtype)
    if getattr(opened.model, "is_quantized", False):
        raise TrainingError(
            f"the base of {opened.name} is quantised: give one that is not with base=… (--base)"
        )
    (config, *_) = opened.model.peft_config.values()
    base_name = config.base_model_name_or_path if base is None else _name(base)
    origin = {"adapter": _adapter_name(source, opened), "base": base_name}
    record = _record(source) | {"merged": origin, "versions": versions()}
    model = converted(merged(opened.model), None, merged_dtype)
    save(folder, model, opened.tokenizer, record, check=partial(_check_same, opened.model))
    return folder


def _check_same(adapted: Any, folder: Path) -> None:
    """Open the merged folder anew and hold its logits against the adapter's.

    All is computed in float32, one model after the other, so that only the weights are rounded.

    Raises:
        LoadingError: if they are another model's, or one of the two does not run.
    """
    plain = open_source(folder, device=torch.device("cpu"))
    exact = is_exact(adapted, plain.model)
    tokens = few_tokens(plain.model)
    compute_in_float32(plain.model)
    got = logits_of(plain.model, tokens)
    del plain
    shell = weight_sharing_copy(adapted)
    compute_in_float32(shell)
    why = difference(got, logits_of(shell, tokens), logits_without(shell, tokens), exact)
    if why is not None:
        raise LoadingError(
            f"merged and saved, this adapter is another model ({why}): "
            + ("use the adapter on its base instead" if exact else ROUNDED_AWAY)
        )


def _open(source: Any, base: Any, dtype: torch.dtype | None) -> OpenedModel:
    if isinstance(source, HyperfitRun):
        source = (source.model, source.tokenizer)
    if isinstance(source, str | Path):
        return _open_folder(Path(source).expanduser(), base, dtype)
    model = source[0] if isinstance(source, tuple) and len(source) == 2 else source
    if not is_peft(model):
        raise TrainingError(
            f"expected an adapter to merge, got {type(model).__name__}: give an adapter folder, a "
            "PeftModel, or a run of lora or late_lora"
        )
    if base is not None:
        raise TrainingError(
            "base is for adapter folders, and this adapter is already on its base: leave base out"
        )
    return open_source(source, dtype=dtype)


def _open_folder(folder: Path, base: Any, dtype: torch.dtype | None) -> OpenedModel:
    if folder.is_dir() and not (folder / ADAPTER_CONFIG).exists():
        raise TrainingError(
            f"{folder} is not an adapter folder (it has no {ADAPTER_CONFIG}): there is nothing to "
            "merge"
        )
    if not folder.is_dir():
        raise TrainingError(f"adapter folder {folder} does not exist: give a folder")
    cpu = torch.device("cpu")  # merging adds two tensors, which needs no accelerator
    if base is not None:
        opened_base = open_source(base, device=cpu, dtype=dtype)
        return open_source(folder, device=cpu, dtype=dtype, base=opened_base)
    try:
        return open_source(folder, device=cpu, dtype=dtype)
    except LoadingError as error:
        if not str(error).startswith(f"adapter {folder}, its base: "):
            raise
        raise LoadingError(f"{error}; here, pass base=… (--base on the command line)") from error


def _record(source: Any) -> dict[str, Any]:
    """How the adapter was trained, if hyperfit did it: from the run, or the file beside it."""
    if isinstance(source, HyperfitRun):
        return run_to_json(source)
    if not isinstance(source, str | Path):
        return {}
    try:
        record = json.loads((Path(source).expanduser() / RUN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def _adapter_name(source: Any, opened: OpenedModel) -> str:
    if isinstance(source, HyperfitRun) and source.folder is not None:
        return str(source.folder)
    return opened.name if opened.kind == "adapter" else type(opened.model).__name__


def _name(base: Any) -> str:
    return str(base) if isinstance(base, str | Path) else type(base).__name__
