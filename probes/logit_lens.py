"""What each layer would predict if the model ended there, and how tuning changed that."""

from __future__ import annotations

from collections import defaultdict

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .. import stats
from ..intervals import mean_half_width, quantile_interval
from ..results import ProbeResult, Row
from ..streams import StreamPair, StreamSpec, TokenSet, View
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
            self._winners = torch.cat([stats.winner(t) for _, _, t in pair.logits(output)])
        super().update(pair)
        del self._winners

    def measure(self, pair: StreamPair, layer: int, view: View) -> dict[str, Float[Tensor, " n"]]:
        """Agreement, divergence and entropies of the two lenses; counts ranks on the way."""
        parts: dict[str, list[Tensor]] = defaultdict(list)
        work: Tensor | None = None
        for rows, base, tuned in pair.logits(layer):
            work = torch.empty_like(base) if work is None else work[: len(base)]
            # At the output, which is read first, the tuned lens's winner is the final one.
            final = stats.winner(tuned) if layer == pair.n_layers else self._winners[rows]
            parts["rank"].append(stats.rank_of(base, final, work))
            seen = stats.compare_logits_(base, tuned, work)
            parts["winner"].append(seen.tuned_winner)
            parts["top1_agreement"].append((seen.base_winner == seen.tuned_winner).double())
            parts["kl"].append(seen.kl)
            parts["base_entropy"].append(seen.base_entropy)
            parts["tuned_entropy"].append(seen.tuned_entropy)
        measured = {name: torch.cat(values) for name, values in parts.items()}
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


def rank_edges(d_vocab: int) -> list[int]:
    """Ranks 1, 2, 4, ... up to the vocabulary: where the share of smaller ranks is tracked."""
    return [2**k for k in range(d_vocab.bit_length()) if 2**k <= d_vocab]
