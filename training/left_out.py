"""What an adapter on some blocks does not reach, so that nobody takes it for trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from .adapters import is_named

# PEFT puts it between an adapted module and its weights.
WRAPPED = ".base_layer"


def left_out(
    blocks: Sequence[nn.Module], targets: Sequence[str], everything: bool
) -> tuple[str, ...]:
    """Notes on what has no adapter although its block is trained.

    Args:
        blocks: those that are trained, with their adapter.
        targets: the projections that were to be adapted.
        everything: whether they were to be all that there are.
    """
    notes = []
    linear = _names(_linear_without(blocks, targets))
    if linear:
        notes.append(
            "PEFT takes some names for those of experts' weights in this architecture: no adapter "
            f"on the linear layers {linear}"
        )
    experts = _names(_experts_without(blocks))
    if experts and everything:
        notes.append(f"experts' weights are no linear layers: no adapter on {experts}")
    return tuple(notes)


def _linear_without(blocks: Sequence[nn.Module], targets: Sequence[str]) -> Iterator[str]:
    """Linear layers that a target means: one with an adapter is inside a module of its name."""
    for block in blocks:
        for path, module in block.named_modules():
            if isinstance(module, nn.Linear) and any(is_named(path, name) for name in targets):
                yield path


def _experts_without(blocks: Sequence[nn.Module]) -> Iterator[str]:
    """Stacks of matrices without an adapter: [experts, rows, columns]."""
    for block in blocks:
        modules: Iterator[Any] = block.modules()
        wrappers = (m for m in modules if type(m).__name__ == "ParamWrapper")
        reached = {id(wrapper.get_param()) for wrapper in wrappers}
        for path, p in block.named_parameters():
            # A kernel that slides over each channel by itself has a dimension of one.
            if p.dim() == 3 and min(p.shape) > 1 and id(p) not in reached:
                yield path.replace(WRAPPED, "")


def _names(paths: Iterator[str]) -> str:
    return ", ".join(dict.fromkeys(paths))
