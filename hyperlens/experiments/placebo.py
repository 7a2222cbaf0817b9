"""Placebo weights: changed as much as the tuned model's, tensor by tensor, but at random."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PairError
from ..models.weight_sharing import weight_sharing_copy


def changed_tensors(base: nn.Module, tuned: nn.Module) -> dict[str, Tensor]:
    """tuned - base of every parameter that differs, float32; tied weights once.

    Raises:
        PairError: if the models have other parameters.
    """
    before, after = dict(base.named_parameters()), dict(tuned.named_parameters())
    if {k: v.shape for k, v in before.items()} != {k: v.shape for k, v in after.items()}:
        raise PairError(
            "the two models have weights of other shapes: placebos need a pair of one architecture"
        )
    changes = {name: after[name].detach().float() - before[name].detach().float() for name in after}
    return {name: change for name, change in changes.items() if bool(change.any())}


def placebo(base: nn.Module, changes: dict[str, Tensor], seed: int) -> Any:
    """The base with every change's entries shuffled inside their tensor.

    The norm of each tensor's change and the values in it stay; which weight gets which value, all
    that training has decided, is lost. Unchanged tensors are shared with the base.
    """
    generator = torch.Generator().manual_seed(seed)
    model = weight_sharing_copy(base)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, change in changes.items():
            order = torch.randperm(change.numel(), generator=generator).to(change.device)
            shuffled = change.flatten()[order].view_as(change)
            old = parameters[name]
            old.data = (old.detach().float() + shuffled).to(old.dtype)  # new storage: base stays
    return model
