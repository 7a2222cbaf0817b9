"""Where heads attend, and which experts tokens are sent to: read from any Hugging Face model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from .loading import LoadedModel
from .surface import evaluating


def attention_patterns(
    loaded: LoadedModel, tokens: Int[Tensor, "batch pos"], mask: Int[Tensor, "batch pos"]
) -> list[Float[Tensor, "batch head pos pos"] | None]:
    """How much every token attends to every earlier one, by block; None where none is returned.

    The model runs with attention written out ("eager"), which alone returns its weights.
    """
    blocks = loaded.hooked.structure.blocks
    found: list[Tensor | None] = [None] * len(blocks)
    size = tokens.shape[1]

    def keep(block: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            for value in output if isinstance(output, tuple | list) else ():
                is_square = isinstance(value, Tensor) and value.shape[-2:] == (size, size)
                if is_square and value.ndim == 4 and value.is_floating_point():
                    found[block] = value.detach()

        return hook

    with ExitStack() as hooks:
        hooks.enter_context(_eager(loaded.model))
        for number, block in enumerate(blocks):
            for module in block.modules():
                hooks.enter_context(module.register_forward_hook(keep(number)))
        _run(loaded, tokens, mask)
    return found


@contextmanager
def _eager(model: nn.Module) -> Iterator[None]:
    """Inside, attention is written out, in the model and all that is in it."""
    found: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    configs = {id(one): one for one in found if hasattr(one, "_attn_implementation")}
    before = [(config, config._attn_implementation) for config in configs.values()]
    try:
        for config, _ in before:
            config._attn_implementation = "eager"
        yield
    finally:
        for config, name in before:
            config._attn_implementation = name


class Routing(NamedTuple):
    """Where a block sends its tokens.

    Attributes:
        experts: the numbers of each token's experts.
        n_experts: how many experts there are.
    """

    experts: Int[Tensor, "batch pos k"]
    n_experts: int


def expert_choices(
    loaded: LoadedModel, tokens: Int[Tensor, "batch pos"], mask: Int[Tensor, "batch pos"]
) -> list[Routing | None]:
    """Which experts every token is sent to, by block; None for blocks without experts.

    Routers differ between architectures; what they hand on does not: whole numbers, as many for
    each token, which some module in the block is given or returns.
    """
    blocks = loaded.hooked.structure.blocks
    found: list[Routing | None] = [None] * len(blocks)

    def keep(number: int) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            returned = output if isinstance(output, tuple | list) else (output,)
            values = [
                one for one in (*args, *kwargs.values(), *returned) if isinstance(one, Tensor)
            ]
            for value in values:
                k = value.shape[-1] if value.ndim > 1 else 0
                if value.dtype == torch.int64 and k and value.numel() == k * tokens.numel():
                    n = _n_experts(blocks[number], values, k)
                    if n is not None and found[number] is None:
                        found[number] = Routing(value.detach().reshape(*tokens.shape, k), n)

        return hook

    with ExitStack() as hooks:
        for number, (_, mlp) in enumerate(loaded.hooked.structure.branches or ()):
            for module in mlp.modules():
                hooks.enter_context(module.register_forward_hook(keep(number), with_kwargs=True))
        _run(loaded, tokens, mask)
    return found


def _n_experts(block: nn.Module, values: list[Tensor], k: int) -> int | None:
    """How many experts a block has: as many as its weights that are stacked by expert."""
    stacked = [p.shape[0] for p in block.parameters() if p.ndim == 3 and p.shape[0] >= k]
    return max(set(stacked), key=stacked.count) if stacked else None


def _run(loaded: LoadedModel, tokens: Tensor, mask: Tensor) -> None:
    with evaluating(loaded.hooked):
        loaded.hooked.run_with_hooks(tokens, attention_mask=mask, return_type=None, fwd_hooks=[])
