"""What two models have in common below the first block that differs: read once for both.

An adapter on the last blocks, or a fine-tune that froze the first ones, leaves the streams of the
blocks below as they were. Which those are is found by looking at the weights, and checked on a
text: nobody has to say it, and a difference that is not in the weights is not overlooked.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..hooks import surface
from ..hooks.surface import HookedModel, evaluating
from ..models.kinds import plain_model
from .streams import NOTHING_SHARED, SharedPrefix

# What a configuration says that no block computes with.
NOT_COMPUTED_WITH = frozenset(
    {
        *("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version"),
        *("tie_word_embeddings", "use_cache", "bos_token_id", "eos_token_id", "pad_token_id"),
    }
)


def find_shared_prefix(base: HookedModel, tuned: HookedModel) -> SharedPrefix:
    """What two models share by their weights; nothing unless both are `ResidualModel`s."""
    # Only a `ResidualModel` can begin a pass at a block.
    parts: list[Any] = [getattr(one, "structure", None) for one in (base, tuned)]
    if any(one is None for one in parts):
        return NOTHING_SHARED
    models = [plain_model(one.model) for one in (base, tuned)]
    apart = [{*map(id, p.blocks), id(p.final_norm), id(p.head)} for p in parts]
    if type(models[0]) is not type(models[1]) or not _same_settings(*models):
        return NOTHING_SHARED
    norm = _same(parts[0].final_norm, parts[1].final_norm)
    head = _same(parts[0].head, parts[1].head) and parts[0].soft_cap == parts[1].soft_cap
    head = head and parts[0].logit_scale == parts[1].logit_scale
    if not _same(models[0], models[1], *apart):
        return SharedPrefix(norm=norm, head=head)
    layers = 1
    for first, second in zip(parts[0].blocks, parts[1].blocks, strict=True):
        if not _same(first, second):
            break
        layers += 1
    return SharedPrefix(layers, False, norm, head)


def checked_prefix(
    shared: SharedPrefix,
    base: HookedModel,
    tuned: HookedModel,
    tokens: Int[Tensor, "batch pos"],
    mask: Int[Tensor, "batch pos"],
) -> SharedPrefix:
    """What of a shared prefix holds, bit for bit, when both models read some tokens.

    Args:
        shared: what `find_shared_prefix` says.
        base, tuned: the models.
        tokens, mask: what they read.
    """
    if not (shared.layers or shared.norm):
        return NOTHING_SHARED
    with evaluating(base), evaluating(tuned):
        first, second = (surface.run_residuals(model, tokens, mask) for model in (base, tuned))
        layers = 0
        while layers < shared.layers and torch.equal(first[layers], second[layers]):
            layers += 1
        normed = [surface.final_norm(model, first[-1][:1, -1]) for model in (base, tuned)]
        norm = shared.norm and torch.equal(*normed)
        head = shared.head and torch.equal(
            *(surface.unembed(model, normed[0]) for model in (base, tuned))
        )
        found = SharedPrefix(layers, layers > 1, norm, head)
        if found.resumes:
            try:
                again = _rest(tuned, tokens, mask, second[layers - 1], layers - 1)
            except (LookupError, AttributeError, TypeError, RuntimeError):
                return replace(found, resumes=False)
            same = map(torch.equal, again, second[layers:])
            found = replace(found, resumes=all(same))
    return found


def shared_on(
    base: HookedModel, tuned: HookedModel, sequence: Sequence[int] | np.ndarray
) -> SharedPrefix:
    """What two models share by their weights, as far as it holds on a text, given as token ids."""
    shared = find_shared_prefix(base, tuned)
    here = surface.input_device(base)
    tokens = torch.as_tensor(sequence, dtype=torch.int64, device=here)[None]
    return checked_prefix(shared, base, tuned, tokens, torch.ones_like(tokens))


def run_tuned(
    tuned: HookedModel,
    tokens: Int[Tensor, "batch pos"],
    mask: Int[Tensor, "batch pos"],
    shared: SharedPrefix,
    of_base: list[Float[Tensor, "batch pos d_model"]],
) -> list[Float[Tensor, "batch pos d_model"]]:
    """The tuned model's L + 1 residual layers, of which the first may be the base's.

    Args:
        tuned: the tuned model.
        tokens, mask: what it reads.
        shared: what it shares with the base.
        of_base: the base's residual layers on the same tokens.
    """
    if not shared.blocks:
        return surface.run_residuals(tuned, tokens, mask)
    prefix = of_base[: shared.layers]
    return [*prefix, *_rest(tuned, tokens, mask, prefix[-1], shared.blocks)]


def run_last_of_both(
    base: HookedModel,
    tuned: HookedModel,
    tokens: Int[Tensor, "batch pos"],
    mask: Int[Tensor, "batch pos"],
    shared: SharedPrefix,
) -> tuple[Float[Tensor, "batch pos d_model"], Float[Tensor, "batch pos d_model"]]:
    """Layer L of both models, the blocks that they share run once."""
    if not shared.blocks:
        return (
            surface.run_last_residual(base, tokens, mask),
            surface.run_last_residual(tuned, tokens, mask),
        )
    end = base.cfg.n_layers
    entering, of_base = surface.run_layers(base, tokens, mask, [shared.blocks, end])
    if shared.blocks == end:
        return of_base, of_base.clone()
    resume = shared.blocks, entering
    return of_base, surface.run_layers(tuned, tokens, mask, [end], resume)[0]


def _rest(
    tuned: HookedModel, tokens: Tensor, mask: Tensor, entering: Tensor, block: int
) -> list[Tensor]:
    """The layers after a block, of a pass that begins at it."""
    layers = range(block + 1, tuned.cfg.n_layers + 1)
    return surface.run_layers(tuned, tokens, mask, layers, (block, entering)) if layers else []


def _same_settings(first: Any, second: Any) -> bool:
    """Whether the configurations agree in all that a block may compute with."""
    settings = [
        {k: v for k, v in one.config.to_dict().items() if k not in NOT_COMPUTED_WITH}
        for one in (first, second)
    ]
    attention = [getattr(one.config, "_attn_implementation", None) for one in (first, second)]
    return settings[0] == settings[1] and attention[0] == attention[1]


def _same(
    first: nn.Module,
    second: nn.Module,
    without: frozenset[int] | set[int] = frozenset(),
    without_second: frozenset[int] | set[int] = frozenset(),
) -> bool:
    """Whether two modules have the same parts, kinds and tensors, some submodules left out."""
    if first is second:
        return True
    pairs = zip_longest(_parts(first, without), _parts(second, without_second))
    return all(mine and theirs and _same_part(mine, theirs) for mine, theirs in pairs)


def _parts(
    module: nn.Module, without: frozenset[int] | set[int], name: str = ""
) -> Iterator[tuple[str, nn.Module]]:
    yield name, module
    for called, child in module.named_children():
        if id(child) not in without:
            yield from _parts(child, without, f"{name}.{called}")


def _same_part(mine: tuple[str, nn.Module], theirs: tuple[str, nn.Module]) -> bool:
    (name, first), (other, second) = mine, theirs
    if name != other or type(first) is not type(second) or _own_hooks(first) != _own_hooks(second):
        return False
    tensors = [vars(one)["_parameters"] | vars(one)["_buffers"] for one in (first, second)]
    return tensors[0].keys() == tensors[1].keys() and all(
        _same_tensor(tensor, tensors[1][key]) for key, tensor in tensors[0].items()
    )


def _own_hooks(module: nn.Module) -> list[int]:
    """Hooks that a user has put on a module: what they do is not in the weights."""
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    return [id(one) for one in hooks if not _is_of_transformers(one)]


def _is_of_transformers(hook: Any) -> bool:
    """Whether it is one of those that transformers leaves behind to collect outputs."""
    return str(getattr(hook, "__module__", "")).startswith("transformers.")


def _same_tensor(first: Tensor | None, second: Tensor | None) -> bool:
    if first is None or second is None:
        return first is second
    if first.shape != second.shape or first.dtype != second.dtype or first.device != second.device:
        return False
    if first.device.type == "meta":
        return False
    shared = first.data_ptr() == second.data_ptr() and first.stride() == second.stride()
    return shared or torch.equal(first, second)
