"""Record activations of one hooked model and put them into another, at named sites.

The functions here work inside anybody's own `run_with_hooks`:

    sites = [Site("resid_post", 9)]
    activations = record(tuned, tokens, mask, sites)
    logits = base.run_with_hooks(
        tokens, attention_mask=mask, fwd_hooks=patch_hooks(base, activations, attention_mask=mask)
    )
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..checks import check_types
from ..errors import PatchError
from .sites import Positions, Site, hook_name, positions_mask
from .surface import HookedModel, evaluating

Hook = tuple[str, Callable[..., Tensor]]


@check_types
def record(
    model: HookedModel,
    tokens: Int[Tensor, "batch pos"],
    attention_mask: Int[Tensor, "batch pos"] | None,
    where: Sequence[Site],
) -> dict[Site, Float[Tensor, "batch pos d_model"]]:
    """One forward pass; the activations at these sites, detached.

    Args:
        model: any hooked model.
        tokens, attention_mask: what it reads; None where nothing is padded.
        where: sites to record.

    Raises:
        PatchError: if the model lacks a site.
    """
    activations: dict[Site, Tensor] = {}

    def keep(value: Tensor, hook: Any, site: Site) -> None:
        activations[site] = value.detach()

    hooks = [(hook_name(model, site), partial(keep, site=site)) for site in where]
    mask = torch.ones_like(tokens) if attention_mask is None else attention_mask
    with evaluating(model):
        model.run_with_hooks(tokens, attention_mask=mask, return_type=None, fwd_hooks=hooks)
    return activations


@check_types
def patch_hooks(
    model: HookedModel,
    activations: Mapping[Site, Float[Tensor, "batch pos d_model"]],
    *,
    attention_mask: Int[Tensor, "batch pos"] | None = None,
    positions: Positions = None,
) -> list[Hook]:
    """Hooks that put source activations into a target model, for its `run_with_hooks`.

    Args:
        model: the target.
        activations: what `record` returned for the same tokens, or tensors of your own.
        attention_mask: of those tokens; needed to count positions where there is padding.
        positions: which tokens get the source activation; the others keep the target's.

    Raises:
        PatchError: if the model lacks a site, or the positions exist in no sequence. The hooks
            raise it too, if shapes differ.
    """
    hooks: list[Hook] = []
    for site, value in activations.items():
        mask = attention_mask
        if mask is None:
            mask = torch.ones(value.shape[:2], dtype=torch.long, device=value.device)
        here = None if positions is None else positions_mask(positions, mask)
        hooks.append(
            (hook_name(model, site), partial(_replace, source=value, here=here, site=site))
        )
    return hooks


def _replace(
    value: Float[Tensor, "batch pos d_model"],
    hook: Any,
    *,
    source: Tensor,
    here: Bool[Tensor, "batch pos"] | None,
    site: Site,
) -> Float[Tensor, "batch pos d_model"]:
    if value.shape != source.shape:
        raise PatchError(
            f"the activation at {site} has shape {tuple(value.shape)}, the source activation "
            f"{tuple(source.shape)}: record it on the same tokens"
        )
    new = source.to(value)
    return new if here is None else torch.where(here.to(value.device)[..., None], new, value)
