"""One patched forward pass at the cost of the blocks after the patch.

Everything before a patched site is as in the unpatched model, whose residual stream is known: the
blocks before it are not run again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..errors import PatchError
from .patching import record
from .sites import Site, hook_name, in_blocks
from .surface import HookedModel, evaluating, final_norm, resid_post

# How far a resumed pass may end from where the whole pass ended, as a share of the largest
# activation: rounding only. In half precision, kernels chosen by shape round differently.
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-6}
HALF_PRECISION_TOLERANCE = 5e-2


Activations = dict[Site, Float[Tensor, "batch pos d_model"]]


def read(
    model: HookedModel,
    tokens: Int[Tensor, "batch pos"],
    attention_mask: Int[Tensor, "batch pos"],
    wanted: Sequence[Site],
) -> tuple[list[Float[Tensor, "batch pos d_model"]], Activations]:
    """One forward pass: the L + 1 residual layers, and the activations at the wanted sites."""
    layers = [Site("resid_pre", 0), *in_blocks("resid_post", range(model.cfg.n_layers))]
    activations = record(model, tokens, attention_mask, [*layers, *wanted])
    stream = [activations[site] for site in layers]
    # A block's input is the output of the block before it: kept once.
    entering = {Site("resid_pre", block): stream[block] for block in range(model.cfg.n_layers)}
    return stream, activations | {site: entering[site] for site in wanted if site in entering}


def resume(
    model: HookedModel,
    tokens: Int[Tensor, "batch pos"],
    attention_mask: Int[Tensor, "batch seen"],
    block: int,
    residual: Float[Tensor, "batch pos d_model"],
    *,
    replaced: tuple[Site, Float[Tensor, "batch pos d_model"]] | None = None,
    past: Any = None,
) -> Float[Tensor, "batch pos d_model"]:
    """The last block's output if `residual` enters block `block` (0-based).

    Args:
        model: a `ResidualModel`.
        tokens, attention_mask: what it reads; position ids and attention masks are made from them.
        block: the first block to run; the number of blocks runs none.
        residual: what enters it.
        replaced: a site inside the blocks that run, and the activation to put there.
        past: a cache with keys and values of earlier tokens; the pass writes on it.
    """
    last = model.cfg.n_layers - 1
    if block > last:
        return residual
    kept: list[Tensor] = []

    def keep(value: Tensor, hook: Any) -> None:
        kept.append(value.detach())

    hooks: list[Any] = []
    if replaced is not None:
        site, value = replaced
        hooks.append((hook_name(model, site), lambda own, hook: value.to(own)))
    hooks.append((resid_post(last), keep))
    cache = {} if past is None else {"past_key_values": past}
    with evaluating(model):
        model.run_with_hooks(
            tokens,
            attention_mask=attention_mask,
            return_type=None,
            resume=(block, residual),
            fwd_hooks=hooks,
            **cache,
        )
    return kept[0]


def run_patched(
    model: HookedModel,
    tokens: Int[Tensor, "batch pos"],
    attention_mask: Int[Tensor, "batch pos"],
    stream: Sequence[Float[Tensor, "batch pos d_model"]],
    site: Site,
    value: Float[Tensor, "batch pos d_model"],
) -> Float[Tensor, "batch pos d_model"]:
    """The output of a model's final norm with `value` at `site`.

    Args:
        model: a `ResidualModel`.
        tokens, attention_mask: what it reads.
        stream: its own L + 1 residual layers on the same tokens, unpatched.
        site: where the patch goes.
        value: the activation there, of every token; `torch.where` leaves some as they are.
    """
    if site.block is None:
        return value
    # A patch of the stream itself is what enters the next block: that block is the first to run.
    # A patch inside a block needs the block's own input, which is the unpatched stream.
    if site.kind in ("resid_pre", "resid_post"):
        first = site.block + (site.kind == "resid_post")
        last = resume(model, tokens, attention_mask, first, value)
    else:
        entering = stream[site.block]
        last = resume(model, tokens, attention_mask, site.block, entering, replaced=(site, value))
    with evaluating(model):
        return final_norm(model, last.flatten(0, 1)).view(last.shape)


def check_resumes(
    model: HookedModel,
    tokens: Int[Tensor, "batch pos"],
    attention_mask: Int[Tensor, "batch pos"],
    stream: Sequence[Float[Tensor, "batch pos d_model"]],
) -> None:
    """Resumed with its own residual, half-way or at its last block, a model must end as before.

    Raises:
        PatchError: where blocks pass on more than the residual stream.
    """
    n_layers = model.cfg.n_layers
    real = attention_mask.bool()
    # The last block uses what any block may have left for later ones, as shared keys and values.
    for block in sorted({(n_layers + 1) // 2, n_layers - 1}):
        try:
            again = resume(model, tokens, attention_mask, block, stream[block])
        except (LookupError, AttributeError, TypeError) as error:
            raise PatchError(_passes_on_more(model, block, "it does not run")) from error
        difference = beyond_rounding(model, again[real], stream[-1][real])
        if difference is not None:
            away = f"it ends {difference:.2g} away from where it ended"
            raise PatchError(_passes_on_more(model, block, away))


def beyond_rounding(
    model: HookedModel,
    again: Float[Tensor, "*rows d_model"],
    before: Float[Tensor, "*rows d_model"],
) -> float | None:
    """The largest difference of two runs of a model; None if it is rounding only."""
    difference, span = float((again - before).abs().max()), float(before.abs().max())
    allowed = TOLERANCE.get(model.cfg.dtype, HALF_PRECISION_TOLERANCE) * span
    return None if difference <= allowed else difference


def _passes_on_more(model: HookedModel, block: int, what: str) -> str:
    return (
        f"{model.cfg.model_name}'s blocks pass on more than the residual stream (resumed at block "
        f"{block}, {what}): use patch_hooks with whole forward passes"
    )
