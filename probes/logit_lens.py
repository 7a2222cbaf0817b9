"""What each layer would predict if the model ended there, and how tuning changed that."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .. import stats
from ..intervals import mean_half_width, quantile_interval
from ..results import ProbeResult, Row
from ..streams import LogitRows, StreamPair, StreamSpec, TokenSet, View
from .means import MeanProbe


class LogitLens(MeanProbe):
    """Each model's own final norm, unembedding and soft cap, read at every layer.

    Metrics:
        top1_agreement: share of tokens where both lenses name the same winner.
        kl: KL(tuned ‖ base) of the two lenses, nats.
        base_entropy, tuned_entropy: nats.
        median_base_rank: median rank, in the base lens of this layer, of the token that the
            tuned model finally puts first; one-based.
    """

    name = "logit_lens"
    metrics = ("top1_agreement", "kl", "base_entropy", "tuned_entropy")
    views = ("final_norm",)
    token_set: TokenSet = "decisions"
    bounds = {
        "top1_agreement": (0.0, 1.0),
        "kl": (0.0, float("inf")),
        "base_entropy": (0.0, float("inf")),
        "tuned_entropy": (0.0, float("inf")),
    }

    def sum_shapes(self, spec: StreamSpec) -> dict[str, tuple[int, ...]]:
        """The means' sums, and the counts of every base rank with their spread over sequences."""
        n_layers = len(spec.resolve_layers(self.layers))
        edges = (n_layers, len(rank_edges(spec.d_vocab)))
        return {
            **super().sum_shapes(spec),
            "rank_counts": (n_layers, spec.d_vocab),
            "below_yy": edges,
            "below_yn": edges,
        }

    def update(self, pair: StreamPair) -> None:
        """Read the lens at every layer, a few rows of logits at a time."""
        output = pair.n_layers
        if output not in self.spec.resolve_layers(self.layers):
            self._winners = torch.cat(pair.read_logits(output, _tuned_winners))
        super().update(pair)
        del self._winners

    def measure(self, pair: StreamPair, layer: int, view: View) -> dict[str, Float[Tensor, " n"]]:
        """Agreement, divergence and entropies of the two lenses; counts ranks on the way."""
        # At the output, which is read first, the tuned lens's winner is the final one.
        final = None if layer == pair.n_layers else self._winners
        parts = pair.read_logits(layer, partial(_read_lenses, final=final))
        measured = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        winner = measured.pop("winner")
        if layer == pair.n_layers:
            self._winners = winner
        self._count_ranks(pair, layer, measured.pop("rank"))
        return measured

    def _count_ranks(self, pair: StreamPair, layer: int, rank: Int[Tensor, " n"]) -> None:
        i = self.spec.resolve_layers(self.layers).index(layer)
        counts = torch.bincount(rank - 1, minlength=self.spec.d_vocab)
        self.sums["rank_counts"][i] += counts
        n = pair.mask(layer, self.token_set).sum(-1).to(rank.device, torch.float64)
        for k, edge in enumerate(rank_edges(self.spec.d_vocab)):
            below = pair.per_sequence((rank <= edge).double(), layer, self.token_set)
            self.sums["below_yy"][i, k] += below.square().sum()
            self.sums["below_yn"][i, k] += (below * n).sum()

    def compute(self) -> ProbeResult:
        """The means' rows and the median rank's."""
        layers = self.spec.resolve_layers(self.layers)
        medians = [self._median_row(i, layer) for i, layer in enumerate(layers)]
        return ProbeResult((*self._rows(), *medians))

    def _median_row(self, i: int, layer: int) -> Row:
        names = ("rank_counts", "below_yy", "below_yn", "n", "nn", "sequences")
        s = {name: self.sums[name][i].cpu() for name in names}
        edges = torch.tensor(rank_edges(self.spec.d_vocab))
        share = s["rank_counts"].cumsum(0)[edges - 1] / s["n"]
        half = mean_half_width(
            float(s["sequences"]), share, s["n"], s["below_yy"], s["below_yn"], s["nn"]
        )
        nearest = int((share - 0.5).abs().nan_to_num(1.0).argmin())
        ends = quantile_interval(s["rank_counts"], float(half[nearest]))
        return Row(self.name, "median_base_rank", layer, "final_norm", *ends, int(s["n"]))


def _tuned_winners(rows_of_logits: Iterator[LogitRows]) -> Int[Tensor, " n"]:
    return torch.cat([stats.winner(tuned) for _, _, tuned in rows_of_logits])


def _read_lenses(
    rows_of_logits: Iterator[LogitRows], final: Int[Tensor, " n"] | None
) -> dict[str, Tensor]:
    """The comparison of two lenses and the base rank of the final winner, token by token.

    `final` is the tuned model's final winner of every token; None where this lens decides it.
    """
    parts: dict[str, list[Tensor]] = {name: [] for name in (*LogitLens.metrics, "winner", "rank")}
    work: Tensor | None = None
    for rows, base, tuned in rows_of_logits:
        work = torch.empty_like(base) if work is None else work[: len(base)]
        target = stats.winner(tuned) if final is None else final[rows]
        parts["rank"].append(stats.rank_of(base, target, work))
        seen = stats.compare_logits_(base, tuned, work)
        parts["winner"].append(seen.tuned_winner)
        parts["top1_agreement"].append((seen.base_winner == seen.tuned_winner).double())
        parts["kl"].append(seen.kl)
        parts["base_entropy"].append(seen.base_entropy)
        parts["tuned_entropy"].append(seen.tuned_entropy)
    return {name: torch.cat(values) for name, values in parts.items()}


def rank_edges(d_vocab: int) -> list[int]:
    """Ranks 1, 2, 4, ... up to the vocabulary: where the share of smaller ranks is tracked."""
    return [2**k for k in range(d_vocab.bit_length()) if 2**k <= d_vocab]
