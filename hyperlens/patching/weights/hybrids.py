"""Models made of parts of two: which there are, and what each of them decides.

A hybrid differs from its host from its lowest moved block on: what enters that block is known
from the host's own pass, and only what comes after it is run again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from ...data.corpus import Corpus
from ...hooks.loading import LoadedModel
from ...hooks.surface import (
    HookedModel,
    evaluating,
    final_norm,
    input_device,
    run_last_residual,
    run_residuals,
)
from ...passes.streams import logit_rows
from ..directions import INTO_BASE, INTO_TUNED
from ..hooks.cells import check_resumes, resume
from ..logits import check_finite, check_stream, float_logits
from ..outcomes import Outcome, Tally, measure, reference
from ..pending import pieces
from .named import NAMED
from .parts import Part, Slots, changed_parts, matched, moved

HEAD: frozenset[Part] = frozenset({"final_norm", "unembedding"})

Parts = frozenset[Part]
Key = tuple[str, Parts]
"""Direction, and those of the moved parts that tuning changed: the same key, the same model."""


class Hybrid(NamedTuple):
    """One way to move parts.

    Attributes:
        direction: whose weights go into whom; the latter is the host.
        kind: "suffix" (the last blocks), "suffix_and_head" (with final norm and unembedding),
            "block" (one alone), the name of another part that moves alone, or "all".
        number: how many blocks a suffix has, or which block moves alone; -1 for the others.
        parts: what moves.
    """

    direction: str
    kind: str
    number: int
    parts: Parts


def hybrids(direction: str, n_blocks: int) -> Iterator[Hybrid]:
    """Every suffix without and with the head, every part alone, and everything."""
    for k in range(n_blocks + 1):
        last: Parts = frozenset(range(n_blocks - k, n_blocks))
        yield Hybrid(direction, "suffix", k, last)
        yield Hybrid(direction, "suffix_and_head", k, last | HEAD)
    for block in range(n_blocks):
        yield Hybrid(direction, "block", block, frozenset({block}))
    for name in NAMED:
        yield Hybrid(direction, name, -1, frozenset({name}))
    yield Hybrid(direction, "all", -1, frozenset({*range(n_blocks), *NAMED}))


@dataclass(frozen=True)
class Host:
    """A model that is given another one's parts.

    Attributes:
        loaded: the model, on modules that nobody else holds.
        slots: its tensors beside the donor's.
        changed: parts in which the two differ.
    """

    loaded: LoadedModel
    slots: Slots
    changed: Parts

    @property
    def model(self) -> HookedModel:
        """The model with its hooks."""
        return self.loaded.hooked


def hosts(base: LoadedModel, tuned: LoadedModel) -> dict[str, Host]:
    """Both directions of two plain models.

    Raises:
        PatchError: if their weights do not fit.
    """
    found = {}
    for direction, host, donor in ((INTO_BASE, base, tuned), (INTO_TUNED, tuned, base)):
        slots = matched(host.model, donor.model)
        found[direction] = Host(host, slots, changed_parts(slots))
    return found


def key_of(hybrid: Hybrid, sides: Mapping[str, Host]) -> Key:
    """What decides which model a hybrid is."""
    return hybrid.direction, hybrid.parts & sides[hybrid.direction].changed


@dataclass(frozen=True)
class Forced:
    """What hybrids decide about the next token of given texts, and the two models as they are."""

    hybrids: Mapping[Key, Outcome]
    models: Mapping[str, Outcome]


class _Body(NamedTuple):
    """What leaves the last block of a hybrid at the counted tokens, and the heads to put on it."""

    direction: str
    last: Float[Tensor, "n d_model"]
    keys: list[Key]


class _Batch(NamedTuple):
    tokens: Int[Tensor, "batch pos"]
    mask: Int[Tensor, "batch pos"]
    counted: Bool[Tensor, "batch pos"]
    number: Int[Tensor, " batch"]


Streams = Mapping[str, list[Float[Tensor, "batch pos d_model"]]]


def forced(
    sides: Mapping[str, Host],
    keys: Sequence[Key],
    corpus: Corpus,
    batch_size: int,
    progress: bool,
) -> Forced:
    """Every hybrid on every text, teacher-forced.

    Raises:
        ActivationError: if a model overflows.
        PatchError: if a model's blocks hand on more than the residual stream.
    """
    n = len(corpus.sequences)
    found: dict[Key, Tally] = {key: Tally(n) for key in keys}
    models = {"base": Tally(n), "tuned": Tally(n)}
    bodies: dict[tuple[str, Parts], list[Key]] = defaultdict(list)
    for direction, parts in found:
        bodies[direction, parts - HEAD].append((direction, parts))
    with tqdm(total=n, desc="transplanting", unit="text", disable=not progress) as bar:
        device = input_device(sides[INTO_BASE].model)
        for index, batch in enumerate(_batches(corpus, batch_size, device)):
            streams = {way: _stream(way, host, batch) for way, host in sides.items()}
            if index == 0:
                for way, host in sides.items():
                    check_resumes(host.model, batch.tokens, batch.mask, streams[way])
            made = _made(sides, bodies, streams, batch)
            waiting = pieces(made, lambda body: body.last.nbytes)
            # The models themselves are compared once, with the first hybrids.
            _compare(sides, streams, batch, next(waiting), found, models)
            for piece in waiting:
                _compare(sides, streams, batch, piece, found, {})
            bar.update(len(batch.tokens))
    return Forced(
        {key: tally.outcome() for key, tally in found.items()},
        {name: tally.outcome() for name, tally in models.items()},
    )


def _batches(corpus: Corpus, batch_size: int, device: torch.device) -> Iterator[_Batch]:
    first = 0
    for batch in corpus.batches(batch_size):
        number = torch.arange(first, first + len(batch.tokens))
        first += len(number)
        moved_there = (batch.tokens, batch.real.long(), batch.real & ~batch.bos, number)
        yield _Batch(*(x.to(device) for x in moved_there))


def _stream(direction: str, host: Host, batch: _Batch) -> list[Float[Tensor, "batch pos d_model"]]:
    with evaluating(host.model):
        stream = run_residuals(host.model, batch.tokens, batch.mask)
    check_stream("base" if direction == INTO_BASE else "tuned", stream, batch.mask.bool())
    return stream


def last_residual(
    host: Host,
    parts: Parts,
    tokens: Int[Tensor, "batch pos"],
    mask: Int[Tensor, "batch pos"],
    stream: Sequence[Float[Tensor, "batch pos d_model"]],
) -> Float[Tensor, "batch pos d_model"]:
    """What leaves the last block of the host with these parts of the donor.

    Args:
        host: the model.
        parts: what it has of the donor; final norm and unembedding make no difference here.
        tokens, mask: what it reads.
        stream: its own L + 1 residual layers on them.
    """
    blocks = [part for part in parts if isinstance(part, int)]
    with moved(host.slots, parts):
        if "embedding" in parts:
            with evaluating(host.model):
                return run_last_residual(host.model, tokens, mask)
        first = min(blocks, default=host.model.cfg.n_layers)
        return resume(host.model, tokens, mask, first, stream[first])


def _made(
    sides: Mapping[str, Host],
    bodies: Mapping[tuple[str, Parts], list[Key]],
    streams: Streams,
    batch: _Batch,
) -> Iterator[_Body]:
    """What leaves the last block of every hybrid, as far as they differ there."""
    for (direction, parts), keys in bodies.items():
        stream = streams[direction]
        last = last_residual(sides[direction], parts, batch.tokens, batch.mask, stream)
        last = last[batch.counted]
        check_finite(f"the mixed model ({direction}, parts {_listed(parts)})", last)
        yield _Body(direction, last, keys)


def _listed(parts: Parts) -> str:
    return ", ".join(sorted(map(str, parts))) or "none"


def _compare(
    sides: Mapping[str, Host],
    streams: Streams,
    batch: _Batch,
    piece: Sequence[_Body],
    found: Mapping[Key, Tally],
    models: Mapping[str, Tally],
) -> None:
    """Logits of some hybrids beside the two models', a few rows at a time."""
    text = batch.number[:, None].expand_as(batch.counted)[batch.counted]
    own = {way: streams[way][-1][batch.counted] for way in sides}
    none: Parts = frozenset()
    for rows in logit_rows(len(text), sides[INTO_BASE].model.cfg.d_vocab, text.device):
        logits = {way: logits_of(sides[way], none, own[way][rows]) for way in sides}
        known = reference(logits[INTO_BASE], logits[INTO_TUNED])
        for name, way in (("base", INTO_BASE), ("tuned", INTO_TUNED)):
            if name in models:
                models[name].add(measure(logits[way], known), known.changed, text[rows])
        for body in piece:
            for key in body.keys:
                made = logits_of(sides[body.direction], key[1], body.last[rows])
                found[key].add(measure(made, known), known.changed, text[rows])


def logits_of(
    host: Host, parts: Parts, last: Float[Tensor, "n d_model"]
) -> Float[Tensor, "n d_vocab"]:
    """What the host, with these parts of the donor, makes of what leaves its last block."""
    with moved(host.slots, parts & HEAD), evaluating(host.model):
        return float_logits(host.model, final_norm(host.model, last))
