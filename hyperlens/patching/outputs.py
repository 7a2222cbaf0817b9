"""What both models decide from their last outputs, a few decisions at a time, in one pass."""

from __future__ import annotations

from abc import ABC, abstractmethod

from jaxtyping import Int
from torch import Tensor

from ..passes.streams import StreamPair, logit_rows
from ..results.rows import ProbeResult


class OutputReader(ABC):
    """Runs in a pass over `n_texts` texts; batches follow one another."""

    def __init__(self, n_texts: int) -> None:
        self._n_texts = n_texts
        self._seen = 0

    def update(self, pair: StreamPair) -> None:
        """Add one batch."""
        index = pair.index(pair.n_layers, "decisions")
        text = index // pair.tokens.shape[1] + self._seen
        self._seen += pair.n_sequences
        for rows in logit_rows(len(index), pair.base.d_vocab, index.device):
            self.decide(pair, index[rows], text[rows])

    @abstractmethod
    def decide(self, pair: StreamPair, index: Int[Tensor, " n"], text: Int[Tensor, " n"]) -> None:
        """Take in some decisions: their flat [batch * pos] indices, and each one's text."""

    def compute(self) -> ProbeResult:
        """A pass asks for rows; the outcomes are what is wanted."""
        return ProbeResult(())
