"""How last-block outputs are spread, on each of two halves of the texts."""

from __future__ import annotations

import torch
from jaxtyping import Bool
from torch import Tensor

from ...errors import CorpusError
from ...passes.streams import StreamPair, StreamSpec
from ...results.rows import ProbeResult
from ...statistics.moments import moments_of
from ..spectrum import Cloud
from .interventions import Side

SIDES: tuple[Side, Side] = ("base", "tuned")
FITTED, READ = 0, 1


class Halves:
    """Mean and covariance of both models' last-block outputs, on each half of the texts.

    Without BOS and attention sinks, as every measure of geometry. Runs in a pass over the corpus
    whose texts `read` tells apart.
    """

    name = "halves"

    def __init__(self, read: Bool[Tensor, " text"]) -> None:
        self._half = torch.where(read, READ, FITTED)
        self._seen = 0

    def open(self, spec: StreamSpec) -> None:
        """Allocate."""
        d = spec.d_model

        def sums(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=spec.device)

        # By half, by model.
        self._n = sums(2)
        self._total, self._outer = sums(2, 2, d), sums(2, 2, d, d)
        self._origin: dict[int, Tensor] = {}

    def update(self, pair: StreamPair) -> None:
        """Add one batch, which follows the one before in the corpus's order."""
        last = pair.n_layers
        here = self._half[self._seen : self._seen + pair.n_sequences].to(pair.tokens.device)
        self._seen += pair.n_sequences
        counted = pair.mask(last, "geometry")
        for half in (FITTED, READ):
            index = (counted & (here == half)[:, None]).flatten().nonzero().squeeze(-1)
            self._n[half] += len(index)
            if not len(index):
                continue
            for i, stream in enumerate((pair.base, pair.tuned)):
                x = stream.vectors(last, "raw", index).to(pair.device)
                # Any point near the data will do.
                found = moments_of(x, self._origin.setdefault(i, x.mean(0)))
                self._total[half, i] += found.total
                self._outer[half, i] += found.outer

    def compute(self) -> ProbeResult:
        """A pass asks for rows; the clouds are what is wanted."""
        return ProbeResult(())

    def state_bytes(self, spec: StreamSpec) -> int:
        """Memory of the sums, and of the products that are added to them."""
        return 5 * 8 * spec.d_model * (spec.d_model + 1)

    def cloud(self, half: int, side: Side) -> Cloud:
        """One model's outputs on one half, on the CPU."""
        i = SIDES.index(side)
        n = int(self._n[half])
        if not n:
            raise CorpusError(
                "half of the texts have nothing but BOS and attention sinks: give more texts"
            )
        mean = (self._total[half, i] / n).cpu()
        covariance = self._outer[half, i].cpu() / n - torch.outer(mean, mean)
        return Cloud(n, mean + self._origin[i].cpu().double(), covariance)
