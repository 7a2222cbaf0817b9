"""Means over tokens with 95% intervals over sequences: the base of most probes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from ..passes.streams import (
    StreamPair,
    StreamSpec,
    TokenSet,
    View,
    checked_layers,
    checked_token_set,
)
from ..results.rows import ProbeResult, Row
from ..statistics.intervals import mean_half_width
from .base import Probe


class TokenMeans(Probe):
    """Means of one number per token, with the interval of a ratio of per-sequence sums.

    Subclasses get the numbers and hand them to `add`; the sums, the cluster-robust intervals and
    the rows of the table follow. `MeanProbe` gets them from vectors, `LogitProbe` from logits.

    Attributes:
        metrics: names of the numbers.
        views: the views they are taken in.
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
        self.layers = checked_layers(layers) or self.layers
        self.token_set = checked_token_set(token_set or self.token_set)

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

    def add(
        self,
        pair: StreamPair,
        layer: int,
        measured: Mapping[View, Mapping[str, Float[Tensor, " n"]]],
    ) -> None:
        """Add one batch's numbers of one layer, one per counted token for each metric and view."""
        sums, i = self.sums, self.spec.resolve_layers(self.layers).index(layer)
        n = pair.mask(layer, self.token_set).sum(-1).to(self.spec.device, torch.float64)
        sums["n"][i] += n.sum()
        sums["nn"][i] += n.square().sum()
        sums["sequences"][i] += (n > 0).sum()
        for j, view in enumerate(self.views):
            for k, metric in enumerate(self.metrics):
                y = pair.per_sequence(measured[view][metric], layer, self.token_set)
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


class MeanProbe(TokenMeans):
    """A probe whose every metric is the mean of one number per token.

    Subclasses name their `metrics` and write `measure`.
    """

    @abstractmethod
    def measure(
        self, pair: StreamPair, layer: int, view: View
    ) -> Mapping[str, Float[Tensor, " n"]]:
        """One number per counted token for each metric, at one layer in one view."""

    def update(self, pair: StreamPair) -> None:
        """Measure every layer and view of one batch."""
        for layer in self.spec.resolve_layers(self.layers):
            self.add(pair, layer, {view: self.measure(pair, layer, view) for view in self.views})
