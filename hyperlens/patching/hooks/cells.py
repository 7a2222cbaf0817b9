"""One patched forward pass at the cost of what comes after the patch.

Everything before a patched site is as in the unpatched model, whose residual stream is known: the
blocks before it are not run again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...errors import PatchError
from ...hooks.surface import HookedModel, evaluating, final_norm, resid_post
from .sites import Site, hook_name, in_blocks, record

# Blocks that are resumed must say what they said before, up to the rounding of their numbers.
EXACT = {torch.float32: 1e-4, torch.float64: 1e-6}
NEARLY = 5e-2


Activations = dict[Site, Float[Tensor, "batch pos d_model"]]


def read(
    model: HookedModel,
    tokens: Int[Tensor, "batch pos"],
    attention_mask: Int[Tensor, "batch pos"],
    wanted: Sequence[Site],
) -> tuple[list[Float[Tensor, "batch pos d_model"]], Activations]:
    """One forward pass: the L + 1 residual layers, and the activations at the wanted sites."""
    layers = [Site("resid_pre", 0), *in_blocks("resid_post", range(model.cfg.n_layers))]
    found = record(model, tokens, attention_mask, [*layers, *wanted])
    stream = [found[site] for site in layers]
    # A block is given what the one before it returned: kept once.
    inner = {Site("resid_pre", block): stream[block] for block in range(model.cfg.n_layers)}
    return stream, found | {site: inner[site] for site in wanted if site in inner}


def resume(
    model: HookedModel,
    tokens: Int[Tensor, "batch pos"],
    attention_mask: Int[Tensor, "batch pos"],
    block: int,
    residual: Float[Tensor, "batch pos d_model"],
    replaced: tuple[Site, Float[Tensor, "batch pos d_model"]] | None = None,
) -> Float[Tensor, "batch pos d_model"]:
    """What leaves the last block if `residual` enters block `block` (0-based).

    Args:
        model: a `ResidualModel`.
        tokens, attention_mask: what it reads; positions and masks come from them.
        block: the first block to run; the number of blocks runs none.
        residual: what enters it.
        replaced: a site inside the blocks that run, and what to put there.
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
    with evaluating(model):
        model.run_with_hooks(
            tokens,
            attention_mask=attention_mask,
            return_type=None,
            resume=(block, residual),
            fwd_hooks=hooks,
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
    """What leaves the final norm of a model with `value` at `site`.

    Args:
        model: a `ResidualModel`.
        tokens, attention_mask: what it reads.
        stream: its own L + 1 residual layers on the same tokens, unpatched.
        site: where the patch goes.
        value: the activation there, of every token; `torch.where` leaves some as they are.
    """
    if site.block is None:
        return value
    if site.kind in ("resid_pre", "resid_post"):
        first = site.block + (site.kind == "resid_post")
        last = resume(model, tokens, attention_mask, first, value)
    else:
        entering = stream[site.block]
        last = resume(model, tokens, attention_mask, site.block, entering, (site, value))
    with evaluating(model):
        return final_norm(model, last.flatten(0, 1)).view(last.shape)


def check_resumes(
    model: HookedModel,
    tokens: Int[Tensor, "batch pos"],
    attention_mask: Int[Tensor, "batch pos"],
    stream: Sequence[Float[Tensor, "batch pos d_model"]],
) -> None:
    """Resumed with its own residual, half-way or at its last block, a model ends where it ended.

    Raises:
        PatchError: where blocks hand on more than the residual stream.
    """
    n_layers = model.cfg.n_layers
    real = attention_mask.bool()
    span = float(stream[-1][real].abs().max())
    # The last block uses what any block may have left for later ones, as shared keys and values.
    for block in sorted({(n_layers + 1) // 2, n_layers - 1}):
        try:
            again = resume(model, tokens, attention_mask, block, stream[block])
        except (LookupError, AttributeError, TypeError) as error:
            raise PatchError(_hands_on_more(model, block, "it does not run")) from error
        gap = float((again - stream[-1])[real].abs().max())
        if not gap <= EXACT.get(model.cfg.dtype, NEARLY) * span:
            away = f"it ends {gap:.2g} away from where it ended"
            raise PatchError(_hands_on_more(model, block, away))


def _hands_on_more(model: HookedModel, block: int, what: str) -> str:
    return (
        f"{model.cfg.model_name}'s blocks hand on more than the residual stream (resumed at block "
        f"{block}, {what}): use patch_hooks with whole forward passes"
    )
