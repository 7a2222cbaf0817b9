"""The one file that knows hook names and the surface every hooked model shares.

A hooked model is anything with that surface: TransformerLens's `TransformerBridge` (3.9 and 4.x)
and `HookedTransformer` (3.9), and our own `ResidualModel`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import ModuleType
from typing import Any, Literal, Protocol, cast, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ..errors import ActivationError
from ..offloading import device_of

# The attribute names that TransformerLens gives the two ends of a block, what its two branches add
# to the stream in between, and what leaves the final norm.
RESID_PRE, RESID_POST = "hook_resid_pre", "hook_resid_post"
NORM_OUT = "hook_out"

Kind = Literal["resid_pre", "resid_post", "attn_out", "mlp_out", "final_norm"]
IN_A_BLOCK: dict[Kind, str] = {
    "resid_pre": RESID_PRE,
    "resid_post": RESID_POST,
    "attn_out": "hook_attn_out",
    "mlp_out": "hook_mlp_out",
}


def resid_pre(block: int) -> str:
    """Hook name of the residual stream entering a block (0-based)."""
    return f"blocks.{block}.{RESID_PRE}"


def resid_post(block: int) -> str:
    """Hook name of the residual stream leaving a block (0-based)."""
    return f"blocks.{block}.{RESID_POST}"


def layer_hook(layer: int) -> str:
    """Hook name of a residual layer: 0 is the embedding output, l the output of block l - 1."""
    return resid_pre(0) if layer == 0 else resid_post(layer - 1)


def site_hook(kind: Kind, block: int | None) -> str:
    """Hook name of what is read or replaced at a site; `block` (0-based) for all but final_norm.

    Raises:
        KeyError: if there is no such kind of site.
    """
    return f"ln_final.{NORM_OUT}" if kind == "final_norm" else f"blocks.{block}.{IN_A_BLOCK[kind]}"


@runtime_checkable
class HookedModel(Protocol):
    """What hyperlens asks of a hooked model."""

    @property
    def cfg(self) -> Any:
        """n_layers, d_model, d_vocab, dtype, device and output_logits_soft_cap."""

    def __getattr__(self, name: str) -> Any:
        """Its `blocks`, `ln_final`, `unembed`, and what every torch module has.

        Not attributes of their own here: torch finds submodules by `__getattr__`, and from
        Python 3.12 on a protocol does not see what is found that way.
        """

    def run_with_hooks(self, *args: Any, **kwargs: Any) -> Any:
        """Forward pass with temporary hooks."""

    @property
    def hook_dict(self) -> Any:
        """Every hook point by its name."""


def import_transformer_lens(submodule: str = "") -> ModuleType:
    """Import (part of) transformer_lens, whose import alone would silence transformers' logger."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    try:
        return importlib.import_module("transformer_lens" + (f".{submodule}" if submodule else ""))
    finally:
        logging.set_verbosity(before)


@contextmanager
def evaluating(model: HookedModel | nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients inside; every module's own mode back afterwards."""
    training: list[nn.Module] = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def run_logits(
    model: HookedModel,
    tokens: Int[Tensor, "batch pos"],
    attention_mask: Int[Tensor, "batch pos"],
    fwd_hooks: list[tuple[str, Callable[..., Any]]] | None = None,
) -> Float[Tensor, "batch pos d_vocab"]:
    """The model's own logits (soft cap included), whatever its class."""
    logits: Tensor = model.run_with_hooks(
        tokens, attention_mask=attention_mask, return_type="logits", fwd_hooks=fwd_hooks or []
    )
    return logits


def run_residuals(
    model: HookedModel,
    tokens: Int[Tensor, "batch pos"],
    attention_mask: Int[Tensor, "batch pos"],
) -> list[Float[Tensor, "batch pos d_model"]]:
    """The L + 1 residual layers of one forward pass, detached, on the model's device."""
    return run_layers(model, tokens, attention_mask, range(model.cfg.n_layers + 1))


def run_last_residual(
    model: HookedModel,
    tokens: Int[Tensor, "batch pos"],
    attention_mask: Int[Tensor, "batch pos"],
) -> Float[Tensor, "batch pos d_model"]:
    """Layer L alone, before the final norm: no other layer is kept in memory."""
    return run_layers(model, tokens, attention_mask, [model.cfg.n_layers])[0]


def run_layers(
    model: HookedModel,
    tokens: Int[Tensor, "batch pos"],
    attention_mask: Int[Tensor, "batch pos"],
    layers: Sequence[int],
    resume: tuple[int, Tensor] | None = None,
) -> list[Float[Tensor, "batch pos d_model"]]:
    """Some residual layers of one forward pass, detached.

    Args:
        model: the model.
        tokens, attention_mask: what it reads.
        layers: which, from 0 to L.
        resume: (block, residual) begins the pass there; a `ResidualModel` can. No layer up to that
            block has a value then.
    """
    residuals: dict[int, Tensor] = {}

    def keep(residual: Tensor, hook: Any, layer: int) -> None:
        # Of a model that is spread over devices: to where it began.
        residuals[layer] = residual.detach().to(tokens.device)

    model.run_with_hooks(
        tokens,
        attention_mask=attention_mask,
        return_type=None,
        fwd_hooks=[(layer_hook(layer), partial(keep, layer=layer)) for layer in layers],
        **({} if resume is None else {"resume": resume}),
    )
    return [residuals[layer] for layer in layers]


def final_norm(model: HookedModel, x: Float[Tensor, "n d_model"]) -> Float[Tensor, "n d_model"]:
    """The model's own final norm, applied to residual vectors."""
    normed: Tensor = model.ln_final(x[:, None])[:, 0]
    return normed.to(x.device)


def unembed(model: HookedModel, x: Float[Tensor, "n d_model"]) -> Float[Tensor, "n d_vocab"]:
    """Logits of final-normed vectors; TransformerLens leaves the soft cap to the caller."""
    logits: Tensor = model.unembed(x[:, None])[:, 0].to(x.device)
    cap = getattr(model.cfg, "output_logits_soft_cap", None)
    return cap * torch.tanh(logits / cap) if cap is not None and cap > 0 else logits


def float_logits(
    model: HookedModel, normed: Float[Tensor, "n d_model"]
) -> Float[Tensor, "n d_vocab"]:
    """Float32 logits of final-normed vectors, on a device that has float64."""
    logits = unembed(model, normed).float()
    # Statistics are float64, which Apple's accelerator does not have.
    return logits.cpu() if logits.device.type == "mps" else logits


def residual_logits(
    model: HookedModel, last: Float[Tensor, "n d_model"]
) -> Float[Tensor, "n d_vocab"]:
    """Float32 logits of last-layer residual vectors, on a device that has float64."""
    with evaluating(model):
        return float_logits(model, final_norm(model, last))


def input_device(model: HookedModel) -> torch.device:
    """Where token ids must live."""
    return device_of(cast(Any, model))


def first_bad_layer(
    residuals: list[Float[Tensor, "batch pos d_model"]], real: Bool[Tensor, "batch pos"]
) -> int | None:
    """The first layer with a NaN or infinite activation at a real token, or None."""
    for layer, residual in enumerate(residuals):
        # All positions first: to pick the real ones takes longer than to look at every one.
        if not torch.isfinite(residual).all() and not torch.isfinite(residual[real]).all():
            return layer
    return None


def check_stream(
    name: str,
    stream: list[Float[Tensor, "batch pos d_model"]],
    real: Bool[Tensor, "batch pos"],
) -> None:
    """Raise if a model's residual stream overflowed.

    Args:
        name: of the model, "base" or "tuned".
        stream: all residual layers.
        real: False at pads.

    Raises:
        ActivationError: naming the first layer with NaN or infinity at a real token.
    """
    layer = first_bad_layer(stream, real)
    if layer is not None:
        raise _overflow(f"the {name} model", f" at layer {layer}")


def check_finite(whose: str, x: Float[Tensor, "*rows d_model"]) -> None:
    """Raise if vectors overflowed, those of a patched or mixed model too.

    Raises:
        ActivationError: if one holds NaN or infinity.
    """
    if not bool(torch.isfinite(x).all()):
        raise _overflow(whose)


def _overflow(whose: str, where: str = "") -> ActivationError:
    return ActivationError(
        f"{whose} has NaN or infinite activations{where}: load both models in a wider dtype, as in "
        "dtype='float32'"
    )
