"""What each layer would predict if the model ended there, and how tuning changed that."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from ..passes.logits_reader import LogitChunk, reads_sample
from ..passes.streams import StreamPair, StreamSpec
from ..results.rows import ProbeResult, Row
from ..statistics import distances
from ..statistics.intervals import mean_half_width, quantile_interval
from .base import LogitProbe

# Logits are compared in blocks of this many, which a processor's cache holds a few times over.
CACHED_LOGITS = 2**19

LENS_METRICS = ("top1_agreement", "kl", "base_entropy", "tuned_entropy")
LENS_BOUNDS = {
    "top1_agreement": (0.0, 1.0),
    "kl": (0.0, float("inf")),
    "base_entropy": (0.0, float("inf")),
    "tuned_entropy": (0.0, float("inf")),
}


class LogitLens(LogitProbe):
    """Each model's own final norm, unembedding and soft cap, read at every layer.

    Metrics:
        top1_agreement: share of tokens where both lenses name the same winner.
        kl: KL(tuned ‖ base) of the two lenses, nats.
        base_entropy, tuned_entropy: nats.
        median_base_rank: median rank, in the base lens of this layer, of the token that the
            tuned model finally puts first; one-based.
    """

    name = "logit_lens"
    metrics = LENS_METRICS
    overwrites = True
    samples = True
    bounds = LENS_BOUNDS

    def sum_shapes(self, spec: StreamSpec) -> dict[str, tuple[int, ...]]:
        """The means' sums, and the counts of every base rank with their spread over sequences."""
        n_layers = len(spec.resolve_layers(self.layers))
        edges = (n_layers, len(rank_edges(spec.d_vocab)))
        return {
            **super().sum_shapes(spec),
            "rank_counts": (n_layers, spec.d_vocab),
            "below_yy": edges,
            "below_yn": edges,
            # Groups are read in several batches: squares are taken when all of each has been read.
            "below": (n_layers, spec.n_sampled_sequences if spec.grouped else 0, edges[1]),
        }

    def read(self, chunk: LogitChunk) -> dict[str, Shaped[Tensor, " chunk"]]:
        """Agreement, divergence, entropies and the final winner's rank, overwriting the logits."""
        return read_lenses(chunk)

    def finish(self, pair: StreamPair, layer: int, numbers: Mapping[str, Tensor]) -> None:
        """Add the means, and count the ranks."""
        super().finish(pair, layer, numbers)
        self._count_ranks(pair, layer, numbers["rank"])

    def _count_ranks(self, pair: StreamPair, layer: int, rank: Int[Tensor, " n"]) -> None:
        i = self.spec.resolve_layers(self.layers).index(layer)
        sampled = reads_sample(pair, self, layer)
        read = replace(pair, chosen=pair.lens) if sampled else pair
        edges = torch.tensor(rank_edges(self.spec.d_vocab), device=rank.device)
        sequence = read.index(layer, self.token_set).to(rank.device) // pair.tokens.shape[1]
        # Texts of one length are scaled alike, and counts are added up in a fixed order.
        scale = pair.lens_scale() if sampled else None
        for one in [1.0] if scale is None else sorted({*scale.tolist()}):
            of_these = rank if scale is None else rank[scale[sequence] == one]
            counts = torch.bincount(of_these - 1, minlength=self.spec.d_vocab)
            self.sums["rank_counts"][i].add_(counts.double(), alpha=one)
        bins = len(edges) + 1  # the last one for ranks above every edge
        place = sequence * bins + torch.bucketize(rank, edges)
        found = torch.bincount(place, minlength=pair.n_sequences * bins).view(-1, bins)
        below = found[:, :-1].cumsum(-1).double()
        n = found.sum(-1, keepdim=True).double()
        if scale is not None:
            below, n = below * scale[:, None], n * scale[:, None]
        self.sums["below_yy"][i] += below.square().sum(0)
        self.sums["below_yn"][i] += (below * n).sum(0)
        if self.spec.grouped:
            slot = pair.sample.slot.to(below.device)
            self.sums["below"][i].index_add_(0, slot, below)

    def compute(self) -> ProbeResult:
        """The means' rows and the median rank's."""
        layers = self.spec.resolve_layers(self.layers)
        medians = [self._median_row(i, layer) for i, layer in enumerate(layers)]
        return ProbeResult((*self._rows(), *medians))

    def _median_row(self, i: int, layer: int) -> Row:
        of_means = ("n", "nn", "read", "sequences", "sampled_n")
        names = ("rank_counts", "below_yy", "below_yn", "below", *of_means)
        s = {name: self.sums[name][i].cpu() for name in names}
        edges = torch.tensor(rank_edges(self.spec.d_vocab))
        share = s["rank_counts"].cumsum(0)[edges - 1] / s["n"]
        if self.spec.grouped:
            y, n = s["below"], s["sampled_n"][:, None]
            squares = (y.square().sum(0), (y * n).sum(0), n.square().sum())
            n_units = float((n > 0).sum())
        else:
            squares, n_units = (s["below_yy"], s["below_yn"], s["nn"]), float(s["sequences"])
        half = mean_half_width(n_units, share, s["n"], *squares)
        nearest = int((share - 0.5).abs().nan_to_num(1.0).argmin())
        width, below = float(half[nearest]), float(share[nearest])
        if 0 < below < 1:  # scaled from the spread of that share to that of one half
            width *= 0.5 / math.sqrt(below * (1 - below))
        ends = quantile_interval(s["rank_counts"], width)
        return Row(self.name, "median_base_rank", layer, "final_norm", *ends, int(s["read"]))


def read_lenses(chunk: LogitChunk) -> dict[str, Shaped[Tensor, " chunk"]]:
    """Agreement, divergence, entropies and the final winner's rank, overwriting the logits."""
    read = _read_same if chunk.same else _read_block
    blocks = [read(*block) for block in _blocks(chunk)]
    return {name: torch.cat([block[name] for block in blocks]) for name in blocks[0]}


def _blocks(chunk: LogitChunk) -> Iterator[tuple[Tensor, ...]]:
    """Base, tuned and final of a few rows: what is made of them stays in the processor's cache."""
    n, d_vocab = chunk.base.shape
    rows = CACHED_LOGITS // d_vocab if chunk.base.device.type == "cpu" else n
    parts = (torch.split(x, max(rows, 1)) for x in (chunk.base, chunk.tuned, chunk.final))
    return zip(*parts, strict=True)


def _read_block(
    base: Float[Tensor, "rows d_vocab"],
    tuned: Float[Tensor, "rows d_vocab"],
    final: Int[Tensor, " rows"],
) -> dict[str, Shaped[Tensor, " rows"]]:
    rank = distances.rank_of(base, final)
    seen = distances.compare_logits_(base, tuned)
    return {
        "rank": rank,
        "top1_agreement": (seen.base_winner == seen.tuned_winner).double(),
        "kl": seen.kl,
        "base_entropy": seen.base_entropy,
        "tuned_entropy": seen.tuned_entropy,
    }


def _read_same(
    base: Float[Tensor, "rows d_vocab"],
    tuned: Float[Tensor, "rows d_vocab"],
    final: Int[Tensor, " rows"],
) -> dict[str, Shaped[Tensor, " rows"]]:
    """What `_read_block` says of two equal rows, from one of them."""
    rank = distances.rank_of(base, final)
    _, entropy = distances.describe_logits_(base)
    agreement, kl = torch.ones_like(entropy), torch.zeros_like(entropy)
    return {
        "rank": rank,
        "top1_agreement": agreement,
        "kl": kl,
        "base_entropy": entropy,
        "tuned_entropy": entropy,
    }


def rank_edges(d_vocab: int) -> list[int]:
    """Ranks 1, 2, 4, ... up to the vocabulary: where the share of smaller ranks is tracked."""
    return [2**k for k in range(d_vocab.bit_length()) if 2**k <= d_vocab]
