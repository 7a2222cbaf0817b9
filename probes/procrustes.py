"""How far apart are the two streams after one is turned onto the other, layer by layer?"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..statistics.alignment import CrossMoments, procrustes_cosine
from .cross_moments import CrossProbe

ROUNDING = 1e-13


class Procrustes(CrossProbe):
    """The Procrustes angle of the two centred streams (Williams et al. 2021).

    Metrics:
        angle: arccos of ‖XᵀY‖_* / (‖X‖ ‖Y‖), in degrees: 0 if one stream is the other turned, moved
            and scaled, 90 if no rotation makes them alike.

    Rotations fit chance, too: of two independent streams of n tokens the angle is well below 90
    unless n is much larger than d_model. No interval is given.
    """

    name = "procrustes"
    metric = "angle"

    def measure(self, moments: Sequence[CrossMoments]) -> tuple[float, float, float]:
        """The angle; NaN without tokens."""
        cosine = float(procrustes_cosine(moments[0]))
        # The arccosine makes 1e-6 degrees of what the singular values round.
        angle = 0.0 if cosine > 1 - ROUNDING else math.acos(cosine) if cosine >= 0 else math.nan
        return math.degrees(angle), math.nan, math.nan
