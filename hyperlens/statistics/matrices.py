"""What a change did to a matrix: spectra, rotated singular vectors, random changes; in float64."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from .spectrum import orthogonal


class Singular(NamedTuple):
    """A thin singular value decomposition: matrix = left · diag(values) · rightᵀ.

    Attributes:
        left: singular vectors of the rows' side as columns.
        values: largest first.
        right: singular vectors of the columns' side as columns.
    """

    left: Float[Tensor, "rows rank"]
    values: Float[Tensor, " rank"]
    right: Float[Tensor, "columns rank"]

    def first(self, k: int) -> Singular:
        """The k leading singular values and their vectors."""
        return Singular(self.left[:, :k], self.values[:k], self.right[:, :k])

    def matrix(self) -> Float[Tensor, "rows columns"]:
        """What was decomposed."""
        return (self.left * self.values) @ self.right.mT


def singular(matrix: Float[Tensor, "rows columns"]) -> Singular:
    """The singular value decomposition of a matrix, in float64."""
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    return Singular(left, values, right.mT)


def singular_of_product(
    out: Float[Tensor, "rows rank"], into: Float[Tensor, "rank columns"]
) -> Singular:
    """The same of out @ into, which is never formed: a QR of each factor and a small matrix."""
    first, second = torch.linalg.qr(out.double()), torch.linalg.qr(into.double().mT)
    small = singular(first.R @ second.R.mT)
    return Singular(first.Q @ small.left, small.values, second.Q @ small.right)


def effective_rank(values: Float[Tensor, " rank"]) -> float:
    """exp of the entropy of the normalised singular values (Roy & Vetterli 2007); 0 without any.

    >>> round(effective_rank(torch.tensor([2.0, 2.0, 2.0, 0.0])), 6)
    3.0
    """
    total = float(values.double().sum())
    if total == 0.0:
        return 0.0
    shares = values.double() / total
    return math.exp(float(torch.special.entr(shares).sum()))


def stable_rank(values: Float[Tensor, " rank"]) -> float:
    """Squared Frobenius norm over squared spectral norm; 0 without any value.

    >>> stable_rank(torch.tensor([2.0, 2.0, 1.0]))
    2.25
    """
    squares = values.double().square()
    largest = float(squares.max()) if len(squares) else 0.0
    return float(squares.sum()) / largest if largest > 0 else 0.0


def subspace_angles(
    first: Float[Tensor, "d k"], second: Float[Tensor, "d k"]
) -> Float[Tensor, " k"]:
    """Principal angles between the spans of two orthonormal sets of columns: degrees, ascending.

    >>> basis = torch.eye(3, dtype=torch.float64)
    >>> subspace_angles(basis[:, :2], basis[:, 1:]).tolist()
    [0.0, 90.0]
    """
    overlap = first.mT @ second
    cosines = torch.linalg.svdvals(overlap)
    # The cosine of a small angle is 1 to rounding; its sine still tells it (Björck & Golub 1973).
    sines = torch.linalg.svdvals(second - first @ overlap).flip(0)
    return torch.rad2deg(torch.atan2(sines, cosines))


def best_cosines(base: Float[Tensor, "d n"], tuned: Float[Tensor, "d k"]) -> Float[Tensor, " k"]:
    """Of each column of `tuned` the largest |cosine| with any column of `base`; all of length 1.

    >>> basis = torch.eye(3)
    >>> best_cosines(basis[:, :2], basis[:, 1:]).tolist()
    [1.0, 0.0]
    """
    return (base.mT @ tuned).abs().amax(0)


def random_change(change: Singular, generator: torch.Generator) -> Float[Tensor, "rows columns"]:
    """A matrix with the same singular values and uniformly random singular vectors.

    So it has the norm, the rank and the effective rank of the change, and none of its directions.
    """
    left, right = (_random_frame(side, generator) for side in (change.left, change.right))
    return Singular(left, change.values, right).matrix()


def _random_frame(like: Float[Tensor, "d k"], generator: torch.Generator) -> Float[Tensor, "d k"]:
    """Random orthonormal columns (Haar measure); drawn on the CPU, the same on every device."""
    normal = torch.randn(like.shape, generator=generator, dtype=torch.float64)
    return orthogonal(normal.to(like.device))


def rounding_error(matrix: Float[Tensor, "rows columns"], bits: int) -> float:
    """Frobenius norm of what rounding to so many bits changes: to nearest, each row by its largest.

    >>> rounding_error(torch.tensor([[7.0, 0.25]]), bits=4)
    0.25
    """
    values = matrix.double()
    step = values.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    step = torch.where(step == 0, 1.0, step)  # a row of zeros is exact
    return float((values - (values / step).round() * step).norm())
