"""Every method that takes an expansion away or brings it about, at every size, with its controls.

A method changes the outputs of one model's last block about their mean, along the axes of a basis.
Controls do as much along axes that mean nothing: a random subspace of the same dimension; random
axes with the same variance, the last one partly, so that it is exact; or the same gains in a random
order on the same axes, with the same total variance afterwards. One method puts the tuned model's
own coordinates into the base: its controls put in as much of the change between the models along
random axes at right angles to those (or all of it, where there is less), or the same coordinates
along random axes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ...statistics.moments import in_full_float32
from ...statistics.spectrum import (
    EMPTY,
    Axes,
    Cloud,
    fewest_removed,
    in_basis,
    keeping,
    most_kept,
    new_axes,
    participation,
    principal,
    random_basis,
    removing,
    removing_variance,
    respaced,
    shuffled_gains,
    transport,
)
from ..outcomes import Side

REMOVING = ("base_directions", "new_directions", "base_spectrum", "expanding_directions")
ADDING = ("tuned_spectrum", "tuned_covariance", "tuned_coordinates")
METHODS = (*REMOVING, *ADDING)
BY_DIRECTIONS = ("base_directions", "new_directions", "expanding_directions", "tuned_coordinates")
"""The methods. Of the tuned model: its outputs projected onto the base's first principal axes
(`n_directions` are kept); rid of the axes along which its variance has grown most (`n_directions`
of them); its own axes with the base's spectrum; its variance set back to the base's along the axes
whose growth raises the dimension. Of the base model: its own axes with the tuned model's spectrum;
the tuned model's covariance as a whole; the tuned model's own coordinates, token by token, along
the axes whose growth raises the dimension."""

DECIDING = ("base_spectrum", "expanding_directions", "tuned_spectrum", "tuned_coordinates")
"""Methods that a verdict rests on. The others take along what does not expand (directions that
grew without raising the dimension, the whole covariance), and are shown as evidence only."""

SINGLE, AFFINE = "single_direction", "affine_map"
"""Neither is judged as a method. `SINGLE` sets one of the axes that grew most back to the base's
variance (`n_directions`: which one). `AFFINE` makes of the base's outputs the best affine
prediction of the tuned model's: as far as a change of the base's spectrum can be expected to get.
"""
N_SINGLE = 8
# A participation ratio that falls by a smaller share than this has not fallen.
ROUNDING = 1e-9

ITSELF = "itself"
VARIANCE_CONTROL = {
    method: "same_variance" if method in BY_DIRECTIONS else "shuffled_gains" for method in METHODS
}
"""The control that changes as much variance as a method does: what a verdict rests on."""


class Cell(NamedTuple):
    """One change.

    Attributes:
        method: one of `METHODS`, `SINGLE` or `AFFINE`.
        n_directions: how many are kept, removed or put in; 0 for changes of the whole spectrum.
        condition: "itself", or the name of a control.
        draw: the random draw of a control, from 0; -1 for the method itself.
    """

    method: str
    n_directions: int
    condition: str
    draw: int

    @property
    def side(self) -> Side:
        """Whose outputs are changed."""
        return side_of(self.method)


class Along(NamedTuple):
    """A change: the name of a basis, and the gain of each of its axes.

    Where `into` names a basis too, the change is no scaling: the difference between the tuned
    model's coordinates and the base's, times these gains, is added along the axes of `into`.
    """

    basis: str
    gain: Float[Tensor, " d_model"]
    into: str | None = None


class Joint(NamedTuple):
    """Both models' outputs at the same tokens; `cross`: covariance of the base's with the tuned."""

    base: Cloud
    tuned: Cloud
    cross: Float[Tensor, "d_model d_model"]

    def of(self, side: Side) -> Cloud:
        """One model's."""
        return self.base if side == "base" else self.tuned


class Spread(NamedTuple):
    """Participation ratio of changed outputs, and the share of the variance that is left."""

    dimension: float
    variance: float


@dataclass(frozen=True)
class Plan:
    """All changes of a pair.

    Attributes:
        bases: orthonormal bases by name, float64; many changes share one.
        changes: what each cell does.
        matched: per method of `BY_DIRECTIONS`, the number of directions that is judged: the one
            that just brings the participation ratio down to the base model's, or that of the axes
            whose growth raises it; None if there is none.
        affine: the best linear map from the base's outputs to the tuned model's, about the means.
        empty: per model, how many axes have too little variance to be scaled.
    """

    bases: dict[str, Float[Tensor, "d_model d_model"]]
    changes: dict[Cell, Along]
    matched: dict[str, int | None]
    affine: Float[Tensor, "d_model d_model"]
    empty: dict[str, int]

    def spread(self, outputs: Joint) -> dict[Cell, Spread]:
        """What every change leaves of some outputs: exact, because a change is affine."""
        seen: dict[tuple[Side, str], list[Cell]] = {}
        found = {}
        for cell, along in self.changes.items():
            if along.into is None:
                seen.setdefault((cell.side, along.basis), []).append(cell)
            else:
                into = self.bases[along.into]
                found[cell] = _put_in(outputs, (into * along.gain) @ self.bases[along.basis].mT)
        for (side, basis), cells in seen.items():
            covariance = in_basis(outputs.of(side).covariance, self.bases[basis])
            for cell in cells:
                gain = self.changes[cell].gain
                left = float(gain.square() @ covariance.diagonal()) / float(covariance.trace())
                found[cell] = Spread(participation(covariance, gain), left)
        return found

    def sizes(self, method: str) -> list[int]:
        """The numbers of directions of a method, in order."""
        return sorted({cell.n_directions for cell in self.changes if cell.method == method})

    def judged(self, method: str) -> int | None:
        """The number of directions that a verdict looks at; None if none undoes it."""
        return self.matched.get(method, 0)


def _put_in(outputs: Joint, change: Float[Tensor, "d d"]) -> Spread:
    """What is left of base + change (tuned - base)."""
    base, tuned, cross = outputs
    kept = torch.eye(len(change), dtype=change.dtype) - change
    mixed = kept @ cross @ change.mT
    new = kept @ base.covariance @ kept.mT + change @ tuned.covariance @ change.mT
    left = new + mixed + mixed.mT
    return Spread(participation(left), float(left.trace() / base.covariance.trace()))


def side_of(method: str) -> Side:
    """Whose outputs a method changes."""
    return "tuned" if method in (*REMOVING, SINGLE) else "base"


def plan(outputs: Joint, n_directions: Sequence[int] | None, n_random: int, seed: int) -> Plan:
    """Every change of a pair whose last-block outputs have these means and covariances.

    Args:
        outputs: of the last blocks.
        n_directions: numbers of axes; None for 1, 2, 4, ... up to all.
        n_random: how many random draws of every control.
        seed: of the first; the others count on from it.
    """
    base, tuned, cross = outputs
    d = len(base.mean)
    axes = {"base": principal(base.covariance), "tuned": principal(tuned.covariance)}
    new = new_axes(base.covariance, tuned.covariance)
    moved = transport(base.covariance, tuned.covariance)
    bases = {name: one.basis for name, one in axes.items()}
    bases |= {"new": new.basis, "transport": moved.basis}
    bases |= {f"random {i}": random_basis(d, seed + i) for i in range(n_random)}
    grown = int((new.values > EMPTY).sum())
    # Up to rounding, so that equal models need no change.
    wanted = participation(base.covariance) * (1 + 1e-9)
    matched: dict[str, int | None] = {
        "base_directions": most_kept(in_basis(tuned.covariance, bases["base"]), wanted),
        "new_directions": fewest_removed(in_basis(tuned.covariance, bases["new"]), wanted, grown)
        or None,
    }
    grid = sorted(set(n_directions or _powers(d)))
    kept = sorted({*(m for m in grid if m <= d), matched["base_directions"] or d, d})
    gone = sorted({*(k for k in grid if k <= grown), *_if_any(matched["new_directions"])})
    variance = {name: in_basis(tuned.covariance, basis).diagonal() for name, basis in bases.items()}
    back, expanding = set_back(base.covariance, tuned.covariance, new, grown)
    n_expanding = int(expanding.sum())
    for method in ("expanding_directions", "tuned_coordinates"):
        matched[method] = n_expanding or None
    changes: dict[Cell, Along] = {}
    for method, basis, gains in (
        ("base_directions", "base", {m: keeping(m, d) for m in kept}),
        ("new_directions", "new", {k: removing(k, d) for k in gone}),
        (
            "expanding_directions",
            "new",
            {k: torch.where(expanding, back, 1.0) for k in _if_any(n_expanding or None)},
        ),
    ):
        for size, gain in gains.items():
            lost = float(((1 - gain.square()) * variance[basis]).sum())
            changes[Cell(method, size, ITSELF, -1)] = Along(basis, gain)
            for i in range(n_random):
                other = f"random {i}"
                exact = removing_variance(variance[other], lost)
                if method != "expanding_directions":
                    changes[Cell(method, size, "same_dimension", i)] = Along(other, gain)
                changes[Cell(method, size, "same_variance", i)] = Along(other, exact)
    for k in range(1, min(N_SINGLE, grown) + 1):
        gain = torch.ones(d, dtype=torch.float64)
        gain[k - 1] = back[k - 1]
        changes[Cell(SINGLE, k, ITSELF, -1)] = Along("new", gain)
    if n_expanding:
        difference = base.covariance + tuned.covariance - cross - cross.mT
        changes |= _putting_in(difference, bases, expanding, n_random, seed)
    values = {name: one.values for name, one in axes.items()}
    spread = in_basis(base.covariance, moved.basis).diagonal()
    for method, basis, gain, own in (
        ("base_spectrum", "tuned", respaced(values["tuned"], values["base"]), values["tuned"]),
        ("tuned_spectrum", "base", respaced(values["base"], values["tuned"]), values["base"]),
        ("tuned_covariance", "transport", moved.values, spread),
    ):
        changes[Cell(method, 0, ITSELF, -1)] = Along(basis, gain)
        for i in range(n_random):
            changes[Cell(method, 0, "shuffled_gains", i)] = Along(
                basis, shuffled_gains(gain, own, seed + i)
            )
    empty = {name: int((v <= EMPTY * v.max()).sum()) for name, v in values.items()}
    # Least squares, as far as the base's outputs have variance (rounding: that of float32 sums).
    affine = cross.mT @ torch.linalg.pinv(base.covariance, rtol=EMPTY, hermitian=True)
    return Plan(bases, changes, matched, affine, empty)


def set_back(
    base: Float[Tensor, "d d"], tuned: Float[Tensor, "d d"], new: Axes, grown: int
) -> tuple[Float[Tensor, " d"], Bool[Tensor, " d"]]:
    """Gains that undo the growth along each axis, and the axes whose growth raises the dimension.

    Growth is relative to the axes that did not grow: a model of twice the scale has not expanded.

    Args:
        base, tuned: covariances.
        new: the axes, those that grew most first.
        grown: how many of them grew.
    """
    seen = in_basis(tuned, new.basis)
    own, before = seen.diagonal(), in_basis(base, new.basis).diagonal()
    scale = float(own[grown:].sum() / before[grown:].sum()) if grown < len(own) else 1.0
    enough = own > EMPTY * own.max()
    left = torch.where(enough, scale * before / torch.where(enough, own, 1.0), 1.0).clamp(0.0, 1.0)
    left[grown:] = 1.0
    # tr(C)² / ‖C‖² with the variance along one axis alone times `left`, for every axis at once.
    total = own.sum() - (1 - left) * own
    rest = seen.square().sum(1) - own.square()
    squares = seen.square().sum() - 2 * (1 - left) * rest - (1 - left.square()) * own.square()
    raises = (left < 1.0) & (total.square() / squares < participation(seen) * (1 - ROUNDING))
    return left.sqrt(), raises


def _putting_in(
    difference: Float[Tensor, "d d"],
    bases: dict[str, Float[Tensor, "d d"]],
    expanding: Bool[Tensor, " d"],
    n_random: int,
    seed: int,
) -> dict[Cell, Along]:
    """The tuned model's coordinates along some of the "new" axes, with controls; and along all.

    Adds the bases of the controls to `bases`.

    Args:
        difference: second moments of the difference between the models, about its mean.
        bases: those there are.
        expanding: which of the "new" axes are put in.
        n_random: draws of every control.
        seed: of the draws.
    """
    method, n = "tuned_coordinates", int(expanding.sum())
    gain = expanding.double()
    amount = float(in_basis(difference, bases["new"]).diagonal() @ gain)
    others = bases["new"][:, ~expanding]
    changes = {Cell(method, n, ITSELF, -1): Along("new", gain, "new")}
    for i in range(n_random):
        # Random axes of what is left, before the others: only the first are put in.
        turned = others @ random_basis(others.shape[1], seed + i) if others.shape[1] else others
        name, into = f"other {i}", f"random {i}"
        bases[name] = torch.cat([turned, bases["new"][:, expanding]], 1)
        along = in_basis(difference, bases[name]).diagonal().clone()
        along[others.shape[1] :] = 0.0
        left = removing_variance(along, min(amount, float(along.sum()))).square()
        left[others.shape[1] :] = 1.0
        # An axis put in with the gain g has g² of its part of the difference.
        same = (1 - left).clamp_min(0.0).sqrt()
        changes[Cell(method, n, "same_variance", i)] = Along(name, same, name)
        changes[Cell(method, n, "rotated", i)] = Along("new", gain, into)
    if n < len(gain):
        changes[Cell(method, len(gain), ITSELF, -1)] = Along("new", torch.ones_like(gain), "new")
    return changes


def generated_cells(planned: Plan) -> list[Cell]:
    """The changes under which text is generated: few sizes, each with one draw of its control."""
    return [
        Cell(method, size, condition, draw)
        for method in METHODS
        # Coordinates of the other model are not there where one model generates by itself.
        if method != "tuned_coordinates"
        for size in _few(planned.sizes(method), planned.judged(method))
        for condition, draw in ((ITSELF, -1), (VARIANCE_CONTROL[method], 0))
    ]


def _few(sizes: list[int], judged: int | None) -> list[int]:
    """Three of the sizes, the judged one among them."""
    if len(sizes) <= 3:
        return sizes
    n = len(sizes)
    wanted = [sizes[n // 4], sizes[n // 2], sizes[3 * n // 4]]
    if judged is not None and judged not in wanted:
        wanted[min(range(3), key=lambda i: abs(sizes.index(wanted[i]) - sizes.index(judged)))] = (
            judged
        )
    return sorted(wanted)


def _powers(d: int) -> Iterator[int]:
    """1, 2, 4, ... and d."""
    power = 1
    while power < d:
        yield power
        power *= 2
    yield d


def _if_any(value: Any) -> tuple[Any, ...]:
    return () if value is None else (value,)


# Changes at work


class Frame:
    """A basis about a mean, in float32 where a model's outputs are.

    Args:
        mean, basis: float64.
        device: of the outputs.
    """

    def __init__(self, mean: Tensor, basis: Tensor, device: torch.device) -> None:
        self._mean = mean.float().to(device)
        self._basis = basis.float().to(device)

    def coordinates(self, x: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_model"]:
        """Where outputs lie along the axes."""
        with in_full_float32():
            return (x.float() - self._mean) @ self._basis

    def moved(
        self,
        x: Float[Tensor, "*rows d_model"],
        coordinates: Float[Tensor, "*rows d_model"],
        gain: Float[Tensor, " d_model"],
    ) -> Float[Tensor, "*rows d_model"]:
        """The outputs with every coordinate times its gain; those of gain 1 are left untouched."""
        return self.added(x, coordinates, gain - 1.0)

    def added(
        self,
        x: Float[Tensor, "*rows d_model"],
        coordinates: Float[Tensor, "*rows d_model"],
        gain: Float[Tensor, " d_model"],
    ) -> Float[Tensor, "*rows d_model"]:
        """The outputs and, along every axis, these coordinates times its gain."""
        by = gain.float().to(x.device)
        with in_full_float32():
            change = (coordinates * by) @ self._basis.mT
        return (x.float() + change).to(x.dtype)


def change_of(
    planned: Plan, cell: Cell, mean: Float[Tensor, " d_model"], device: torch.device
) -> Callable[[Tensor], Tensor]:
    """One change as a function of a last block's output, for `hyperlens.patching.changing`."""
    basis, gain, _ = planned.changes[cell]
    frame = Frame(mean, planned.bases[basis], device)
    return lambda x: frame.moved(x, frame.coordinates(x), gain)
