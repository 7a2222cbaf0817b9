"""The part of a logit change that is the same in every context (arXiv 2605.22579, section 3.5).

Logits are centred first, context by context: a shift of all of them changes nothing a model does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import LogitsProcessor

from ..errors import ProbeError
from ..passes.contexts import Contexts
from ..statistics.rank_correlation import average_ranks


class Shift(NamedTuple):
    """What tuning did to each token on average over contexts.

    Attributes:
        delta: mean shift of its centred logit.
        rank_gain: mean number of places it rose.
        static_share: share of the mean squared shift that all contexts have in common, 1 for a
            constant bias and about 0 for shifts that cancel out. The squared mean is estimated
            by the product of two halves of the texts, or noise would count as common to all; so
            it can be slightly negative.
    """

    delta: Float[Tensor, " d_vocab"]
    rank_gain: Float[Tensor, " d_vocab"]
    static_share: float


class LogitBias(LogitsProcessor):
    """Adds the same numbers to the logits at every step (z + αδ, equation 3 of the paper).

    It works in plain transformers: `model.generate(..., logits_processor=[LogitBias(bias)])`.

    Args:
        bias: one number per token.
    """

    def __init__(self, bias: Float[Tensor, " d_vocab"]) -> None:
        self.bias = bias

    def __call__(
        self, input_ids: Int[Tensor, "batch pos"], scores: Float[Tensor, "batch d_vocab"]
    ) -> Float[Tensor, "batch d_vocab"]:
        if scores.shape[-1] != len(self.bias):
            raise ProbeError(
                f"the bias has {len(self.bias)} tokens and the model {scores.shape[-1]}: make it "
                "for this model"
            )
        return scores + self.bias.to(scores)


def mean_shift(contexts: Contexts, progress: bool) -> Shift:
    """The mean shift from base to tuned over all contexts."""
    halves = torch.zeros(2, contexts.d_vocab, dtype=torch.float64)
    gain = torch.zeros_like(halves[0])
    counts, square = torch.zeros(2, dtype=torch.float64), 0.0
    for rows, base, tuned in contexts.rows("logit shift", progress):
        shift = centred(tuned) - centred(base)
        half = (contexts.text[rows] % 2).to(shift.device)
        halves += torch.stack([shift[half == i].sum(0) for i in (0, 1)]).cpu()
        counts += torch.bincount(half.cpu(), minlength=2)
        square += float(shift.square().sum())
        gain += (average_ranks(tuned).double() - average_ranks(base).double()).sum(0).cpu()
    n = counts.sum()
    product = float((halves[0] / counts[0]) @ (halves[1] / counts[1]))
    share = product / (square / float(n)) if square else float("nan")
    return Shift(halves.sum(0) / n, gain / n, share)


def centred(logits: Float[Tensor, "n d_vocab"]) -> Float[Tensor, "n d_vocab"]:
    """Each row minus its mean, in float64."""
    z = logits.to(torch.float64)
    return z - z.mean(-1, keepdim=True)


def promoted(
    rank_gain: Float[Tensor, " d_vocab"], allowed: Bool[Tensor, " d_vocab"], k: int
) -> Int[Tensor, " k"]:
    """The k allowed tokens that rose most, or all of them; ties in the order of their ids."""
    ids = allowed.nonzero()[:, 0]
    return ids[rank_gain[ids].sort(descending=True, stable=True).indices[:k]]


def biases(
    delta: Float[Tensor, " d_vocab"],
    chosen: Int[Tensor, " k"],
    allowed: Bool[Tensor, " d_vocab"],
    seed: int,
) -> dict[str, Float[Tensor, " d_vocab"]]:
    """The paper's bias and what it has to be held against.

    Returns:
        promoted: δ of the chosen tokens, 0 elsewhere.
        all: δ of every token: the most that a static bias could be.
        random: δ of as many tokens drawn from the allowed ones.
        shuffled: the δ of the chosen tokens, dealt out anew among them.
        constant: the mean of the chosen δ, the same for every token: no effect at all.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = allowed.nonzero()[:, 0]
    drawn = ids[torch.randperm(len(ids), generator=generator)[: len(chosen)]]
    dealt = chosen[torch.randperm(len(chosen), generator=generator)]
    return {
        "promoted": _only(chosen, delta[chosen], len(delta)),
        "all": delta,
        "random": _only(drawn, delta[drawn], len(delta)),
        "shuffled": _only(chosen, delta[dealt], len(delta)),
        "constant": torch.full_like(delta, float(delta[chosen].mean())),
    }


def _only(
    ids: Int[Tensor, " k"], values: Float[Tensor, " k"], d_vocab: int
) -> Float[Tensor, " d_vocab"]:
    return torch.zeros(d_vocab, dtype=values.dtype).index_copy(0, ids, values)


def check_alphas(alphas: Any) -> tuple[float, ...]:
    """Strengths of a bias, in order.

    Raises:
        ProbeError: if there is none, or one is 0, repeated or no finite number.
    """
    try:
        given = [float(alpha) for alpha in alphas]
    except (TypeError, ValueError):
        given = []
    found = sorted(set(given))
    if len(found) != len(given) or not found or 0.0 in found or not _finite(found):
        raise ProbeError(
            "alphas must be different finite numbers other than 0 (the base itself is always "
            f"measured), got {alphas}"
        )
    return tuple(found)


def _finite(values: Sequence[float]) -> bool:
    return bool(torch.isfinite(torch.tensor(values)).all())
