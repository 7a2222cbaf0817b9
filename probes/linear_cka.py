"""Do the two streams relate the tokens to each other in the same way, layer by layer?"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..statistics.alignment import CrossMoments, unbiased_hsic
from .cross_moments import BASE, TUNED, CrossProbe


class LinearCKA(CrossProbe):
    """Linear centred kernel alignment, debiased (Kornblith et al. 2019, Song et al. 2012).

    Metrics:
        cka: HSIC(base, tuned) / √(HSIC(base, base) HSIC(tuned, tuned)), the correlation of the two
            models' products of pairs of tokens; 1 if one stream is the other turned, moved and
            scaled, 0 if they have nothing in common.

    Each HSIC is the unbiased estimate, without products of a token with itself, so that few tokens
    do not seem alike; unlike the biased one it can leave 0 to 1 a little. Its sums are exact for
    any number of tokens, three times d_model² numbers per layer and view. No interval is given.
    """

    name = "linear_cka"
    metric = "cka"
    of_streams = ((BASE, TUNED), (BASE, BASE), (TUNED, TUNED))

    def measure(self, moments: Sequence[CrossMoments]) -> tuple[float, float, float]:
        """The alignment; NaN below four tokens."""
        both, base, tuned = (float(unbiased_hsic(m)) for m in moments)
        # An estimate of what is 0 can be below it.
        value = both / math.sqrt(base * tuned) if base > 0 and tuned > 0 else math.nan
        return value, math.nan, math.nan
