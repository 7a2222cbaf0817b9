"""How variance is spread over directions, and changes of it: pure maths in float64, no models.

A change works along the axes of an orthonormal basis: x ↦ x + Σᵢ (gᵢ - 1) aᵢ aᵢᵀ (x - mean). With
every gain gᵢ = 1 it is exactly the identity; a gain of 0 removes an axis. Such maps are symmetric,
so a covariance C becomes A C A with A = Σᵢ gᵢ aᵢ aᵢᵀ.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

# An axis with less than this share of the largest axis's variance has none to be scaled.
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


def seen_along(
    covariance: Float[Tensor, "d d"], basis: Float[Tensor, "d d"]
) -> Float[Tensor, "d d"]:
    """A covariance in the coordinates of a basis; its diagonal is the variance along each axis."""
    return basis.mT @ covariance @ basis


def participation(seen: Float[Tensor, "d d"], gain: Float[Tensor, " d"] | None = None) -> float:
    """tr(C)² / ‖C‖² of a covariance, or of what it becomes under these gains along its coordinates.

    How many axes share the variance; naive, not corrected for few vectors. NaN without variance.
    """
    power = torch.ones(len(seen), dtype=seen.dtype) if gain is None else gain.square()
    squares = float(power @ seen.square() @ power)
    return float(power @ seen.diagonal()) ** 2 / squares if squares > 0 else float("nan")


def keeping(first: int, d: int) -> Float[Tensor, " d"]:
    """Gains that keep the first axes and remove the others."""
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
    enough = variance > EMPTY * variance.max()
    root = torch.where(enough, variance, 0.0).sqrt()
    half = (basis * root) @ basis.mT
    inverse = (basis * torch.where(enough, 1 / torch.where(enough, root, 1.0), 0.0)) @ basis.mT
    values, vectors = principal(half @ wanted @ half)
    map_ = inverse @ ((vectors * values.sqrt()) @ vectors.mT) @ inverse
    # Where there is no variance to move, nothing is done.
    rest = basis[:, ~enough]
    return principal(map_ + rest @ rest.mT)


def dealt(
    gain: Float[Tensor, " d"], variance: Float[Tensor, " d"], seed: int
) -> Float[Tensor, " d"]:
    """The same gains dealt to other axes at random, all scaled so that as much variance is left.

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
    """An orthonormal basis drawn evenly from all there are (Haar measure)."""
    generator = torch.Generator().manual_seed(seed)
    q, r = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))
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
    left = _ratios_of_first(seen.flip(0, 1)).flip(0)
    fitting = (left[: most + 1] <= wanted).nonzero()
    return int(fitting.min()) if len(fitting) else None


def _ratios_of_first(seen: Float[Tensor, "d d"]) -> Float[Tensor, " d"]:
    """The participation ratio within the first 1, 2, ... d coordinates."""
    squares = seen.square().cumsum(0).cumsum(1).diagonal()
    return seen.diagonal().cumsum(0) ** 2 / squares
