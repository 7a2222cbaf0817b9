"""How far the tuned model's residual stream has moved from the base model's, layer by layer."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from ..passes.streams import VIEWS, StreamPair, View
from ..statistics import distances
from .base import MeanProbe


class ResidualDrift(MeanProbe):
    """Mean cosine, L2 distance and relative L2 between the two streams (paper, section 4).

    Metrics:
        cosine: direction, in [-1, 1]; 1 is no drift.
        l2: ‖h' - h‖, in units of the residual stream.
        relative_l2: ‖h' - h‖ / ‖h‖, dimensionless.
    """

    name = "drift"
    metrics = ("cosine", "l2", "relative_l2")
    views = VIEWS
    bounds = {"cosine": (-1.0, 1.0), "l2": (0.0, float("inf")), "relative_l2": (0.0, float("inf"))}

    def measure(self, pair: StreamPair, layer: int, view: View) -> dict[str, Float[Tensor, " n"]]:
        """The three distances of every counted token."""
        base, tuned = pair.vectors(layer, view, self.token_set)
        return {
            "cosine": distances.cosine(base, tuned),
            "l2": distances.l2_distance(base, tuned),
            "relative_l2": distances.relative_l2(base, tuned),
        }
