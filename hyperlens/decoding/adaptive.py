"""How hard contrastive search looks: fixed, or by the model's uncertainty at every step.

Pure arithmetic on the next token's probabilities; the search itself is in `contrastive`.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..errors import DecodingError
from .settings import check_positive, check_whole

LOWEST_K, RANGE_OF_K = 5, 10


@runtime_checkable
class Strength(Protocol):
    """Tells k and α at every step of one batch of texts. It may remember steps: one per batch."""

    def __call__(
        self, p: Float[Tensor, "rows d_vocab"]
    ) -> tuple[Int[Tensor, " rows"], Float[Tensor, " rows"]]:
        """How many candidates each text has (1 to d_vocab), and the weight of the penalty."""

    def keep(self, rows: Int[Tensor, " kept"]) -> None:
        """Go on with these texts only."""


class Fixed:
    """The same k and α at every step (Su et al. 2022, arXiv 2202.06417).

    Raises:
        DecodingError: if k is below 1 or α outside 0 to 1.
    """

    def __init__(self, k: int, alpha: float) -> None:
        check_whole("k", k, 1)
        if not 0 <= alpha <= 1:
            raise DecodingError(f"alpha must be from 0 to 1, got {alpha}")
        self.k, self.alpha = k, alpha

    def __call__(
        self, p: Float[Tensor, "rows d_vocab"]
    ) -> tuple[Int[Tensor, " rows"], Float[Tensor, " rows"]]:
        """k, or the whole vocabulary where that is smaller, and α."""
        k = torch.full((len(p),), min(self.k, p.shape[-1]), device=p.device)
        return k, torch.full_like(p[:, 0], self.alpha)

    def keep(self, rows: Int[Tensor, " kept"]) -> None:
        """Nothing is remembered."""


class Adaptive:
    """k and α by how uncertain the model is (Garces Arias et al. 2024, arXiv 2407.18698).

    Both grow with the entropy of the next token compared with the median of the earlier steps:
    k with that of the whole distribution, α with that of its k most likely tokens. At the first
    step, which has nothing before it, k is 10 and α 1/2. The authors' code rounds α to two
    decimals, which their paper does not; here it is not rounded.

    Args:
        q: how steeply they grow; the authors' value is 1.

    Raises:
        DecodingError: if q is no positive number.
    """

    def __init__(self, q: float = 1.0) -> None:
        check_positive("q", q)
        self.q = q
        self._whole: list[Tensor] = []
        self._top: list[Tensor] = []

    def __call__(
        self, p: Float[Tensor, "rows d_vocab"]
    ) -> tuple[Int[Tensor, " rows"], Float[Tensor, " rows"]]:
        """k (5 to 15, or the whole vocabulary where that is smaller) and α (0 to 1)."""
        d_vocab = p.shape[-1]
        share = self._share(_entropy(p), self._whole, torch.full_like(p[:, 0], d_vocab))
        k = (LOWEST_K + RANGE_OF_K * share).round().long().clamp(max=d_vocab)
        ordered = p.sort(-1, descending=True).values
        top = torch.where(torch.arange(d_vocab, device=p.device) < k[:, None], ordered, 0.0)
        alpha = self._share(_entropy(top / top.sum(-1, keepdim=True)), self._top, k.to(p))
        return k, alpha

    def keep(self, rows: Int[Tensor, " kept"]) -> None:
        """Forget the other texts' entropies."""
        self._whole = [entropies[rows] for entropies in self._whole]
        self._top = [entropies[rows] for entropies in self._top]

    def _share(self, now: Tensor, earlier: list[Tensor], size: Tensor) -> Tensor:
        """σ(q · atanh of the gap to the median, as a share of log size); `now` is remembered."""
        usual = _median(torch.stack(earlier)) if earlier else now
        earlier.append(now)
        # A vocabulary of one token has no entropy to be a share of.
        gap = (now - usual) / size.log().clamp_min(torch.finfo(now.dtype).tiny)
        return torch.sigmoid(self.q * torch.atanh(gap.clamp(-1, 1)))


def _entropy(p: Float[Tensor, "rows n"]) -> Float[Tensor, " rows"]:
    """In nats; 0 · log 0 is 0."""
    found: Tensor = torch.special.entr(p).sum(-1)
    return found


def _median(values: Float[Tensor, "t rows"]) -> Float[Tensor, " rows"]:
    """Over steps; the mean of the middle two of an even number (torch's is the lower one)."""
    ordered = values.sort(0).values
    count = len(values)
    return (ordered[(count - 1) // 2] + ordered[count // 2]) / 2
