"""From states to logits, and what is refused on the way."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..errors import ActivationError
from ..hooks.surface import HookedModel, first_bad_layer, unembed


def float_logits(model: HookedModel, normed: Float[Tensor, "n d_model"]) -> Float[Tensor, "n v"]:
    """Logits of final-normed vectors, where statistics can be taken of them."""
    logits = unembed(model, normed).float()
    # Statistics are float64, which Apple's accelerator does not have.
    return logits.cpu() if logits.device.type == "mps" else logits


def check_stream(
    name: str,
    stream: list[Float[Tensor, "batch pos d_model"]],
    real: Bool[Tensor, "batch pos"],
) -> None:
    """Refuse a model that overflows.

    Raises:
        ActivationError: if its residual stream holds NaN or infinity at a real token.
    """
    layer = first_bad_layer(stream, real)
    if layer is not None:
        raise _overflow(f"the {name} model", f" at layer {layer}")


def check_finite(whose: str, x: Float[Tensor, "*rows d_model"]) -> None:
    """Refuse vectors that overflowed, of a model that mixing or patching has made, too.

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
