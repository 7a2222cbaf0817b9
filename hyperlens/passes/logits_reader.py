"""One reading of the logit lens for all probes that want logits.

The unembedding is the dearest matrix product of a comparison, and logits are too many to keep:
so each chunk of them is made once, shown to every probe, and dropped.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from ..statistics import distances
from .failures import guarded
from .streams import StreamPair


@dataclass(frozen=True)
class LogitChunk:
    """Both lenses' logits for a few `decisions` tokens at one layer.

    Attributes:
        layer: 0..L; at L these are the models' own logits.
        base, tuned: one row per token, float32.
        final: the token that the tuned model puts first at the output, for each row.
    """

    layer: int
    base: Float[Tensor, "chunk d_vocab"]
    tuned: Float[Tensor, "chunk d_vocab"]
    final: Int[Tensor, " chunk"]

    def copied(self) -> LogitChunk:
        """The same logits in memory of their own."""
        return LogitChunk(self.layer, self.base.clone(), self.tuned.clone(), self.final)


@runtime_checkable
class ReadsLogits(Protocol):
    """What is asked of a probe that reads logits together with others."""

    overwrites: bool

    def logit_layers(self) -> Sequence[int]:
        """The layers it reads."""

    def read(self, chunk: LogitChunk) -> Mapping[str, Shaped[Tensor, " chunk"]]:
        """Numbers per token of one chunk."""

    def finish(self, pair: StreamPair, layer: int, numbers: Mapping[str, Tensor]) -> None:
        """Take in the numbers of all of a layer's tokens."""


def read_logits(pair: StreamPair, readers: Sequence[ReadsLogits]) -> None:
    """Show every layer's logits to the readers that want it, the output first.

    Readers that overwrite come last, and get copies unless they are the last of all.

    Raises:
        ProbeError: if a reader fails; it names the reader.
    """
    wanted = {layer for reader in readers for layer in reader.logit_layers()}
    in_turn = sorted(readers, key=lambda reader: reader.overwrites)
    final = None if pair.n_layers in wanted else _final_winners(pair)
    for layer in sorted(wanted, reverse=True):
        here = [reader for reader in in_turn if layer in reader.logit_layers()]
        found: list[dict[str, list[Tensor]]] = [defaultdict(list) for _ in here]
        winners = []
        for rows, base, tuned in pair.logits(layer):
            decided = distances.winner(tuned) if final is None else final[rows]
            winners.append(decided)
            chunk = LogitChunk(layer, base, tuned, decided)
            for reader, numbers in zip(here, found, strict=True):
                own = chunk.copied() if reader.overwrites and reader is not here[-1] else chunk
                for name, values in guarded(reader, "read", own).items():
                    numbers[name].append(values)
        if not winners:
            return  # a batch without a single decision
        final = torch.cat(winners)
        for reader, numbers in zip(here, found, strict=True):
            whole = {name: torch.cat(values) for name, values in numbers.items()}
            guarded(reader, "finish", pair, layer, whole)


def _final_winners(pair: StreamPair) -> Int[Tensor, " n"]:
    """What the tuned model puts first at the output, where no reader asks for that layer."""
    none = torch.zeros(0, dtype=torch.int64, device=pair.device)
    return torch.cat([none, *(distances.winner(t) for _, _, t in pair.logits(pair.n_layers))])
