"""From states to logits, and what is refused on the way."""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor

from ..errors import ActivationError
from ..hooked import HookedModel, first_bad_layer, unembed


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
        raise ActivationError(
            f"the {name} model has NaN or infinite activations at layer {layer}: load it in a "
            "wider dtype, as in dtype='float32'"
        )
