"""Which tokens a patch touches: all, chosen ones, or all from one on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from ...errors import PatchError

Positions: TypeAlias = slice | Sequence[int] | int | None
"""None for all tokens; `slice(5, None)` from the sixth on; `[0, 3]` or 3 for chosen ones.

Tokens are counted from 0 in each sequence, pads left out; negative numbers count from its end.
"""


def positions_mask(
    positions: Positions, attention_mask: Int[Tensor, "batch pos"]
) -> Bool[Tensor, "batch pos"]:
    """True where a patch applies; never at a pad.

    Raises:
        PatchError: if the positions are of another kind, or exist in no sequence.
    """
    chosen = chosen_so_far(positions, attention_mask)
    if not bool(chosen.any()):
        longest = int(attention_mask.sum(-1).max())
        raise PatchError(
            f"positions {positions} are in none of the sequences, the longest of which has "
            f"{longest} tokens: choose from 0 to {longest - 1}, or count from the end with "
            "negative numbers"
        )
    return chosen


def chosen_so_far(
    positions: Positions, attention_mask: Int[Tensor, "batch pos"]
) -> Bool[Tensor, "batch pos"]:
    """The same for texts that are still being written: the positions need not exist yet."""
    real = attention_mask.bool()
    if positions is None:
        return real
    place = real.long().cumsum(-1) - 1
    length = real.sum(-1, keepdim=True)
    if isinstance(positions, slice):
        return _inside(positions, place, length) & real
    chosen = torch.zeros_like(real)
    for one in _listed(positions):
        chosen |= place == (one if one >= 0 else length + one)
    return chosen & real


def counts_from_the_end(positions: Positions) -> bool:
    """Whether a text must be whole before it is known which tokens are meant."""
    if positions is None:
        return False
    if isinstance(positions, slice):
        return (positions.start or 0) < 0 or (positions.stop or 0) < 0
    return any(one < 0 for one in _listed(positions))


def _inside(
    wanted: slice, place: Int[Tensor, "batch pos"], length: Int[Tensor, "batch 1"]
) -> Bool[Tensor, "batch pos"]:
    if wanted.step not in (None, 1):
        raise PatchError(f"expected a slice without a step, got {wanted}: list the positions")

    def end(value: int | None, default: Int[Tensor, "batch 1"]) -> Int[Tensor, "batch 1"]:
        if value is None:
            return default
        return length + value if value < 0 else torch.full_like(length, value)

    start, stop = end(wanted.start, torch.zeros_like(length)), end(wanted.stop, length)
    return (place >= start) & (place < stop)


def _listed(positions: Sequence[int] | int) -> list[int]:
    listed = [positions] if isinstance(positions, int) else positions
    if not isinstance(listed, list | tuple | range) or not all(
        isinstance(one, int) and not isinstance(one, bool) for one in listed
    ):
        raise PatchError(
            f"expected positions as None, a whole number, a list of them or a slice, got "
            f"{positions!r}"
        )
    return list(listed)
