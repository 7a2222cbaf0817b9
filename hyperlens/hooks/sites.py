"""Sites and positions: where in a model, and at which tokens, an activation is read or replaced."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias, cast, get_args
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from ..checks import check_field_types, check_types
from ..errors import PatchError
from ..models.structure import ROUNDINGS, misfit
from .surface import HookedModel, Kind, evaluating, input_device, run_logits, site_hook

# Farther than any text is long, and a number that torch can compare with.
FARTHEST = 2**40
KINDS: tuple[Kind, ...] = get_args(Kind)
BRANCHES: tuple[Kind, Kind] = ("attn_out", "mlp_out")
_ADD_UP: WeakKeyDictionary[Any, frozenset[int]] = WeakKeyDictionary()

Positions: TypeAlias = slice | Sequence[int] | int | None
"""None for all tokens; `slice(5, None)` from the sixth on; `[0, 3]` or 3 for chosen ones.

Tokens are counted from 0 in each sequence, pads left out; negative numbers count from its end.
"""


@dataclass(frozen=True, order=True)
class Site:
    """A place in a hooked model.

    Attributes:
        kind: "resid_pre" or "resid_post" (the stream entering or leaving a block), "attn_out" or
            "mlp_out" (what a block's branch adds to it), or "final_norm" (the output of the final
            norm).
        block: 0-based; None for "final_norm".

    >>> Site("resid_post", 9).layer
    10
    >>> print(Site("mlp_out", 3))
    mlp_out of block 3
    """

    kind: Kind
    block: int | None = None

    def __post_init__(self) -> None:
        check_field_types(self)
        check_kind(self.kind)
        if (self.block is None) != (self.kind == "final_norm"):
            raise PatchError(
                f"{self.kind} needs the number of a block, and final_norm has none; got "
                f"block={self.block}"
            )

    @property
    def layer(self) -> int:
        """The residual layer that the site is, or that it feeds (0 for the embedding output).

        -1 for the final norm, which comes after the last layer.
        """
        if self.block is None:
            return -1
        return self.block if self.kind == "resid_pre" else self.block + 1

    def __str__(self) -> str:
        return self.kind if self.block is None else f"{self.kind} of block {self.block}"


def check_kind(kind: str) -> None:
    """Raise unless `kind` is a kind of site.

    Raises:
        PatchError: naming the kinds there are.
    """
    if kind not in KINDS:
        raise PatchError(f"a site is one of {', '.join(KINDS)}; got {kind!r}")


def check_block(block: int | None, n_blocks: int) -> None:
    """Raise unless a model of `n_blocks` blocks has this one.

    Raises:
        PatchError: naming the blocks there are.
    """
    if block is not None and not 0 <= block < n_blocks:
        raise PatchError(f"there is no block {block}: this model has blocks 0 to {n_blocks - 1}")


@check_types
def in_blocks(kind: str, blocks: Iterable[int]) -> list[Site]:
    """The same kind of site in several blocks.

    Raises:
        PatchError: if blocks have no such kind of site.

    >>> [site.block for site in in_blocks("attn_out", range(2))]
    [0, 1]
    """
    check_kind(kind)
    return [Site(cast(Kind, kind), block) for block in blocks]


def hook_name(model: HookedModel, site: Site) -> str:
    """The name of a site's hook point in this model.

    Raises:
        PatchError: if the model has no such block, or its class no hook point there; of a branch,
            if the block adds something to the stream besides its two branches.
    """
    check_block(site.block, model.cfg.n_layers)
    name = site_hook(site.kind, site.block)
    if name not in model.hook_dict:
        raise PatchError(
            f"{type(model).__name__} has no hook for {site} ({name}): choose resid_pre or "
            "resid_post, or, for hooks of your own, another backend of load_hooked"
        )
    if site.block is not None and site.kind in BRANCHES and not branches_add_up(model, site.block):
        raise PatchError(
            f"{site} is not one of two parts that {model.cfg.model_name}'s block adds to the "
            "stream (resid_pre + attn_out + mlp_out is not resid_post): choose resid_pre or "
            "resid_post"
        )
    return name


def branches_add_up(model: HookedModel, block: int) -> bool:
    """Whether a block's resid_pre + attn_out + mlp_out is its resid_post; found out once."""
    if model not in _ADD_UP:
        _ADD_UP[model] = _blocks_that_add_up(model)
    return block in _ADD_UP[model]


def _blocks_that_add_up(model: HookedModel) -> frozenset[int]:
    """All such blocks, from one run of four tokens."""
    kept: dict[str, Tensor] = {}

    def keep(activation: Tensor, hook: Any, name: str) -> None:
        kept[name] = activation.detach()

    kinds: tuple[Kind, ...] = ("resid_pre", *BRANCHES, "resid_post")
    names = [[site_hook(kind, block) for kind in kinds] for block in range(model.cfg.n_layers)]
    hooks: list[tuple[str, Callable[..., Any]]] = [
        (name, partial(keep, name=name))
        for of_block in names
        for name in of_block
        if name in model.hook_dict
    ]
    tokens = torch.arange(4, device=input_device(model))[None] % model.cfg.d_vocab
    with evaluating(model):
        run_logits(model, tokens, torch.ones_like(tokens), fwd_hooks=hooks)
    return frozenset(
        block
        for block, of_block in enumerate(names)
        if kept.keys() >= set(of_block) and misfit(*(kept[name] for name in of_block)) <= ROUNDINGS
    )


def positions_mask(
    positions: Positions, attention_mask: Int[Tensor, "batch pos"]
) -> Bool[Tensor, "batch pos"]:
    """True where a patch applies; never at a pad.

    Raises:
        PatchError: if the positions are of another kind, or exist in no sequence.

    >>> positions_mask(slice(1, None), torch.tensor([[1, 1, 1, 0]])).tolist()
    [[False, True, True, False]]
    """
    chosen = mask_of_existing(positions, attention_mask)
    if not bool(chosen.any()):
        longest = int(attention_mask.sum(-1).max())
        raise PatchError(
            f"positions {positions} are in none of the sequences, the longest of which has "
            f"{longest} tokens: choose from 0 to {longest - 1}, or count from the end with "
            "negative numbers"
        )
    return chosen


def mask_of_existing(
    positions: Positions, attention_mask: Int[Tensor, "batch pos"]
) -> Bool[Tensor, "batch pos"]:
    """`positions_mask` for texts that are still being generated: no position needs to exist yet.

    Raises:
        PatchError: if the positions are of another kind.
    """
    real = attention_mask.bool()
    if positions is None:
        return real
    place = real.long().cumsum(-1) - 1
    length = real.sum(-1, keepdim=True)
    if isinstance(positions, slice):
        return _in_slice(positions, place, length) & real
    chosen = torch.zeros_like(real)
    for position in _listed(positions):
        chosen |= place == (position if position >= 0 else length + position)
    return chosen & real


def counts_from_the_end(positions: Positions) -> bool:
    """Whether the length of a text decides which of its tokens are meant.

    >>> counts_from_the_end([0, -1]), counts_from_the_end(slice(5, None))
    (True, False)
    """
    if positions is None:
        return False
    if isinstance(positions, slice):
        return any((end or 0) < 0 for end in _ends(positions))
    return any(position < 0 for position in _listed(positions))


def _in_slice(
    wanted: slice, place: Int[Tensor, "batch pos"], length: Int[Tensor, "batch 1"]
) -> Bool[Tensor, "batch pos"]:
    def end(value: int | None, default: Int[Tensor, "batch 1"]) -> Int[Tensor, "batch 1"]:
        if value is None:
            return default
        return length + value if value < 0 else torch.full_like(length, value)

    first, last = _ends(wanted)
    start, stop = end(first, torch.zeros_like(length)), end(last, length)
    return (place >= start) & (place < stop)


def _ends(wanted: slice) -> tuple[int | None, int | None]:
    if wanted.step not in (None, 1):
        raise PatchError(f"expected a slice without a step, got {wanted}: list the positions")
    start, stop = (None if end is None else _listed(end)[0] for end in (wanted.start, wanted.stop))
    return start, stop


def _listed(positions: Sequence[int] | int) -> list[int]:
    listed = [positions] if isinstance(positions, int) else positions
    if not isinstance(listed, list | tuple | range) or not all(
        isinstance(position, int) and not isinstance(position, bool) for position in listed
    ):
        raise PatchError(
            f"expected positions as None, a whole number, a list of them or a slice, got "
            f"{positions!r}"
        )
    return [max(-FARTHEST, min(position, FARTHEST)) for position in listed]
