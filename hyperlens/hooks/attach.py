"""Temporary hooks on native modules: replace what they pass on, or skip blocks altogether."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import LoadingError
from ..models.structure import ModelStructure, first_tensor
from .surface import Kind

Change = Callable[[Tensor], Tensor | None]
"""Returns what replaces an activation; None leaves it unchanged."""


def attach(structure: ModelStructure, kind: Kind, block: int, change: Change) -> RemovableHandle:
    """Let a function see, and replace, what passes a site of a native model.

    Args:
        structure: where the model's parts are.
        kind: of the site.
        block: 0-based; ignored for "final_norm".
        change: gets the activation, and returns what replaces it.

    Raises:
        LoadingError: if the model's blocks have no two branches to attach to.
    """
    if kind == "final_norm":
        norm = structure.final_norm
        if isinstance(norm, nn.Sequential):
            if not len(norm):  # no norm at all: what the unembedding is given is the stream itself
                return on_input(structure.head, change)
            norm = norm[-1]
        return on_output(norm, change)
    if kind == "resid_pre":
        return on_input(structure.blocks[block], change)
    if kind == "resid_post":
        return on_output(structure.blocks[block], change)
    if structure.branches is None:
        raise LoadingError(
            f"no {kind} in this architecture: its blocks add something other than attention and "
            "an MLP to the stream; choose resid_pre or resid_post"
        )
    attention, mlp = structure.branches[block]
    return on_output(attention if kind == "attn_out" else mlp, change)


def on_input(module: nn.Module, change: Change) -> RemovableHandle:
    """Let a function see, and replace, the residual that a block is given."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        residual = residual_given(args, kwargs)
        changed = change(residual)
        if changed is None:
            changed = residual
        if args:
            return (changed, *args[1:]), kwargs
        return args, kwargs | {"hidden_states": changed}

    return module.register_forward_pre_hook(hook, with_kwargs=True)


def on_output(module: nn.Module, change: Change) -> RemovableHandle:
    """Let a function see, and replace, the tensor (or first of a tuple) that a module returns."""

    def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        returned = first_tensor(output)
        if returned is None:
            return output
        changed = change(returned)
        if changed is None:
            changed = returned
        return changed if isinstance(output, Tensor) else (changed, *output[1:])

    return module.register_forward_hook(hook)


def residual_given(args: Any, kwargs: Any) -> Tensor:
    """The residual among the arguments of a block's call."""
    residual: Tensor = args[0] if args else kwargs["hidden_states"]
    return residual


@contextmanager
def entering_at(
    blocks: Sequence[nn.Module],
    extras: Sequence[int | None],
    first: int,
    residual: Float[Tensor, "batch pos d_model"],
) -> Iterator[None]:
    """Skip the blocks before `first` inside, and let `residual` enter block `first`.

    Masks, positions, windows and everything else are still computed by the model's own code. With
    `first` equal to the number of blocks, the residual is what the last block returns.

    The residual is returned by the block before `first`, not set by a hook on block `first`: where
    gradient checkpointing includes hooks, as in transformers 5.18, the block is recomputed after
    the hook is gone.

    Args:
        blocks: all blocks of the model, in order.
        extras: how many values each returns after the residual, None for a plain tensor.
        first: the first block to run, 0-based.
        residual: what enters it.
    """

    def replaced(given: Tensor) -> Tensor:
        return residual.to(given.device, non_blocking=True)

    with ExitStack() as changes:
        if first == 0:
            changes.enter_context(on_input(blocks[0], replaced))
        for index in range(first):
            change = replaced if index == first - 1 else _unchanged
            changes.enter_context(_skipped(blocks[index], extras[index], change))
        yield


@contextmanager
def skipped(blocks: Sequence[nn.Module], extras: Sequence[int | None]) -> Iterator[None]:
    """Let blocks return the residual that they are given, without running.

    Args:
        blocks: the blocks to skip.
        extras: how many values each returns after the residual, None for a plain tensor.
    """
    with ExitStack() as changes:
        for block, extra in zip(blocks, extras, strict=True):
            changes.enter_context(_skipped(block, extra, _unchanged))
        yield


def _unchanged(given: Tensor) -> Tensor:
    return given


@contextmanager
def _skipped(
    block: nn.Module, extras: int | None, change: Callable[[Tensor], Tensor]
) -> Iterator[None]:
    """Let a block only change its residual inside, and return what it usually returns."""
    before = vars(block).get("forward")

    def forward(*args: Any, **kwargs: Any) -> Any:
        residual = change(residual_given(args, kwargs))
        return residual if extras is None else (residual, *[None] * extras)

    vars(block)["forward"] = forward
    try:
        yield
    finally:
        if before is None:
            del vars(block)["forward"]
        else:
            vars(block)["forward"] = before
