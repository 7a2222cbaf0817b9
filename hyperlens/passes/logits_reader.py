"""One logits reader for all probes that need logits.

The unembedding is the most expensive matrix product of a comparison, and the logits are too many to
keep: each chunk of them is computed once, shown to every probe, and dropped.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from ..statistics import distances
from .failures import run_probe_step
from .streams import StreamPair


@dataclass(frozen=True)
class LogitChunk:
    """Both lenses' logits for a few `decisions` tokens at one layer.

    Attributes:
        layer: 0..L; at L these are the models' own logits.
        base, tuned: one row per token, float32.
        final: the tuned model's top-1 token at the output, for each row.
        same: whether both are known to be the same, bit for bit.
    """

    layer: int
    base: Float[Tensor, "chunk d_vocab"]
    tuned: Float[Tensor, "chunk d_vocab"]
    final: Int[Tensor, " chunk"]
    same: bool = False

    def copied(self) -> LogitChunk:
        """A copy, for a reader that overwrites the logits while others still need them."""
        return replace(self, base=self.base.clone(), tuned=self.tuned.clone())


@runtime_checkable
class ReadsLogits(Protocol):
    """A probe that reads logits together with others.

    `overwrites` says whether `read` changes the logits it is given. A reader with a true attribute
    `samples` is shown the tokens of `StreamPair.lens` alone, below the output.
    """

    overwrites: bool

    def logit_layers(self) -> Sequence[int]:
        """Layers whose logits it reads."""

    def read(self, chunk: LogitChunk) -> Mapping[str, Shaped[Tensor, " chunk"]]:
        """Compute named numbers, one per token of the chunk."""

    def finish(self, pair: StreamPair, layer: int, numbers: Mapping[str, Tensor]) -> None:
        """Add the numbers of all tokens of the batch at one layer."""


def read_logits(pair: StreamPair, readers: Sequence[ReadsLogits]) -> None:
    """Show each layer's logits to the readers that want that layer, the output first.

    Readers that overwrite come last, and get copies unless they are the last of all.

    Raises:
        ProbeError: if a reader fails; it names the reader.
    """
    wanted = {layer for reader in readers for layer in reader.logit_layers()}
    in_turn = sorted(readers, key=lambda reader: reader.overwrites)
    final = None if pair.n_layers in wanted else _final_top1(pair)
    for layer in sorted(wanted, reverse=True):
        here = [reader for reader in in_turn if layer in reader.logit_layers()]
        sampling = [reader for reader in here if reads_sample(pair, reader, layer)]
        complete = [reader for reader in here if reader not in sampling]
        if complete:
            top1 = _read_layer(pair, layer, complete, final)
            final = top1 if final is None else final
        if final is None or not len(final):
            return  # a batch without a single decision
        if sampling and pair.lens is not None:
            decisions = pair.mask(layer, "decisions")
            rows = pair.lens[decisions]
            _read_layer(pair, layer, sampling, final[rows.to(final.device)], rows)


def reads_sample(pair: StreamPair, reader: ReadsLogits, layer: int) -> bool:
    """Whether a reader is shown a sample of the tokens at this layer."""
    sampled = pair.lens is not None and layer < pair.n_layers
    return sampled and bool(getattr(reader, "samples", False))


def _read_layer(
    pair: StreamPair,
    layer: int,
    readers: Sequence[ReadsLogits],
    final: Int[Tensor, " n"] | None,
    rows: Bool[Tensor, " decision"] | None = None,
) -> Int[Tensor, " n"]:
    """Show the logits of one layer to these readers, of all decisions or of some.

    Args:
        pair: both streams.
        layer: where.
        readers: those that overwrite last.
        final: the tuned model's top-1 token at the output, of each that is read; None at the
            output itself.
        rows: True for the decisions that are read; None for all.

    Returns:
        `final`.
    """
    parts: list[dict[str, list[Tensor]]] = [defaultdict(list) for _ in readers]
    top1_parts = []
    for part, base, tuned in pair.logits(layer, rows):
        top1 = distances.winner(tuned) if final is None else final[part]
        top1_parts.append(top1)
        chunk = LogitChunk(layer, base, tuned, top1, pair.has_shared_logits(layer))
        for reader, numbers in zip(readers, parts, strict=True):
            needs_copy = reader.overwrites and reader is not readers[-1]
            shown = chunk.copied() if needs_copy else chunk
            for name, values in run_probe_step(reader, "read", shown).items():
                numbers[name].append(values)
    if not top1_parts:
        return torch.zeros(0, dtype=torch.int64, device=pair.device)
    for reader, numbers in zip(readers, parts, strict=True):
        of_layer = {name: torch.cat(values) for name, values in numbers.items()}
        run_probe_step(reader, "finish", pair, layer, of_layer)
    return torch.cat(top1_parts)


def _final_top1(pair: StreamPair) -> Int[Tensor, " n"]:
    """The tuned model's top-1 tokens at the output, where no reader asks for that layer."""
    none = torch.zeros(0, dtype=torch.int64, device=pair.device)
    return torch.cat([none, *(distances.winner(t) for _, _, t in pair.logits(pair.n_layers))])
