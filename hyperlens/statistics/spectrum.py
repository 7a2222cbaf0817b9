"""How variance is spread over directions, and linear changes of it: pure maths in float64.

A change scales the axes aᵢ of an orthonormal basis about the mean,
x ↦ x + Σᵢ (gᵢ - 1) aᵢ aᵢᵀ (x - mean). With every gain gᵢ = 1 it is exactly the identity; a gain of
0 removes an axis. Such maps are symmetric, so a covariance C becomes A C A with A = Σᵢ gᵢ aᵢ aᵢᵀ.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

# An axis with less than this share of the largest axis's variance counts as having none: its
# square root would be rounding noise, and a ratio of two such numbers anything.
EMPTY = 1e-10


@dataclass(frozen=True)
class Cloud:
    """Mean and covariance (divisor n) of n vectors, float64."""

    n: int
    mean: Float[Tensor, " d"]
    covariance: Float[Tensor, "d d"]


class Axes(NamedTuple):
    """Eigenvalues, largest first, and their eigenvectors as columns."""

    values: Float[Tensor, " d"]
    basis: Float[Tensor, "d d"]


def principal(covariance: Float[Tensor, "d d"]) -> Axes:
    """The principal axes of a covariance; no value is below 0."""
    values, vectors = torch.linalg.eigh((covariance + covariance.mT) / 2)
    return Axes(values.flip(0).clamp_min(0.0), vectors.flip(1))


def new_axes(base: Float[Tensor, "d d"], tuned: Float[Tensor, "d d"]) -> Axes:
    """The axes along which the share of all variance has grown, most first; negative: shrunk.

    Shares, because a participation ratio does not depend on how much variance there is in all.
    """
    values, vectors = torch.linalg.eigh(tuned / tuned.trace() - base / base.trace())
    return Axes(values.flip(0), vectors.flip(1))


def in_basis(covariance: Float[Tensor, "d d"], basis: Float[Tensor, "d d"]) -> Float[Tensor, "d d"]:
    """A covariance in the coordinates of a basis; its diagonal is the variance along each axis."""
    return basis.mT @ covariance @ basis


def participation(seen: Float[Tensor, "d d"], gain: Float[Tensor, " d"] | None = None) -> float:
    """tr(C)² / ‖C‖² of a covariance, or of what it becomes under these gains along its coordinates.

    How many axes share the variance; naive, not corrected for few vectors. NaN without variance.

    Args:
        seen: a covariance in the coordinates of some basis.
        gain: of each coordinate; None for no change.

    >>> participation(torch.eye(4, dtype=torch.float64))
    4.0
    """
    # In these coordinates the change is diagonal, D = diag(gain): tr(DCD) = Σ gᵢ² Cᵢᵢ, and
    # ‖DCD‖² = Σᵢⱼ gᵢ² Cᵢⱼ² gⱼ², without a matrix product.
    power = torch.ones(len(seen), dtype=seen.dtype) if gain is None else gain.square()
    squares = float(power @ seen.square() @ power)
    return float(power @ seen.diagonal()) ** 2 / squares if squares > 0 else float("nan")


def keeping(first: int, d: int) -> Float[Tensor, " d"]:
    """Gains that keep the first axes and remove the others.

    >>> keeping(1, 3).tolist()
    [1.0, 0.0, 0.0]
    """
    gain = torch.zeros(d, dtype=torch.float64)
    gain[:first] = 1.0
    return gain


def removing(first: int, d: int) -> Float[Tensor, " d"]:
    """Gains that remove the first axes and keep the others."""
    return 1.0 - keeping(first, d)


def removing_variance(variance: Float[Tensor, " d"], total: float) -> Float[Tensor, " d"]:
    """Gains that remove axes one after another, the last one partly, until `total` is gone.

    Args:
        variance: along each axis; what a gain g leaves of v is g² v.
        total: how much to remove, at most all.
    """
    # What is left to remove when an axis's turn comes: total less the axes before it.
    left = (total - (variance.cumsum(0) - variance)).clamp_min(0.0)
    share = torch.where(variance > 0, left / variance, 0.0).clamp(0.0, 1.0)
    return (1.0 - share).sqrt()


def respaced(own: Float[Tensor, " d"], wanted: Float[Tensor, " d"]) -> Float[Tensor, " d"]:
    """Gains that turn the variances of axes into wanted ones; 1 where there is none to scale."""
    enough = own > EMPTY * own.max()
    return torch.where(enough, (wanted / torch.where(enough, own, 1.0)).sqrt(), 1.0)


def transport(own: Float[Tensor, "d d"], wanted: Float[Tensor, "d d"]) -> Axes:
    """The smallest linear change that turns one covariance into another: its axes, and their gains.

    The optimal transport map between Gaussians (Knott & Smith 1984; Peyré & Cuturi 2019, remark
    2.31): T = own^-½ (own^½ wanted own^½)^½ own^-½, on the axes along which `own` has variance.
    """
    variance, basis = principal(own)
    # own^½ and own^-½ as matrices, from the eigenvectors; the pseudo-inverse where there is no
    # variance.
    enough = variance > EMPTY * variance.max()
    root = torch.where(enough, variance, 0.0).sqrt()
    half = (basis * root) @ basis.mT
    inverse = (basis * torch.where(enough, 1 / torch.where(enough, root, 1.0), 0.0)) @ basis.mT
    values, vectors = principal(half @ wanted @ half)
    map_ = inverse @ ((vectors * values.sqrt()) @ vectors.mT) @ inverse
    # The identity on the axes without variance: nothing is done there.
    rest = basis[:, ~enough]
    return principal(map_ + rest @ rest.mT)


def shuffled_gains(
    gain: Float[Tensor, " d"], variance: Float[Tensor, " d"], seed: int
) -> Float[Tensor, " d"]:
    """The same gains in a random order, all scaled so that as much variance is left.

    Args:
        gain: of each axis.
        variance: along each axis, before.
        seed: of the order.
    """
    order = torch.randperm(len(gain), generator=torch.Generator().manual_seed(seed))
    new = gain[order]
    after, now = (gain.square() * variance).sum(), (new.square() * variance).sum()
    return new * (after / now).sqrt() if float(now) > 0 else new


def random_basis(d: int, seed: int) -> Float[Tensor, "d d"]:
    """A random orthonormal basis (Haar measure; Mezzadri 2007).

    >>> basis = random_basis(3, seed=0)
    >>> bool(torch.allclose(basis.mT @ basis, torch.eye(3, dtype=torch.float64)))
    True
    """
    generator = torch.Generator().manual_seed(seed)
    return orthogonal(torch.randn(d, d, generator=generator, dtype=torch.float64))


def orthogonal(normal: Float[Tensor, "d k"]) -> Float[Tensor, "d k"]:
    """Uniformly random orthonormal columns from a matrix of independent standard normal numbers."""
    q, r = torch.linalg.qr(normal)
    # The signs of Q depend on the algorithm; with a positive diagonal of R, Q is uniform.
    basis: Tensor = q * r.diagonal().sign()
    return basis


def most_kept(seen: Float[Tensor, "d d"], wanted: float) -> int:
    """How many first coordinates, 1 at least, may stay for a participation ratio of `wanted`."""
    fitting = (_ratios_of_first(seen) <= wanted).nonzero()
    return int(fitting.max()) + 1 if len(fitting) else 1


def fewest_removed(seen: Float[Tensor, "d d"], wanted: float, most: int) -> int | None:
    """How many first coordinates must go for a participation ratio of at most `wanted`.

    None if not even the removal of `most` brings it down.
    """
    # Reversed, the first coordinates of the flipped matrix are what is left after each removal.
    left = _ratios_of_first(seen.flip(0, 1)).flip(0)
    fitting = (left[: most + 1] <= wanted).nonzero()
    return int(fitting.min()) if len(fitting) else None


def _ratios_of_first(seen: Float[Tensor, "d d"]) -> Float[Tensor, " d"]:
    """The participation ratio within the first 1, 2, ... d coordinates."""
    # The squared norm of every leading block of the matrix, by two cumulative sums.
    squares = seen.square().cumsum(0).cumsum(1).diagonal()
    return seen.diagonal().cumsum(0) ** 2 / squares
