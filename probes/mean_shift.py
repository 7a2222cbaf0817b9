"""How much of what tuning moved is the same for every token, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

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
from ..statistics.ratios import jackknife_estimate
from .base import Probe


class MeanShift(Probe):
    """The mean of h' - h over all tokens, beside the size of h' - h.

    Metrics:
        share: ‖E(h' - h)‖² / E‖h' - h‖²: 1 if every token moves by the same vector, 0 if the moves
            have no mean. A static bias of the stream has a share near 1.
        relative_l2: ‖E(h' - h)‖ / √E‖h‖², dimensionless.

    The square of the mean is taken from pairs of tokens of different texts, so that it is neither
    too large for few tokens nor because tokens of one text move alike; with no mean shift it can
    come out a little below 0, and `relative_l2` then has its sign. Of a single text: from pairs of
    different tokens. Intervals are the jackknife's over texts; of less than 5 there are none.
    """

    name = "mean_shift"

    def __init__(
        self,
        views: Sequence[View] = ("raw",),
        layers: Sequence[int] | None = None,
        token_set: TokenSet = "geometry",
    ) -> None:
        self.views = checked_views(views)
        self.layers = checked_layers(layers)
        self.token_set = checked_token_set(token_set)

    def sum_shapes(self, spec: StreamSpec) -> dict[str, tuple[int, ...]]:
        """Sums over all tokens, and those of every sampled text, or group of texts.

        `moved` is Σ(h' - h), `squares` Σ‖h' - h‖² and Σ‖h‖², `within` the sum over texts of
        ‖moved‖² of each.
        """
        n_layers, sampled = len(spec.resolve_layers(self.layers)), spec.n_sampled_sequences
        each = (n_layers, len(self.views))
        return {
            "n": (n_layers,),
            "nn": (n_layers,),
            "sequences": (n_layers,),
            "moved": (*each, spec.d_model),
            "squares": (2, *each),
            "within": each,
            "sampled_n": (n_layers, sampled),
            "sampled_moved": (*each, sampled, spec.d_model),
            "sampled_squares": (2, *each, sampled),
        }

    def update(self, pair: StreamPair) -> None:
        """Add one batch, text by text."""
        s, slot = self.sums, pair.sample.slot.to(self.spec.device)
        is_kept = slot >= 0 if self.spec.n_sampled_sequences else torch.zeros_like(slot).bool()
        slot = slot[is_kept]
        for i, layer in enumerate(self.spec.resolve_layers(self.layers)):
            n = pair.mask(layer, self.token_set).sum(-1).to(self.spec.device, torch.float64)
            s["n"][i] += n.sum()
            s["nn"][i] += n.square().sum()
            s["sequences"][i] += (n > 0).sum()
            s["sampled_n"][i].index_add_(0, slot, n[is_kept])
            for j, view in enumerate(self.views):
                base, tuned = (x.double() for x in pair.vectors(layer, view, self.token_set))
                change = tuned - base
                moved = self._by_text(change, pair, layer)
                s["moved"][i, j] += moved.sum(0)
                s["within"][i, j] += moved.square().sum()
                s["sampled_moved"][i, j].index_add_(0, slot, moved[is_kept])
                for k, x in enumerate((change, base)):
                    squares = pair.per_sequence(x.square().sum(-1), layer, self.token_set)
                    s["squares"][k, i, j] += squares.sum()
                    s["sampled_squares"][k, i, j].index_add_(0, slot, squares[is_kept])

    def _by_text(
        self, values: Float[Tensor, "n d_model"], pair: StreamPair, layer: int
    ) -> Float[Tensor, "batch d_model"]:
        """Sums over the tokens of each text, in an order that no batch changes."""
        index = pair.index(layer, self.token_set).to(values.device)
        spread = values.new_zeros(pair.tokens.numel(), values.shape[-1])
        spread[index] = values
        return spread.view(*pair.tokens.shape, -1).sum(1)

    def compute(self) -> ProbeResult:
        """Two rows per layer and view."""
        return ProbeResult(tuple(self._rows()))

    def _rows(self) -> Iterator[Row]:
        s = {name: value.cpu() for name, value in self.sums.items()}
        for i, layer in enumerate(self.spec.resolve_layers(self.layers)):
            n_of_text = s["sampled_n"][i]
            used = n_of_text > 0
            # A group may be spread over batches: only its own row of the sample is whole.
            if self.spec.grouped:
                nn, texts = n_of_text.square().sum(), float(used.sum())
            else:
                nn, texts = s["nn"][i], float(s["sequences"][i])
            for j, view in enumerate(self.views):
                moved, squares = s["moved"][i, j], s["squares"][:, i, j]
                of_text = s["sampled_moved"][i, j]
                within = of_text.square().sum() if self.spec.grouped else s["within"][i, j]
                if texts < 2:  # pairs of different tokens
                    within, nn = squares[0], s["n"][i]
                value = _shift(moved, within, squares[0], squares[1], s["n"][i], nn)
                left = squares[:, None] - s["sampled_squares"][:, i, j][:, used]
                without = _shift(
                    moved - of_text[used],
                    within - of_text[used].square().sum(-1),
                    left[0],
                    left[1],
                    s["n"][i] - n_of_text[used],
                    nn - n_of_text[used].square(),
                )
                # Of many texts only some are in the sample, and tell the spread of all.
                spread = math.sqrt(float(used.sum()) / texts) if texts else math.nan
                for metric, whole in value.items():
                    found = jackknife_estimate(float(whole), without[metric])
                    half = (found.high - found.low) / 2 * spread
                    low, high = found.value - half, found.value + half
                    if metric == "share" and not math.isnan(half):
                        # No share is outside 0 and 1; the estimate itself may be, a little.
                        low = max(low, min(found.value, 0.0))
                        high = min(high, max(found.value, 1.0))
                    ends = (low, high)
                    yield Row(self.name, metric, layer, view, found.value, *ends, int(s["n"][i]))


def _shift(
    moved: Float[Tensor, "*sets d_model"],
    within: Float[Tensor, "*sets"],
    changes: Float[Tensor, "*sets"],
    sizes: Float[Tensor, "*sets"],
    n: Float[Tensor, "*sets"],
    nn: Float[Tensor, "*sets"],
) -> dict[str, Float[Tensor, "*sets"]]:
    """Both metrics; where nothing moved at all, both are 0.

    Args:
        moved, within: as `MeanShift` keeps them.
        changes, sizes: sums of ‖h' - h‖² and ‖h‖².
        n, nn: the number of tokens, and the sum over texts of its square.
    """
    of_mean = (moved.square().sum(-1) - within) / (n.square() - nn)
    change, size = changes / n, sizes / n
    share = torch.where(change == 0, change, of_mean / change)
    length = of_mean.abs().sqrt() * of_mean.sign()
    return {"share": share, "relative_l2": torch.where(change == 0, change, length / size.sqrt())}
