"""Every method that takes an expansion away or brings it about, at every size, with its controls.

A method changes the outputs of one model's last block about their mean, along the axes of a basis.
Controls do as much along axes that mean nothing: a random subspace of the same dimension; random
axes with the same variance, the last one partly, so that it is exact; or the same gains in a random
order on the same axes, with the same total variance afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ...statistics.moments import in_full_float32
from ...statistics.spectrum import (
    EMPTY,
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

REMOVING = ("base_directions", "new_directions", "base_spectrum")
ADDING = ("tuned_spectrum", "tuned_covariance")
METHODS = (*REMOVING, *ADDING)
BY_DIRECTIONS = ("base_directions", "new_directions")
"""The methods. Of the tuned model: its outputs projected onto the base's first principal axes
(`n_directions` are kept); rid of the axes along which its variance has grown most (`n_directions`
of them); its own axes with the base's spectrum. Of the base model: its own axes with the tuned
model's spectrum; the tuned model's covariance as a whole."""

ITSELF = "itself"
VARIANCE_CONTROL = {
    method: "same_variance" if method in BY_DIRECTIONS else "shuffled_gains" for method in METHODS
}
"""The control that changes as much variance as a method does: what a verdict rests on."""


class Cell(NamedTuple):
    """One change.

    Attributes:
        method: one of `METHODS`.
        n_directions: how many are kept or removed; 0 for methods that change the whole spectrum.
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
    """A change: the name of a basis, and the gain of each of its axes."""

    basis: str
    gain: Float[Tensor, " d_model"]


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
        matched: per method of `BY_DIRECTIONS`, the number of directions that just brings the
            participation ratio down to the base model's; None if none does.
        empty: per model, how many axes have too little variance to be scaled.
    """

    bases: dict[str, Float[Tensor, "d_model d_model"]]
    changes: dict[Cell, Along]
    matched: dict[str, int | None]
    empty: dict[str, int]

    def spread(self, clouds: Mapping[Side, Cloud]) -> dict[Cell, Spread]:
        """What every change leaves of some outputs: exact, because a change is affine."""
        seen: dict[tuple[Side, str], list[Cell]] = {}
        for cell, (basis, _) in self.changes.items():
            seen.setdefault((cell.side, basis), []).append(cell)
        found = {}
        for (side, basis), cells in seen.items():
            covariance = in_basis(clouds[side].covariance, self.bases[basis])
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


def side_of(method: str) -> Side:
    """Whose outputs a method changes."""
    return "tuned" if method in REMOVING else "base"


def plan(
    base: Cloud, tuned: Cloud, n_directions: Sequence[int] | None, n_random: int, seed: int
) -> Plan:
    """Every change of a pair whose last-block outputs have these means and covariances.

    Args:
        base, tuned: outputs of the last blocks.
        n_directions: numbers of axes; None for 1, 2, 4, ... up to all.
        n_random: how many random draws of every control.
        seed: of the first; the others count on from it.
    """
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
    changes: dict[Cell, Along] = {}
    for method, basis, gains in (
        ("base_directions", "base", {m: keeping(m, d) for m in kept}),
        ("new_directions", "new", {k: removing(k, d) for k in gone}),
    ):
        for size, gain in gains.items():
            lost = float(((1 - gain.square()) * variance[basis]).sum())
            changes[Cell(method, size, ITSELF, -1)] = Along(basis, gain)
            for i in range(n_random):
                other = f"random {i}"
                exact = removing_variance(variance[other], lost)
                changes[Cell(method, size, "same_dimension", i)] = Along(other, gain)
                changes[Cell(method, size, "same_variance", i)] = Along(other, exact)
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
    return Plan(bases, changes, matched, empty)


def generated_cells(planned: Plan) -> list[Cell]:
    """The changes under which text is generated: few sizes, each with one draw of its control."""
    return [
        Cell(method, size, condition, draw)
        for method in METHODS
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
        by = (gain - 1.0).float().to(x.device)
        with in_full_float32():
            change = (coordinates * by) @ self._basis.mT
        return (x.float() + change).to(x.dtype)


def change_of(
    planned: Plan, cell: Cell, mean: Float[Tensor, " d_model"], device: torch.device
) -> Callable[[Tensor], Tensor]:
    """One change as a function of a last block's output, for `hyperlens.patching.changing`."""
    basis, gain = planned.changes[cell]
    frame = Frame(mean, planned.bases[basis], device)
    return lambda x: frame.moved(x, frame.coordinates(x), gain)
