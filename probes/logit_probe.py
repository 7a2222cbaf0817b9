"""Means over tokens of what both models' logits say: the base of every probe that reads them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

from jaxtyping import Shaped
from torch import Tensor

from ..errors import ProbeError
from ..passes.logits_reader import LogitChunk, read_logits
from ..passes.streams import StreamPair, TokenSet, View
from .means import TokenMeans


class LogitProbe(TokenMeans):
    """A probe whose every metric is the mean of one number per row of logits.

    Subclasses name their `metrics` and write `read`. All such probes of a comparison are shown
    the same logits, so that a further one costs no further unembedding.

    Attributes:
        overwrites: whether `read` changes the logits it is given, which saves memory.
    """

    views: ClassVar[tuple[View, ...]] = ("final_norm",)
    token_set: TokenSet = "decisions"
    overwrites: bool = False

    def __init__(
        self, layers: Sequence[int] | None = None, token_set: TokenSet | None = None
    ) -> None:
        super().__init__(layers, token_set)
        if self.token_set != "decisions":
            raise ProbeError(
                f"a probe of logits counts next-token decisions: token_set must be 'decisions', "
                f"got {self.token_set!r}"
            )

    @abstractmethod
    def read(self, chunk: LogitChunk) -> Mapping[str, Shaped[Tensor, " chunk"]]:
        """One number per row of the chunk for each metric."""

    def finish(self, pair: StreamPair, layer: int, numbers: Mapping[str, Tensor]) -> None:
        """Add the metrics that `read` returned, now of all the batch's tokens, to the sums."""
        means = {metric: numbers[metric] for metric in self.metrics}
        self.add(pair, layer, dict.fromkeys(self.views, means))

    def logit_layers(self) -> tuple[int, ...]:
        """The layers whose logits are read."""
        return self.spec.resolve_layers(self.layers)

    def update(self, pair: StreamPair) -> None:
        """Read one batch alone; in a comparison, all such probes are read together."""
        read_logits(pair, [self])
