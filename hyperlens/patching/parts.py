"""Models mixed of two: parts of one model's weights in another, and what such models decide.

    with transplanted(base, tuned, ["last 3", "final_norm"]):
        tokens = continuations(base, tokenizer, prompts, max_new_tokens=64)

Nothing is copied: inside, the target's modules hold the source's own tensors, and their own again
afterwards. A tensor that is tied to a moved one stays where it is.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..checks import check_types
from ..data.corpus import Corpus
from ..errors import PatchError
from ..hooks.loading import LoadedModel
from ..hooks.partial_forward import check_resumes, resume
from ..hooks.surface import (
    HookedModel,
    check_finite,
    check_stream,
    evaluating,
    input_device,
    residual_logits,
    run_last_residual,
    run_residuals,
)
from ..models.kinds import is_peft
from ..models.structure import find_structure
from .engine import Batch, BatchOutputs, Outcomes, PatchedOutput, batches, compare_patched
from .outcomes import DIRECTIONS, INTO_BASE, SOURCE, TARGET, Side

NAMED = ("embedding", "final_norm", "unembedding")
"""The parts that are no blocks; "embedding" is all that is in no other part, positions included."""

Part: TypeAlias = int | str
"""A block (0-based), or one of `NAMED`."""

LAST = re.compile(r"last (\d+)")


class Slot(NamedTuple):
    """A place where a module of the target, and the same module of the source, keep a tensor.

    Attributes:
        name: of the tensor, as in `named_parameters`.
        target, source: the dicts in which the two modules keep their tensors.
        key: the tensor's name in there.
    """

    name: str
    target: dict[str, Any]
    source: dict[str, Any]
    key: str


Slots = Mapping[Part, Sequence[Slot]]


@check_types
@contextmanager
def transplanted(
    target: nn.Module, source: nn.Module, parts: Iterable[Part] | Part
) -> Iterator[None]:
    """Inside, the target has these parts of the source; its own tensors are back afterwards.

    Args:
        target, source: each a `PreTrainedModel`, of one architecture, dtype and device. Nothing
            of the source changes.
        parts: blocks (0-based numbers, or "last 3"), "final_norm", "unembedding", "embedding",
            and "all" for everything. A tied unembedding is a part of its own: it stays when the
            embedding moves, and the other way round.

    Raises:
        PatchError: if there is no such part, a model is a `PeftModel`, or the two do not fit.
        LoadingError: if a model's parts cannot be found.
    """
    slots = matched(target, source)
    with moved(slots, chosen_parts(parts, len(slots) - len(NAMED))):
        yield


@contextmanager
def moved(slots: Slots, parts: frozenset[Part]) -> Iterator[None]:
    """`transplanted` for slots that are matched already."""
    chosen = [slot for part in parts for slot in slots[part]]
    before = [slot.target[slot.key] for slot in chosen]
    try:
        for slot in chosen:
            slot.target[slot.key] = slot.source[slot.key]
        yield
    finally:
        for slot, tensor in zip(chosen, before, strict=True):
            slot.target[slot.key] = tensor


def chosen_parts(parts: Iterable[Part] | Part, n_blocks: int) -> frozenset[Part]:
    """Parts as people write them, each named on its own.

    Raises:
        PatchError: naming the parts there are.

    >>> sorted(chosen_parts(["last 2", 0], n_blocks=4))
    [0, 2, 3]
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


def matched(target: Any, source: Any) -> dict[Part, list[Slot]]:
    """Every tensor of the target next to the source's, by part: the blocks in order, then `NAMED`.

    Raises:
        PatchError: if a model is of the wrong kind, or the two do not fit.
        LoadingError: if a model's parts cannot be found.
    """
    own, other = _parts("target", target), _parts("source", source)
    if len(own) != len(other):
        depths = [len(found) - len(NAMED) for found in (own, other)]
        raise PatchError(
            f"the target has {depths[0]} blocks and the source {depths[1]}: weights move between "
            "models of one architecture and size"
        )
    return {part: list(_slots(own[part], other[part])) for part in own}


def changed_parts(slots: Slots) -> frozenset[Part]:
    """Parts in which any tensor differs between the two."""
    return frozenset(part for part, found in slots.items() if any(map(_differs, found)))


def _differs(slot: Slot) -> bool:
    own, other = slot.target[slot.key], slot.source[slot.key]
    return own is not other and not torch.equal(own, other)


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


def _slots(own: Mapping[str, nn.Module], other: Mapping[str, nn.Module]) -> Iterator[Slot]:
    for name in sorted({*own, *other}):
        for kind in ("_parameters", "_buffers"):
            target, source = (getattr(side.get(name), kind, {}) for side in (own, other))
            for key in sorted({*target, *source}):
                slot = Slot(f"{name}.{key}", target, source, key)
                if _fits(slot):
                    yield slot


def _fits(slot: Slot) -> bool:
    """False where neither has a tensor, as for a bias that is left out."""
    own, other = slot.target.get(slot.key), slot.source.get(slot.key)
    if own is None and other is None:
        return False
    if own is None or other is None:
        which = "target" if own is None else "source"
        raise PatchError(
            f"the {which} has no {slot.name}: weights move between models of one architecture"
        )
    for what, here, there in (
        ("shape", tuple(own.shape), tuple(other.shape)),
        ("dtype", own.dtype, other.dtype),
        ("device", own.device, other.device),
    ):
        if here != there:
            raise PatchError(
                f"{slot.name} has {what} {here} in the target and {there} in the source: load both "
                "models alike"
            )
    return True


# Mixed models and their decisions


HEAD: frozenset[Part] = frozenset({"final_norm", "unembedding"})

Parts = frozenset[Part]
Key = tuple[str, Parts]
"""Direction, and those of the moved parts that tuning changed: the same key, the same model."""


class MixedModel(NamedTuple):
    """A target model with some parts of the source model.

    Attributes:
        direction: whose weights go into whom.
        kind: "suffix" (the last blocks), "suffix_and_head" (with final norm and unembedding),
            "block" (one alone), the name of another part that moves alone, or "all".
        number: how many blocks a suffix has, or which block moves alone; -1 for the others.
        parts: what moves.
    """

    direction: str
    kind: str
    number: int
    parts: Parts


def mixed_models(direction: str, n_blocks: int) -> Iterator[MixedModel]:
    """Every suffix without and with the head, every part alone, and everything."""
    for k in range(n_blocks + 1):
        last: Parts = frozenset(range(n_blocks - k, n_blocks))
        yield MixedModel(direction, "suffix", k, last)
        yield MixedModel(direction, "suffix_and_head", k, last | HEAD)
    for block in range(n_blocks):
        yield MixedModel(direction, "block", block, frozenset({block}))
    for name in NAMED:
        yield MixedModel(direction, name, -1, frozenset({name}))
    yield MixedModel(direction, "all", -1, frozenset({*range(n_blocks), *NAMED}))


@dataclass(frozen=True)
class Target:
    """A model that is given parts of a source model.

    Attributes:
        loaded: the model, on modules that nobody else holds.
        slots: its tensors next to the source's.
        changed: parts in which the two differ.
    """

    loaded: LoadedModel
    slots: Slots
    changed: Parts

    @property
    def model(self) -> HookedModel:
        """The model with its hooks."""
        return self.loaded.hooked


def targets(base: LoadedModel, tuned: LoadedModel) -> dict[str, Target]:
    """The target of each direction, of two plain models.

    Raises:
        PatchError: if their weights do not fit.
    """
    models = {"base": base, "tuned": tuned}
    found = {}
    for direction in DIRECTIONS:
        loaded = models[TARGET[direction]]
        slots = matched(loaded.model, models[SOURCE[direction]].model)
        found[direction] = Target(loaded, slots, changed_parts(slots))
    return found


def key_of(mixed: MixedModel, of: Mapping[str, Target]) -> Key:
    """What mixed models with equal weights have in common."""
    return mixed.direction, mixed.parts & of[mixed.direction].changed


def read_mixed(
    of: Mapping[str, Target],
    keys: Sequence[Key],
    corpus: Corpus,
    batch_size: int,
    progress: bool,
) -> Outcomes[Key]:
    """Decisions of every mixed model on every text, teacher-forced.

    Raises:
        ActivationError: if a model overflows.
        PatchError: if a model's blocks pass on more than the residual stream.
    """
    models: dict[Side, HookedModel] = {
        TARGET[direction]: of[direction].model for direction in DIRECTIONS
    }
    outputs = _outputs(of, keys, corpus, batch_size)
    return compare_patched(outputs, models, corpus, progress)


def _outputs(
    of: Mapping[str, Target], keys: Sequence[Key], corpus: Corpus, batch_size: int
) -> Iterator[BatchOutputs[Key]]:
    # Models that differ only in final norm and unembedding share everything before.
    bodies: dict[Key, list[Key]] = defaultdict(list)
    for direction, parts in keys:
        bodies[direction, parts - HEAD].append((direction, parts))
    device = input_device(of[INTO_BASE].model)
    for index, batch in enumerate(batches(corpus, batch_size, device)):
        streams = {direction: _stream(TARGET[direction], of[direction], batch) for direction in of}
        if index == 0:
            for direction, target in of.items():
                check_resumes(target.model, batch.tokens, batch.mask, streams[direction])
        last = {TARGET[key]: stream[-1][batch.counted] for key, stream in streams.items()}
        yield BatchOutputs(batch, last, _mixed_outputs(of, bodies, streams, batch))


def _stream(side: Side, target: Target, batch: Batch) -> list[Float[Tensor, "batch pos d_model"]]:
    with evaluating(target.model):
        stream = run_residuals(target.model, batch.tokens, batch.mask)
    check_stream(side, stream, batch.mask.bool())
    return stream


def _mixed_outputs(
    of: Mapping[str, Target],
    bodies: Mapping[Key, list[Key]],
    streams: Mapping[str, list[Float[Tensor, "batch pos d_model"]]],
    batch: Batch,
) -> Iterator[PatchedOutput[Key]]:
    """The last block's output of every mixed model, as far as they differ there."""
    for (direction, parts), keys in bodies.items():
        target = of[direction]
        stream = streams[direction]
        last = last_residual(target, parts, batch.tokens, batch.mask, stream)[batch.counted]
        check_finite(f"the mixed model ({direction}, parts {_listed(parts)})", last)
        yield PatchedOutput(last, {key: partial(logits_of, target, key[1]) for key in keys})


def last_residual(
    target: Target,
    parts: Parts,
    tokens: Int[Tensor, "batch pos"],
    mask: Int[Tensor, "batch pos"],
    stream: Sequence[Float[Tensor, "batch pos d_model"]],
) -> Float[Tensor, "batch pos d_model"]:
    """The last block's output of a target model with these parts of the source model.

    A mixed model differs from its target from its lowest moved block on: what enters that block is
    known from the target's own pass, and only the blocks after it are run again.

    Args:
        target: the target model.
        parts: what it has of the source; final norm and unembedding make no difference here.
        tokens, mask: what it reads.
        stream: its own L + 1 residual layers on them.
    """
    blocks = [part for part in parts if isinstance(part, int)]
    with moved(target.slots, parts):
        if "embedding" in parts:
            with evaluating(target.model):
                return run_last_residual(target.model, tokens, mask)
        first = min(blocks, default=target.model.cfg.n_layers)
        return resume(target.model, tokens, mask, first, stream[first])


def logits_of(
    target: Target, parts: Parts, last: Float[Tensor, "n d_model"]
) -> Float[Tensor, "n d_vocab"]:
    """Logits of a target model, with these parts of the source, from its last block's output."""
    with moved(target.slots, parts & HEAD):
        return residual_logits(target.model, last)


def _listed(parts: Parts) -> str:
    return ", ".join(sorted(map(str, parts))) or "none"
