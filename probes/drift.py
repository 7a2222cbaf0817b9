"""How far the tuned model's residual stream has moved from the base model's, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from ..passes.streams import VIEWS, WIDER_SETS, StreamPair, StreamSpec, TokenSet, View
from ..results.rows import ProbeResult, Row
from ..statistics import distances
from .base import WITH_EXCLUDED, MeanProbe, views_with_excluded


class ResidualDrift(MeanProbe):
    """Mean cosine, L2 distance and relative L2 between the two streams (paper, section 4).

    Metrics:
        cosine: direction, in [-1, 1]; 1 is no drift.
        l2: ‖h' - h‖, in units of the residual stream.
        relative_l2: ‖h' - h‖ / ‖h‖, dimensionless.

    With the tokens that are left out counted in (`with_excluded`), at every layer raw and at the
    last one after the final norm too, without intervals: `l2_with_sinks` and
    `l2_with_sinks_and_bos`, the mean L2 distance again.
    """

    name = "drift"
    metrics = ("cosine", "l2", "relative_l2")
    views = VIEWS
    bounds = {"cosine": (-1.0, 1.0), "l2": (0.0, float("inf")), "relative_l2": (0.0, float("inf"))}

    def __init__(
        self,
        layers: Sequence[int] | None = None,
        token_set: TokenSet | None = None,
        with_excluded: bool = False,
    ) -> None:
        super().__init__(layers, token_set)
        self.with_excluded = with_excluded

    def sum_shapes(self, spec: StreamSpec) -> dict[str, tuple[int, ...]]:
        """As of any mean over tokens, and the L2 distances of the tokens left out."""
        shapes = super().sum_shapes(spec)
        if self.with_excluded:
            each = (len(WIDER_SETS), len(spec.resolve_layers(self.layers)))
            shapes |= {"excluded_n": each, "excluded_l2": (*each, len(self.views))}
        return shapes

    def update(self, pair: StreamPair) -> None:
        """Measure every layer and view of one batch."""
        super().update(pair)
        if not self.with_excluded:
            return
        for i, layer in enumerate(self.spec.resolve_layers(self.layers)):
            for c, index in enumerate(pair.added(layer, self.token_set)):
                self.sums["excluded_n"][c, i] += len(index)
                for view in views_with_excluded(layer, self.spec):
                    base, tuned = pair.vectors_at(layer, view, index)
                    l2 = distances.l2_distance(base, tuned).to(torch.float64).sum()
                    self.sums["excluded_l2"][c, i, self.views.index(view)] += l2

    def compute(self) -> ProbeResult:
        """One row per metric, layer and view, and those with more tokens."""
        rows = self._exact_where_still(super().compute().rows)
        return ProbeResult((*rows, *self._rows_with_excluded()) if self.with_excluded else rows)

    @staticmethod
    def _exact_where_still(rows: Sequence[Row]) -> tuple[Row, ...]:
        """Where no vector moved, cosines are 1 for that reason, and not by chance."""
        still = {(r.layer, r.view) for r in rows if r.metric == "l2" and r.value == r.high == 0}
        return tuple(
            row._replace(low=row.value, high=row.value)
            if row.metric == "cosine" and (row.layer, row.view) in still
            else row
            for row in rows
        )

    def _rows_with_excluded(self) -> Iterator[Row]:
        s = {name: value.cpu() for name, value in self.sums.items()}
        metric = self.metrics.index("l2")
        for i, layer in enumerate(self.spec.resolve_layers(self.layers)):
            for view in views_with_excluded(layer, self.spec):
                j = self.views.index(view)
                l2, n = s["y"][metric, i, j], s["n"][i]
                for c, words in enumerate(WITH_EXCLUDED):
                    l2, n = l2 + s["excluded_l2"][c, i, j], n + s["excluded_n"][c, i]
                    numbers = (float(l2 / n), math.nan, math.nan, int(n))
                    yield Row(self.name, f"l2_{words}", layer, view, *numbers)

    def measure(self, pair: StreamPair, layer: int, view: View) -> dict[str, Float[Tensor, " n"]]:
        """The three distances of every counted token."""
        base, tuned = pair.vectors(layer, view, self.token_set)
        if pair.is_shared(layer, view):
            none = torch.zeros(len(base), dtype=torch.float64, device=base.device)
            return {"cosine": none + 1.0, "l2": none, "relative_l2": none}
        return {
            "cosine": distances.cosine(base, tuned),
            "l2": distances.l2_distance(base, tuned),
            "relative_l2": distances.relative_l2(base, tuned),
        }
