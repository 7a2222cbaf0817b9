"""The buckets that ranks are counted in, with their names and labels, for every table and figure.

The paper (arXiv 2605.22579, sections 3.3 and 3.4) reports where the base model ranks the tuned
model's top-1 token: first, second to tenth, beyond the tenth, and 200th or deeper.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple


class RankBucket(NamedTuple):
    """A range of one-based ranks.

    Attributes:
        metric: how the share of tokens in it is called in tables.
        label: how it is shown.
        low, high: its first and last rank.
    """

    metric: str
    label: str
    low: float
    high: float

    def holds(self, rank: Any) -> Any:
        """Whether a rank is in it; for a tensor or an array of ranks, which of them are.

        >>> [RANK_BUCKETS[1].holds(rank) for rank in (1, 2, 10, 11)]
        [False, True, True, False]
        """
        return (rank >= self.low) & (rank <= self.high)


RANK_BUCKETS = (
    RankBucket("rank_1", "1", 1, 1),
    RankBucket("rank_2_10", "2-10", 2, 10),
    RankBucket("rank_gt_10", ">10", 11, math.inf),
)
"""Every rank is in exactly one."""

DEEP_TAIL = RankBucket("rank_ge_200", ">=200", 200, math.inf)
"""Part of the last bucket, counted beside it."""


def bucket_of(rank: int) -> RankBucket:
    """The one of `RANK_BUCKETS` that holds a rank.

    >>> bucket_of(7).label
    '2-10'
    """
    return next(bucket for bucket in RANK_BUCKETS if bucket.low <= rank <= bucket.high)
