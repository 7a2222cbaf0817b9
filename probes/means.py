"""Means over tokens with 95% intervals over sequences: the base of most probes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from ..intervals import mean_half_width
from ..results import ProbeResult, Row
from ..streams import StreamPair, StreamSpec, TokenSet, View
from .base import Probe


class MeanProbe(Probe):
    """A probe whose every metric is the mean of one number per token.

    Subclasses name their `metrics` and write `measure`; the sums, the intervals and the rows of
    the table follow. The interval is that of a ratio of per-sequence sums (cluster-robust).

    Attributes:
        metrics: names of the numbers `measure` returns.
        views: the views `measure` is called for.
        token_set: which tokens are counted.
        bounds: metrics that cannot leave a range, so that their intervals do not either.
        layers: residual layers to measure, None for all; -1 is the last.
    """

    metrics: ClassVar[tuple[str, ...]]
    views: ClassVar[tuple[View, ...]] = ("raw",)
    bounds: ClassVar[Mapping[str, tuple[float, float]]] = {}
    token_set: TokenSet = "geometry"
    layers: tuple[int, ...] | None = None

    def __init__(
        self, layers: Sequence[int] | None = None, token_set: TokenSet | None = None
    ) -> None:
        if layers is not None:
            self.layers = tuple(layers)
        if token_set is not None:
            self.token_set = token_set

    @abstractmethod
    def measure(
        self, pair: StreamPair, layer: int, view: View
    ) -> Mapping[str, Float[Tensor, " n"]]:
        """One number per counted token for each metric, at one layer in one view."""

    def sum_shapes(self, spec: StreamSpec) -> dict[str, tuple[int, ...]]:
        """Per-sequence sums y of every metric and their second moments; n counts tokens."""
        n_layers = len(spec.resolve_layers(self.layers))
        each = (len(self.metrics), n_layers, len(self.views))
        return {
            "y": each,
            "yy": each,
            "yn": each,
            "n": (n_layers,),
            "nn": (n_layers,),
            "sequences": (n_layers,),
        }

    def update(self, pair: StreamPair) -> None:
        """Measure every layer and view of one batch."""
        sums = self.sums
        # Last layer first: what the output decides can serve the layers below it.
        for i, layer in reversed(list(enumerate(self.spec.resolve_layers(self.layers)))):
            n = pair.mask(layer, self.token_set).sum(-1).to(self.spec.device, torch.float64)
            sums["n"][i] += n.sum()
            sums["nn"][i] += n.square().sum()
            sums["sequences"][i] += (n > 0).sum()
            for j, view in enumerate(self.views):
                measured = self.measure(pair, layer, view)
                for k, metric in enumerate(self.metrics):
                    y = pair.per_sequence(measured[metric], layer, self.token_set)
                    sums["y"][k, i, j] += y.sum()
                    sums["yy"][k, i, j] += y.square().sum()
                    sums["yn"][k, i, j] += (y * n).sum()

    def compute(self) -> ProbeResult:
        """One row per metric, layer and view."""
        return ProbeResult(tuple(self._rows()))

    def _rows(self) -> list[Row]:
        s = {name: value.cpu() for name, value in self.sums.items()}
        rows = []
        for i, layer in enumerate(self.spec.resolve_layers(self.layers)):
            mean = s["y"][:, i] / s["n"][i]
            half = mean_half_width(
                float(s["sequences"][i]), mean, s["n"][i], s["yy"][:, i], s["yn"][:, i], s["nn"][i]
            )
            for k, metric in enumerate(self.metrics):
                low, high = self.bounds.get(metric, (-torch.inf, torch.inf))
                for j, view in enumerate(self.views):
                    value, width = float(mean[k, j]), float(half[k, j])
                    # NaN, the absence of an interval, must survive the bounds.
                    ends = (
                        (max(low, value - width), min(high, value + width))
                        if width == width
                        else (width, width)
                    )
                    rows.append(Row(self.name, metric, layer, view, value, *ends, int(s["n"][i])))
        return rows
