"""Take activations of one hooked model and put them into another, at named sites.

The functions here work inside anybody's own `run_with_hooks`:

    sites = [Site("resid_post", 9)]
    donated = record(tuned, tokens, mask, sites)
    logits = base.run_with_hooks(
        tokens, attention_mask=mask, fwd_hooks=patch_hooks(base, donated, attention_mask=mask)
    )
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ...errors import PatchError
from ...hooks.surface import HookedModel, Kind, evaluating, site_hook
from .positions import Positions, positions_mask

KINDS: tuple[Kind, ...] = get_args(Kind)

Hook = tuple[str, Callable[..., Tensor]]


@dataclass(frozen=True, order=True)
class Site:
    """A place in a hooked model.

    Attributes:
        kind: "resid_pre" or "resid_post" (the stream entering or leaving a block), "attn_out" or
            "mlp_out" (what a block's branch adds to it), or "final_norm" (what leaves the final
            norm).
        block: 0-based; None for "final_norm".
    """

    kind: Kind
    block: int | None = None

    def __post_init__(self) -> None:
        check_kind(self.kind)
        if (self.block is None) != (self.kind == "final_norm"):
            raise PatchError(
                f"{self.kind} needs the number of a block, and final_norm has none; got "
                f"block={self.block}"
            )

    @property
    def layer(self) -> int:
        """The residual layer (0 for the embedding output) that it is, or else leads to.

        -1 for the final norm, which comes after the last layer.
        """
        if self.block is None:
            return -1
        return self.block if self.kind == "resid_pre" else self.block + 1

    def __str__(self) -> str:
        return self.kind if self.block is None else f"{self.kind} of block {self.block}"


def check_kind(kind: str) -> None:
    """Refuse what is no site.

    Raises:
        PatchError: naming the kinds there are.
    """
    if kind not in KINDS:
        raise PatchError(f"a site is one of {', '.join(KINDS)}; got {kind!r}")


def in_blocks(kind: str, blocks: Iterable[int]) -> list[Site]:
    """The same kind of site in several blocks.

    Raises:
        PatchError: if there is no such kind of site in a block.
    """
    check_kind(kind)
    return [Site(cast(Kind, kind), block) for block in blocks]


def hook_name(model: HookedModel, site: Site) -> str:
    """What a site is called in this model.

    Raises:
        PatchError: if the model has no such block, or its class no hook there.
    """
    n = model.cfg.n_layers
    if site.block is not None and not 0 <= site.block < n:
        raise PatchError(f"there is no block {site.block}: this model has blocks 0 to {n - 1}")
    name = site_hook(site.kind, site.block)
    if name not in model.hook_dict:
        raise PatchError(
            f"{type(model).__name__} has no hook for {site} ({name}): choose resid_pre or "
            "resid_post, or, for hooks of your own, another backend of load_hooked"
        )
    return name


def record(
    model: HookedModel,
    tokens: Int[Tensor, "batch pos"],
    attention_mask: Int[Tensor, "batch pos"] | None,
    where: Sequence[Site],
) -> dict[Site, Float[Tensor, "batch pos d_model"]]:
    """One forward pass; the activations at these sites, detached.

    Raises:
        PatchError: if the model lacks a site.
    """
    found: dict[Site, Tensor] = {}

    def keep(value: Tensor, hook: Any, site: Site) -> None:
        found[site] = value.detach()

    hooks = [(hook_name(model, site), partial(keep, site=site)) for site in where]
    mask = torch.ones_like(tokens) if attention_mask is None else attention_mask
    with evaluating(model):
        model.run_with_hooks(tokens, attention_mask=mask, return_type=None, fwd_hooks=hooks)
    return found


def patch_hooks(
    model: HookedModel,
    donated: Mapping[Site, Float[Tensor, "batch pos d_model"]],
    *,
    attention_mask: Int[Tensor, "batch pos"] | None = None,
    positions: Positions = None,
) -> list[Hook]:
    """Hooks that put donated activations into a model, for its `run_with_hooks`.

    Args:
        model: the model they are put into.
        donated: what `record` returned for the same tokens, or tensors of your own.
        attention_mask: of those tokens; needed to count positions where there is padding.
        positions: which tokens get the donated activation; the others keep their own.

    Raises:
        PatchError: if the model lacks a site, or the positions exist in no sequence. The hooks
            raise it too, if shapes differ.
    """
    hooks: list[Hook] = []
    for site, value in donated.items():
        mask = attention_mask
        if mask is None:
            mask = torch.ones(value.shape[:2], dtype=torch.long, device=value.device)
        here = None if positions is None else positions_mask(positions, mask)
        hooks.append((hook_name(model, site), partial(_put, donated=value, here=here, site=site)))
    return hooks


def _put(
    value: Float[Tensor, "batch pos d_model"],
    hook: Any,
    *,
    donated: Tensor,
    here: Bool[Tensor, "batch pos"] | None,
    site: Site,
) -> Float[Tensor, "batch pos d_model"]:
    if value.shape != donated.shape:
        raise PatchError(
            f"the activation at {site} has shape {tuple(value.shape)}, the donated one "
            f"{tuple(donated.shape)}: record it on the same tokens"
        )
    new = donated.to(value)
    return new if here is None else torch.where(here.to(value.device)[..., None], new, value)
