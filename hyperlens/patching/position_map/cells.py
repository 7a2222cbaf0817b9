"""The cells of a layer x position map: one token's residual put in, one decision read.

A patch at one of the last few tokens leaves all tokens before them as they were, whose keys and
values are kept: of every cell only the last few tokens are run, and only through the blocks after
the patch. Several texts and positions share a pass, and one token is unembedded.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...errors import PatchError
from ...hooks.surface import (
    HookedModel,
    evaluating,
    final_norm,
    resid_post,
    run_residuals,
)
from ...models.kinds import plain_model
from ..hooks.cells import EXACT, NEARLY, resume
from ..hooks.generating import takes_past
from ..logits import check_stream


@dataclass(frozen=True)
class Ending:
    """Texts that end with the token before a decision, as a model reads them.

    Attributes:
        model: a `ResidualModel`.
        tokens, mask: padded on the left, so that all end together.
        stream: the L + 1 residual layers.
        n_last: how many tokens at the end may be patched one by one.
        past: keys and values of the tokens before these; None if there are none.
    """

    model: HookedModel
    tokens: Int[Tensor, "text pos"]
    mask: Int[Tensor, "text pos"]
    stream: Sequence[Float[Tensor, "text pos d_model"]]
    n_last: int
    past: Any

    @property
    def unpatched(self) -> Float[Tensor, "text d_model"]:
        """What leaves the final norm at the last token."""
        return self.normed(self.stream[-1][:, -1])

    def normed(self, last: Float[Tensor, "n d_model"]) -> Float[Tensor, "n d_model"]:
        """The model's final norm."""
        with evaluating(self.model):
            return final_norm(self.model, last)


def read_ending(
    name: str,
    model: HookedModel,
    tokens: Int[Tensor, "text pos"],
    mask: Int[Tensor, "text pos"],
    n_last: int,
) -> Ending:
    """Read texts, and keep what cells need.

    Args:
        name: how errors call the model.
        model: a `ResidualModel`.
        tokens, mask: padded on the left; `n_last` real tokens at least in each.
        n_last: how many positions will be patched.

    Raises:
        ActivationError: if the model overflows.
        PatchError: if it keeps something other than keys and values.
    """
    with evaluating(model):
        stream = run_residuals(model, tokens, mask)
        check_stream(name, stream, mask.bool())
        past = _past(model, tokens[:, :-n_last], mask[:, :-n_last])
    return Ending(model, tokens, mask, stream, n_last, past)


def patched_everywhere(
    host: Ending, donated: Float[Tensor, "text pos d_model"], layer: int
) -> Float[Tensor, "text d_model"]:
    """What leaves the host's final norm at the last token, all positions of a layer patched."""
    return host.normed(resume(host.model, host.tokens, host.mask, layer, donated)[:, -1])


def patched_singly(
    host: Ending, donated: Float[Tensor, "text pos d_model"], layer: int, batch_size: int
) -> Float[Tensor, "text offset d_model"]:
    """The same for every single position: offset 0 is the last token, 1 the one before it.

    Args:
        host: who is patched.
        donated: the donor's residual at the layer.
        layer: 0 for the embedding output, l for the output of block l - 1.
        batch_size: (text, offset) pairs per forward pass.
    """
    own, new = (x[:, -host.n_last :] for x in (host.stream[layer], donated))
    n = len(own) * host.n_last
    place = torch.arange(host.n_last, device=own.device)
    found = []
    for start in range(0, n, batch_size):
        pairs = torch.arange(start, min(start + batch_size, n), device=own.device)
        text, offset = pairs // host.n_last, pairs % host.n_last
        here = place == host.n_last - 1 - offset[:, None]
        put = torch.where(here[..., None], new[text], own[text])
        found.append(host.normed(_last_tokens(host, text, layer, put)[:, -1]))
    return torch.cat(found).view(len(own), host.n_last, -1)


def check_reads_on(host: Ending) -> None:
    """Reading on from kept keys and values, half-way, a model must end where it ended.

    Raises:
        PatchError: where it does not.
    """
    middle = (host.model.cfg.n_layers + 1) // 2
    every = torch.arange(len(host.tokens), device=host.tokens.device)
    again = _last_tokens(host, every, middle, host.stream[middle][:, -host.n_last :])
    before = host.stream[-1][:, -host.n_last :]
    gap, span = float((again - before).abs().max()), float(before.abs().max())
    if not gap <= EXACT.get(host.model.cfg.dtype, NEARLY) * span:
        raise PatchError(
            f"{host.model.cfg.model_name} does not read on from kept keys and values as it reads "
            f"at once (it ends {gap:.2g} away from where it ended): use patch_hooks with whole "
            "forward passes"
        )


def _past(model: Any, tokens: Int[Tensor, "text pos"], mask: Int[Tensor, "text pos"]) -> Any:
    from transformers import DynamicCache
    from transformers.cache_utils import LinearAttentionCacheLayerMixin as State

    if not tokens.shape[1]:
        return None
    plain = plain_model(model.model)
    past = DynamicCache(config=plain.config)
    if not takes_past(plain) or any(isinstance(layer, State) for layer in past.layers):
        raise PatchError(
            f"{type(plain).__name__} keeps something other than keys and values of what it has "
            "read: use patch_hooks with whole forward passes"
        )
    model.run_with_hooks(tokens, attention_mask=mask, return_type=None, past_key_values=past)
    return past


def _last_tokens(
    host: Ending,
    text: Int[Tensor, " row"],
    block: int,
    residual: Float[Tensor, "row last d_model"],
) -> Float[Tensor, "row last d_model"]:
    """What leaves the last block if `residual` enters a block at the last tokens of some texts."""
    last = host.model.cfg.n_layers - 1
    if block > last:
        return residual
    kept: list[Tensor] = []

    def keep(value: Tensor, hook: Any) -> None:
        kept.append(value.detach())

    with evaluating(host.model):
        host.model.run_with_hooks(
            host.tokens[text][:, -host.n_last :],
            attention_mask=host.mask[text],
            past_key_values=_of_rows(host.past, text, block),
            return_type=None,
            resume=(block, residual),
            fwd_hooks=[(resid_post(last), keep)],
        )
    return kept[0]


def _of_rows(past: Any, text: Int[Tensor, " row"], block: int) -> Any:
    """A cache of their own for some rows, which the pass may write on; the kept one stays."""
    if past is None:
        return None
    own = copy.copy(past)
    own.layers = [copy.copy(layer) for layer in past.layers]
    for layer in own.layers[block:]:  # those before it do not run
        layer.batch_select_indices(text)
    return own
