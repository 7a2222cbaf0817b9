"""Did tuning reorder the output distribution, or only sharpen it?"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Shaped
from torch import Tensor

from ..passes.logits_reader import LogitChunk
from ..passes.streams import StreamPair, StreamSpec
from ..results.rows import ProbeResult
from ..statistics import distances
from ..statistics.rank_buckets import DEEP_TAIL, RANK_BUCKETS
from ..statistics.rank_correlation import spearman
from .base import LogitProbe

BUCKETS = (*RANK_BUCKETS, DEEP_TAIL)


class RankReordering(LogitProbe):
    """Ranks at the output, teacher-forced (paper, sections 3.3 and 3.4).

    Temperature cannot change a rank: anything but agreement 1 and ρ = 1 is reordering. All of it
    is read at layer L.

    Metrics:
        top1_agreement: share of tokens where both models put the same token first.
        spearman: mean rank correlation of the two rows of logits over the whole vocabulary.
        rank_1, rank_2_10, rank_gt_10, rank_ge_200: share of tokens whose tuned top-1 token had
            that rank in the base model; tied logits share the best rank.

    Extras:
        rank_histogram: the same ranks in bins that widen with rank; the edges of the shares
            above are edges here, too.
        tied_winners: for how many tokens the base model's largest logit was tied.
    """

    name = "rank_reordering"
    metrics = ("top1_agreement", "spearman", *(bucket.metric for bucket in BUCKETS))
    bounds = {metric: (-1.0 if metric == "spearman" else 0.0, 1.0) for metric in metrics}

    def __init__(self) -> None:
        super().__init__(layers=(-1,))

    def sum_shapes(self, spec: StreamSpec) -> dict[str, tuple[int, ...]]:
        """The means' sums, a histogram of ranks and the number of ties."""
        bins = (len(rank_bins(spec.d_vocab)),)
        return {**super().sum_shapes(spec), "histogram": bins, "tied": (1,)}

    def read(self, chunk: LogitChunk) -> dict[str, Shaped[Tensor, " chunk"]]:
        """Agreement, correlation and base rank of every next-token decision."""
        base, winner = chunk.base, chunk.final  # at the output, the tuned model's own top-1 token
        rank = distances.rank_of(base, winner)
        best = base.amax(-1, keepdim=True)
        return {
            "top1_agreement": (distances.winner(base) == winner).double(),
            "spearman": spearman(base, chunk.tuned),
            **{bucket.metric: bucket.holds(rank).double() for bucket in BUCKETS},
            "rank": rank,
            "tied": (base == best).to(torch.float32).sum(-1) > 1,
        }

    def finish(self, pair: StreamPair, layer: int, numbers: Mapping[str, Tensor]) -> None:
        """Add the means, and count ranks and ties."""
        super().finish(pair, layer, numbers)
        rank = numbers["rank"]
        lows = torch.tensor(rank_bins(self.spec.d_vocab), device=rank.device)
        bins = torch.bucketize(rank, lows, right=True) - 1
        self.sums["histogram"] += torch.bincount(bins, minlength=len(lows))
        self.sums["tied"] += numbers["tied"].sum()

    def compute(self) -> ProbeResult:
        """The rows, and the histogram of base ranks of the tuned model's winners."""
        lows = rank_bins(self.spec.d_vocab)
        highs = [*(low - 1 for low in lows[1:]), self.spec.d_vocab]
        histogram = [
            {"low": low, "high": high, "count": int(count)}
            for low, high, count in zip(lows, highs, self.sums["histogram"].tolist(), strict=True)
        ]
        extras = {"rank_histogram": histogram, "tied_winners": int(self.sums["tied"])}
        return ProbeResult(tuple(self._rows()), extras)


def rank_bins(d_vocab: int) -> list[int]:
    """Lowest rank of each bin: 1, 2, 3, 6, 11, 21, 51, 101, 200, 501, 1001, 2001, 5001, ..."""
    decades = (step * 10**k + 1 for k in range(len(str(d_vocab))) for step in (1, 2, 5))
    # 200 and not 201: the paper's deep tail is "rank 200 or more".
    lows = [1, *(200 if low == 201 else low for low in decades)]
    return [low for low in lows if low <= d_vocab]
