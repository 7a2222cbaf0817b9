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
from jaxtyping import Float, Int, Shaped
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

    `overwrites` says whether `read` changes the logits it is given.
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
        parts: list[dict[str, list[Tensor]]] = [defaultdict(list) for _ in here]
        top1_parts = []
        for rows, base, tuned in pair.logits(layer):
            top1 = distances.winner(tuned) if final is None else final[rows]
            top1_parts.append(top1)
            chunk = LogitChunk(layer, base, tuned, top1, pair.has_shared_logits(layer))
            for reader, numbers in zip(here, parts, strict=True):
                needs_copy = reader.overwrites and reader is not here[-1]
                shown = chunk.copied() if needs_copy else chunk
                for name, values in run_probe_step(reader, "read", shown).items():
                    numbers[name].append(values)
        if not top1_parts:
            return  # a batch without a single decision
        final = torch.cat(top1_parts)
        for reader, numbers in zip(here, parts, strict=True):
            of_layer = {name: torch.cat(values) for name, values in numbers.items()}
            run_probe_step(reader, "finish", pair, layer, of_layer)


def _final_top1(pair: StreamPair) -> Int[Tensor, " n"]:
    """The tuned model's top-1 tokens at the output, where no reader asks for that layer."""
    none = torch.zeros(0, dtype=torch.int64, device=pair.device)
    return torch.cat([none, *(distances.winner(t) for _, _, t in pair.logits(pair.n_layers))])
