"""Activations that are not the donor's but could pass for it: what any patch of that size does.

A patch moves a model's own activation to the donor's. Placebos move it to the donor's activation
of *another text*, as far in a *random direction* at every token, or by the donor's own change
*rotated*, one rotation for all tokens: the change keeps its size at every token and its shape over
them, and loses only its direction.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...statistics.moments import in_full_float32
from ..spectrum import random_basis

PLACEBOS = ("other_text", "noise", "rotation")


def random_rotation(d_model: int, seed: int) -> Float[Tensor, "d_model d_model"]:
    """A rotation or reflection drawn evenly from all there are (float32, Haar measure)."""
    return random_basis(d_model, seed).float()


def noise(
    own: Float[Tensor, "batch pos d_model"],
    donated: Float[Tensor, "batch pos d_model"],
    texts: Int[Tensor, " batch"],
    longest: int,
    seed: int,
) -> Float[Tensor, "batch pos d_model"]:
    """The model's own activation moved as far as the donor's lies away, in a random direction.

    A text's noise depends on the text's number and the seed, not on the batch it comes in; for
    that it is drawn for the `longest` text there is.
    """
    drawn = torch.stack(
        [
            torch.randn(longest, own.shape[-1], generator=_generator(seed, int(text)))
            for text in texts
        ]
    )[:, : own.shape[1]].to(own.device)
    size = (donated.float() - own.float()).norm(dim=-1, keepdim=True)
    moved: Tensor = own.float() + drawn * (size / drawn.norm(dim=-1, keepdim=True))
    return moved.to(own.dtype)


def _generator(seed: int, text: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed * 1_000_003 + text) % 2**63)


def rotated(
    own: Float[Tensor, "batch pos d_model"],
    donated: Float[Tensor, "batch pos d_model"],
    rotation: Float[Tensor, "d_model d_model"],
) -> Float[Tensor, "batch pos d_model"]:
    """The model's own activation plus the donor's change, turned."""
    change = donated.float() - own.float()
    with in_full_float32():
        turned = change @ rotation.to(own.device).T
    return (own.float() + turned).to(own.dtype)


def of_other_text(
    donated: Float[Tensor, "batch pos d_model"], length: Int[Tensor, " batch"]
) -> Float[Tensor, "batch pos d_model"]:
    """Another text's activations, its last token repeated where it is the shorter one.

    Args:
        donated: the donor's activations on the other texts, padded on the right.
        length: how many tokens each of those has.
    """
    place = torch.arange(donated.shape[1], device=donated.device)[None]
    index = torch.minimum(place, length[:, None].to(donated.device) - 1)
    return donated.gather(1, index[..., None].expand_as(donated))
