"""Whole parts of one model's weights in another model, while a context lasts.

    with transplanted(base, tuned, ["last 3", "final_norm"]):
        tokens = continuations(base, tokenizer, prompts, max_new_tokens=64)

Nothing is copied: the modules of the host hold the donor's own tensors inside, and their own
again afterwards. What is tied to a moved weight stays where it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import nn

from ...errors import PatchError
from ...models.kinds import is_peft
from ...models.structure import find_structure
from .named import NAMED

Part: TypeAlias = int | str
"""A block (0-based), or one of `NAMED`."""

LAST = re.compile(r"last (\d+)")


class Slot(NamedTuple):
    """A place where a module of the host, and its twin in the donor, keep a tensor.

    Attributes:
        name: of the tensor, as in `named_parameters`.
        host, donor: what the two modules keep their tensors in.
        key: the tensor's name in there.
    """

    name: str
    host: dict[str, Any]
    donor: dict[str, Any]
    key: str


Slots = Mapping[Part, Sequence[Slot]]


@contextmanager
def transplanted(host: Any, donor: Any, parts: Iterable[Part] | Part) -> Iterator[None]:
    """Inside, the host has these parts of the donor; afterwards its own again, the same objects.

    Args:
        host, donor: each a `PreTrainedModel`, of one architecture, dtype and device. The donor is
            left alone.
        parts: blocks (0-based numbers, or "last 3"), "final_norm", "unembedding", "embedding",
            and "all" for everything. A tied unembedding is a part of its own: it stays when the
            embedding moves, and the other way round.

    Raises:
        PatchError: if there is no such part, a model is a `PeftModel`, or the two do not fit.
        LoadingError: if a model's parts cannot be found.
    """
    slots = matched(host, donor)
    with moved(slots, chosen_parts(parts, len(slots) - len(NAMED))):
        yield


@contextmanager
def moved(slots: Slots, parts: frozenset[Part]) -> Iterator[None]:
    """The same with the slots at hand."""
    chosen = [slot for part in parts for slot in slots[part]]
    before = [slot.host[slot.key] for slot in chosen]
    try:
        for slot in chosen:
            slot.host[slot.key] = slot.donor[slot.key]
        yield
    finally:
        for slot, own in zip(chosen, before, strict=True):
            slot.host[slot.key] = own


def chosen_parts(parts: Iterable[Part] | Part, n_blocks: int) -> frozenset[Part]:
    """Parts as they may be written, each for itself.

    Raises:
        PatchError: naming the parts there are.
    """
    found: set[Part] = set()
    for part in [parts] if isinstance(parts, int | str) else parts:
        last = LAST.fullmatch(part) if isinstance(part, str) else None
        is_block = isinstance(part, int) and not isinstance(part, bool)
        if part in NAMED or (is_block and part in range(n_blocks)):
            found.add(part)
        elif part == "all":
            found |= {*range(n_blocks), *NAMED}
        elif last is not None and int(last[1]) <= n_blocks:
            found |= {*range(n_blocks - int(last[1]), n_blocks)}
        else:
            raise PatchError(
                f"there is no part {part!r}: give blocks from 0 to {n_blocks - 1}, 'last k' with "
                f"k up to {n_blocks}, 'final_norm', 'unembedding', 'embedding' or 'all'"
            )
    return frozenset(found)


def matched(host: Any, donor: Any) -> dict[Part, list[Slot]]:
    """Every tensor of the host beside the donor's, by part: the blocks in order, then `NAMED`.

    Raises:
        PatchError: if a model is of the wrong kind, or the two do not fit.
        LoadingError: if a model's parts cannot be found.
    """
    ours, theirs = _parts("host", host), _parts("donor", donor)
    if len(ours) != len(theirs):
        depths = [len(found) - len(NAMED) for found in (ours, theirs)]
        raise PatchError(
            f"the host has {depths[0]} blocks and the donor {depths[1]}: weights move between "
            "models of one architecture and size"
        )
    return {part: list(_slots(ours[part], theirs[part])) for part in ours}


def changed_parts(slots: Slots) -> frozenset[Part]:
    """Parts in which any tensor differs between the two."""
    return frozenset(part for part, found in slots.items() if any(map(_differs, found)))


def _differs(slot: Slot) -> bool:
    ours, theirs = slot.host[slot.key], slot.donor[slot.key]
    return ours is not theirs and not torch.equal(ours, theirs)


def _parts(role: str, model: Any) -> dict[Part, dict[str, nn.Module]]:
    """The modules of every part that keep tensors, by name."""
    if is_peft(model):
        raise PatchError(
            f"the {role} is a PeftModel, whose adapter is no part of a block: merge it first "
            "(model.merge_and_unload())"
        )
    if not hasattr(model, "get_output_embeddings"):
        raise PatchError(
            f"the {role} is a {type(model).__name__}: weights move between transformers' "
            "PreTrainedModels"
        )
    structure = find_structure(model)
    part_of: dict[int, Part] = {}
    tops: dict[Part, nn.Module] = dict(enumerate(structure.blocks))
    tops |= {"final_norm": structure.final_norm, "unembedding": structure.head}
    for part, top in tops.items():
        part_of |= {id(module): part for module in top.modules()}
    found: dict[Part, dict[str, nn.Module]] = {
        part: {} for part in (*range(len(structure.blocks)), *NAMED)
    }
    for name, module in model.named_modules():
        found[part_of.get(id(module), "embedding")][name] = module
    return found


def _slots(ours: Mapping[str, nn.Module], theirs: Mapping[str, nn.Module]) -> Iterator[Slot]:
    for name in sorted({*ours, *theirs}):
        for kind in ("_parameters", "_buffers"):
            host, donor = (getattr(side.get(name), kind, {}) for side in (ours, theirs))
            for key in sorted({*host, *donor}):
                slot = Slot(f"{name}.{key}", host, donor, key)
                if _fits(slot):
                    yield slot


def _fits(slot: Slot) -> bool:
    """False where neither has a tensor, as for a bias that is left out."""
    ours, theirs = slot.host.get(slot.key), slot.donor.get(slot.key)
    if ours is None and theirs is None:
        return False
    if ours is None or theirs is None:
        which = "host" if ours is None else "donor"
        raise PatchError(
            f"the {which} has no {slot.name}: weights move between models of one architecture"
        )
    for what, one, other in (
        ("shape", tuple(ours.shape), tuple(theirs.shape)),
        ("dtype", ours.dtype, theirs.dtype),
        ("device", ours.device, theirs.device),
    ):
        if one != other:
            raise PatchError(
                f"{slot.name} has {what} {one} in the host and {other} in the donor: load both "
                "models alike"
            )
    return True
