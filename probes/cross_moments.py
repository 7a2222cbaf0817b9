"""What probes of how alike the two streams are share: moments of both models' vectors together."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import fields
from typing import ClassVar, cast

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
    checked_views,
)
from ..results.rows import ProbeResult, Row
from ..statistics.alignment import CrossMoments, cross_moments
from .base import Probe

BASE, TUNED = 0, 1
MOMENTS = tuple(f.name for f in fields(CrossMoments) if f.name != "n")


class CrossProbe(Probe):
    """A statistic of moments of the two streams together, d_model² numbers per layer and view.

    Subclasses say of which pairs of streams they need moments, and write `measure`.

    Attributes:
        metric: the name of the statistic.
        of_streams: the pairs, 0 for the base and 1 for the tuned model.
        layers: residual layers to measure, None for all; -1 is the last.
    """

    metric: ClassVar[str]
    of_streams: ClassVar[tuple[tuple[int, int], ...]] = ((BASE, TUNED),)

    # The layers whose origin another rank has chosen.
    _given: tuple[int, ...] = ()

    def __init__(
        self,
        views: Sequence[View] = ("raw",),
        layers: Sequence[int] | None = None,
        token_set: TokenSet = "geometry",
    ) -> None:
        self.views = checked_views(views)
        self.layers = checked_layers(layers)
        self.token_set = checked_token_set(token_set)

    @abstractmethod
    def measure(self, moments: Sequence[CrossMoments]) -> tuple[float, float, float]:
        """The value and its interval (NaN for none), from the moments of `of_streams`."""

    def sum_shapes(self, spec: StreamSpec) -> dict[str, tuple[int, ...]]:
        """Moments of every pair of streams, layer and view, and the origins they are about."""
        d, n_layers = spec.d_model, len(spec.resolve_layers(self.layers))
        each = (len(self.of_streams), n_layers, len(self.views))
        shapes = dict.fromkeys(("total_x", "total_y", "cubic_x", "cubic_y"), (*each, d))
        return shapes | {
            "n": (n_layers,),
            "origin": (2, *each[1:], d),
            "outer": (*each, d, d),
            **dict.fromkeys(("square_x", "square_y", "squares"), each),
        }

    def update(self, pair: StreamPair) -> None:
        """Add one batch's moments."""
        s = self.sums
        for i, layer in enumerate(self.spec.resolve_layers(self.layers)):
            n = int(pair.mask(layer, self.token_set).sum())
            first = self._has_no_origin(i)
            for j, view in enumerate(self.views if n else ()):
                vectors = pair.vectors(layer, view, self.token_set)
                if first:
                    # Any point near the data; float32, so that subtracting it is exact.
                    means = [x.mean(0, dtype=torch.float64).float() for x in vectors]
                    s["origin"][:, i, j] = torch.stack(means).double()
                about = [x.double() - s["origin"][k, i, j] for k, x in enumerate(vectors)]
                made: CrossMoments | None = None
                for k, (one, other) in enumerate(self.of_streams):
                    if made is None or not pair.is_shared(layer, view):
                        made = cross_moments(about[one], about[other])
                    for name in MOMENTS:
                        s[name][k, i, j] += getattr(made, name)
            s["n"][i] += n

    def compute(self) -> ProbeResult:
        """One row per layer and view."""
        rows = []
        for i, layer in enumerate(self.spec.resolve_layers(self.layers)):
            n = int(self.sums["n"][i])
            for j, view in enumerate(self.views):
                moments = [
                    CrossMoments(n=self.sums["n"][i], **{m: self.sums[m][k, i, j] for m in MOMENTS})
                    for k in range(len(self.of_streams))
                ]
                rows.append(Row(self.name, self.metric, layer, view, *self.measure(moments), n))
        return ProbeResult(tuple(rows))

    def merge(self, other: Probe) -> None:
        """Add another shard's sums, first moved to this shard's origin (exact algebra)."""
        self._check_mergeable(other)
        if not bool(self.sums["n"].any()):
            self.sums["origin"].copy_(other.sums["origin"])
        for name, value in cast(CrossProbe, other)._about(self._origins(other)).items():
            if name != "origin":
                self.sums[name] += value

    def _origins(self, other: Probe) -> Float[Tensor, "models layers views d"]:
        """This shard's origins; the other's at layers of which this one has seen no token."""
        none = self.sums["n"] == 0
        self.sums["origin"][:, none] = other.sums["origin"][:, none]
        return self.sums["origin"]

    def open(self, spec: StreamSpec) -> None:
        """Start from zero for models of these sizes."""
        super().open(spec)
        self._given = ()

    def share_origin(self) -> None:
        """Take the origins of the first rank, so that no rank's sums have to be moved to them."""
        group = torch.distributed
        chosen = (self.sums["n"] > 0).to(self.spec.device)
        group.broadcast(chosen, src=0)
        group.broadcast(self.sums["origin"], src=0)
        self._given = tuple(chosen.nonzero()[:, 0].tolist())

    def all_reduce(self) -> None:
        """Move all ranks' sums to the origins of the first, then add them up."""
        group = torch.distributed
        origin = self.sums["origin"].clone()
        group.broadcast(origin, src=0)
        self.sums = self._about(origin)
        for name, value in self.sums.items():
            if name != "origin":
                group.all_reduce(value)

    def _has_no_origin(self, i: int) -> bool:
        return not (bool(self.sums["n"][i] > 0) or i in self._given)

    def _about(self, origin: Float[Tensor, "models layers views d"]) -> dict[str, Tensor]:
        """The same sums taken about another origin."""
        s = self.sums
        step = s["origin"] - origin
        one, other = (list(side) for side in zip(*self.of_streams, strict=True))
        n = s["n"][None, :, None].expand_as(s["squares"])
        moments = CrossMoments(n=n, **{name: s[name] for name in MOMENTS})
        moved = moments.shifted(step[one], step[other]) if bool(step.any()) else moments
        sums = {name: getattr(moved, name) for name in MOMENTS}
        return {**s, **sums, "origin": origin}
