"""Controls of a patch: activations as far from the target's as the source's, but of no meaning.

A patch moves the target model's activation to the source's. Its controls move it to the source's
activation on *another text*, equally far in a *random direction* at every token, or by the
source's own change *rotated*, one rotation for all tokens: a rotated change keeps its size at every
token and its pattern over tokens, and loses only its direction. A patch that does no more than its
controls shows what any change of that size does.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..statistics.moments import in_full_float32
from ..statistics.spectrum import random_basis

OTHER_TEXT, RANDOM_DIRECTION, ROTATED = "other_text", "random_direction", "rotated"
CONTROLS = (OTHER_TEXT, RANDOM_DIRECTION, ROTATED)

# Names of version 0.1, for its folders.
RENAMED = {"noise": RANDOM_DIRECTION, "rotation": ROTATED}


def random_rotation(d_model: int, seed: int) -> Float[Tensor, "d_model d_model"]:
    """A random rotation or reflection (float32, Haar measure)."""
    return random_basis(d_model, seed).float()


def random_direction(
    own: Float[Tensor, "batch pos d_model"],
    source: Float[Tensor, "batch pos d_model"],
    texts: Int[Tensor, " batch"],
    longest: int,
    seed: int,
) -> Float[Tensor, "batch pos d_model"]:
    """The target's activation moved by the distance to the source's, in a random direction.

    The direction depends on the text's number and the seed, not on the batch it comes in: it is
    drawn for `longest` tokens and cut.

    Args:
        own, source: activations of the target and the source model.
        texts: the number of each text in the corpus.
        longest: tokens of the longest text there is.
        seed: of the directions.
    """
    directions = torch.stack(
        [
            torch.randn(longest, own.shape[-1], generator=_generator(seed, int(text)))
            for text in texts
        ]
    )[:, : own.shape[1]].to(own.device)
    size = (source.float() - own.float()).norm(dim=-1, keepdim=True)
    moved: Tensor = own.float() + directions * (size / directions.norm(dim=-1, keepdim=True))
    return moved.to(own.dtype)


def _generator(seed: int, text: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed * 1_000_003 + text) % 2**63)


def rotated(
    own: Float[Tensor, "batch pos d_model"],
    source: Float[Tensor, "batch pos d_model"],
    rotation: Float[Tensor, "d_model d_model"],
) -> Float[Tensor, "batch pos d_model"]:
    """The target's activation plus the rotated change from it to the source's."""
    change = source.float() - own.float()
    with in_full_float32():
        turned = change @ rotation.to(own.device).T
    return (own.float() + turned).to(own.dtype)


def of_other_text(
    source: Float[Tensor, "batch pos d_model"], length: Int[Tensor, " batch"]
) -> Float[Tensor, "batch pos d_model"]:
    """Another text's activations, its last token repeated where it is the shorter one.

    Args:
        source: the source model's activations on the other texts, padded on the right.
        length: how many tokens each of those has.
    """
    place = torch.arange(source.shape[1], device=source.device)[None]
    index = torch.minimum(place, length[:, None].to(source.device) - 1)
    return source.gather(1, index[..., None].expand_as(source))
