"""How alike two sets of vectors of the same tokens are, from streamed moments of both.

Linear CKA (Kornblith et al. 2019) and the Procrustes distance (Williams et al. 2021) compare
shapes: neither changes where one set is turned, moved or scaled as a whole. Sums are taken about
an origin near each set, as in `moments`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class CrossMoments:
    """Sums over n pairs of vectors x, y about an origin of each, float64.

    Attributes:
        n: number of pairs.
        total_x, total_y: Σx and Σy.
        outer: Σxyᵀ.
        square_x, square_y: Σ|x|² and Σ|y|².
        squares: Σ|x|²|y|².
        cubic_x, cubic_y: Σx|y|² and Σy|x|².
    """

    n: Float[Tensor, "*sets"]
    total_x: Float[Tensor, "*sets d"]
    total_y: Float[Tensor, "*sets d"]
    outer: Float[Tensor, "*sets d d"]
    square_x: Float[Tensor, "*sets"]
    square_y: Float[Tensor, "*sets"]
    squares: Float[Tensor, "*sets"]
    cubic_x: Float[Tensor, "*sets d"]
    cubic_y: Float[Tensor, "*sets d"]

    def shifted(self, a: Float[Tensor, "*sets d"], b: Float[Tensor, "*sets d"]) -> CrossMoments:
        """The sums after adding `a` to each x and `b` to each y, multiplied out."""
        n, aa, bb = self.n, _dot(a, a), _dot(b, b)
        ax, by = _dot(a, self.total_x), _dot(b, self.total_y)
        pushed_x = einsum(self.outer, b, "... i j, ... j -> ... i")  # Σx(y·b)
        pushed_y = einsum(self.outer, a, "... i j, ... i -> ... j")  # Σy(x·a)
        square_y = self.square_y + 2 * by + n * bb
        square_x = self.square_x + 2 * ax + n * aa
        return CrossMoments(
            n=n,
            total_x=self.total_x + n[..., None] * a,
            total_y=self.total_y + n[..., None] * b,
            outer=self.outer
            + _outer(a, self.total_y)
            + _outer(self.total_x, b)
            + n[..., None, None] * _outer(a, b),
            square_x=square_x,
            square_y=square_y,
            squares=self.squares
            + 2 * _dot(b, self.cubic_y)
            + 2 * _dot(a, self.cubic_x)
            + 4 * _dot(a, pushed_x)
            + bb * (self.square_x + 2 * ax)
            + aa * (self.square_y + 2 * by)
            + n * aa * bb,
            cubic_x=self.cubic_x
            + 2 * pushed_x
            + bb[..., None] * self.total_x
            + square_y[..., None] * a,
            cubic_y=self.cubic_y
            + 2 * pushed_y
            + aa[..., None] * self.total_y
            + square_x[..., None] * b,
        )


def cross_moments(x: Float[Tensor, "n d"], y: Float[Tensor, "n d"]) -> CrossMoments:
    """Moments of the rows of two matrices of the same tokens, about 0.

    >>> m = cross_moments(torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [1.0]]))
    >>> float(m.outer), float(m.squares), float(m.cubic_x)
    (5.0, 13.0, 11.0)
    """
    x, y = x.double(), y.double()
    xx, yy = x.square().sum(-1), y.square().sum(-1)
    return CrossMoments(
        n=torch.tensor(float(len(x)), dtype=torch.float64, device=x.device),
        total_x=x.sum(0),
        total_y=y.sum(0),
        outer=x.T @ y,
        square_x=xx.sum(),
        square_y=yy.sum(),
        squares=xx @ yy,
        cubic_x=yy @ x,
        cubic_y=xx @ y,
    )


def unbiased_hsic(m: CrossMoments) -> Float[Tensor, "*sets"]:
    """The unbiased estimate of HSIC with linear kernels (Song et al. 2012), from moments.

    A kernel's diagonal, a token with itself, is left out: with it, two independent sets of a few
    tokens seem alike. NaN below four tokens.
    """
    n = m.n
    pairs_x = _dot(m.total_x, m.total_x) - m.square_x
    pairs_y = _dot(m.total_y, m.total_y) - m.square_y
    both = m.outer.square().sum((-1, -2)) - m.squares
    along = einsum(m.total_x, m.outer, m.total_y, "... i, ... i j, ... j -> ...")
    rows = along - _dot(m.total_x, m.cubic_x) - _dot(m.total_y, m.cubic_y) + m.squares
    found = both + pairs_x * pairs_y / ((n - 1) * (n - 2)) - 2 * rows / (n - 2)
    return torch.where(n >= 4, found / (n * (n - 3)), torch.nan)


def procrustes_cosine(m: CrossMoments) -> Float[Tensor, "*sets"]:
    """‖XᵀY‖_* / (‖X‖ ‖Y‖) of the centred sets: the mean cosine after the best rotation of one.

    In [0, 1]; 1 if one is the other turned, moved and scaled.
    """
    n = m.n[..., None, None]
    centred = m.outer - _outer(m.total_x, m.total_y) / n
    size_x = m.square_x - _dot(m.total_x, m.total_x) / m.n
    size_y = m.square_y - _dot(m.total_y, m.total_y) / m.n
    is_known = torch.isfinite(centred).all(-1).all(-1)
    values = torch.linalg.svdvals(torch.where(is_known[..., None, None], centred, 0.0))
    return torch.where(is_known, values.sum(-1) / (size_x * size_y).sqrt(), torch.nan)


def _dot(a: Float[Tensor, "*sets d"], b: Float[Tensor, "*sets d"]) -> Float[Tensor, "*sets"]:
    return (a * b).sum(-1)


def _outer(a: Float[Tensor, "*sets d"], b: Float[Tensor, "*sets d"]) -> Float[Tensor, "*sets d d"]:
    return a[..., :, None] * b[..., None, :]
