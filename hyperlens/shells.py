"""Copies of a model that share its weights: what we do to a shell, the caller never sees."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import nn

from .errors import LoadingError


def shell_of(model: nn.Module) -> Any:
    """A copy of all modules around the same tensors, in evaluation mode.

    Parameters are new objects over the same storage, so that merging an adapter, casting, or
    moving the shell leaves the caller's weights, keys, training mode and configuration alone,
    and ties between weights survive. Costs no memory for weights.
    """
    memo: dict[int, Any] = {id(b): b for b in model.buffers()}
    for parameter in model.parameters():
        # Quantised parameters carry state of their own in a subclass: share those as they are.
        plain = type(parameter) is nn.Parameter
        memo[id(parameter)] = (
            nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
            if plain
            else parameter
        )
    try:
        return copy.deepcopy(model, memo).eval()
    except Exception as error:
        raise LoadingError(
            f"cannot copy the modules of {type(model).__name__} ({error}): save it with "
            "save_pretrained and pass the folder"
        ) from error


def converted(shell: Any, device: torch.device | None, dtype: torch.dtype | None) -> Any:
    """Move and cast a shell; tensors are copied only where something changes."""
    if device is not None:
        shell = shell.to(device)
    return shell if dtype is None else shell.to(dtype)


def is_peft(model: object) -> bool:
    """Whether this is a `peft.PeftModel` (by class name, so that peft need not be imported)."""
    return any(c.__name__ == "PeftModel" for c in type(model).__mro__)


def plain_model(model: Any) -> Any:
    """The Hugging Face model inside a PeftModel; any other model is its own plain model."""
    return model.get_base_model() if is_peft(model) else model


def merged(model: Any) -> Any:
    """The plain model with any unmerged adapter folded into (copied) weights.

    Raises:
        LoadingError: if this kind of adapter cannot be merged.
    """
    shell = shell_of(model)
    if not is_peft(shell):
        return shell
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "All adapters are already merged")
            return shell.merge_and_unload(safe_merge=True).eval()
    except Exception as error:
        raise LoadingError(
            f"this adapter cannot be merged into its base ({error}); use backend='residual', "
            "which runs it unmerged"
        ) from error
