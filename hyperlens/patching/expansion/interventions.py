"""Every way to take an expansion away or to bring it about, in every dose, with its controls.

A way changes the outputs of one model's last block about their mean, along the axes of a basis.
Controls do as much along axes that mean nothing: a random subspace of the same dimension; random
axes with the same variance, the last one partly, so that it is exact; or the same gains dealt to
the same axes at random, with the same total variance afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from jaxtyping import Float
from torch import Tensor

from ..spectrum import (
    EMPTY,
    Cloud,
    dealt,
    fewest_removed,
    keeping,
    most_kept,
    new_axes,
    participation,
    principal,
    random_basis,
    removing,
    removing_variance,
    respaced,
    seen_along,
    transport,
)

Side = Literal["base", "tuned"]

REMOVING = ("base_directions", "new_directions", "base_spectrum")
ADDING = ("tuned_spectrum", "tuned_covariance")
WAYS = (*REMOVING, *ADDING)
DOSED = ("base_directions", "new_directions")
"""The ways. Of the tuned model: its outputs projected onto the base's first principal axes (a dose
is how many are kept); rid of the axes along which its variance has grown most (a dose is how
many); its own axes with the base's spectrum. Of the base model: its own axes with the tuned
model's spectrum; the tuned model's covariance whole."""

ITSELF = "itself"
VARIANCE_CONTROL = {way: "same_variance" if way in DOSED else "dealt_gains" for way in WAYS}
"""The control that does as much as a way does, by variance: what a verdict rests on."""


class Cell(NamedTuple):
    """One change: a way, its dose (0 where there is none), what is done, and the random draw."""

    way: str
    dose: int
    arm: str
    draw: int

    @property
    def side(self) -> Side:
        """Whose outputs are changed."""
        return side_of(self.way)


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
        matched: per way with doses, the least dose that brings the participation ratio down to the
            base model's; None if none does.
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
            covariance = seen_along(clouds[side].covariance, self.bases[basis])
            for cell in cells:
                gain = self.changes[cell].gain
                left = float(gain.square() @ covariance.diagonal()) / float(covariance.trace())
                found[cell] = Spread(participation(covariance, gain), left)
        return found

    def doses(self, way: str) -> list[int]:
        """The doses of a way, in order."""
        return sorted({cell.dose for cell in self.changes if cell.way == way})

    def judged(self, way: str) -> int | None:
        """The dose that a verdict looks at; None if the way cannot take the expansion away."""
        return self.matched.get(way, 0)


def side_of(way: str) -> Side:
    """Whose outputs a way changes."""
    return "tuned" if way in REMOVING else "base"


def plan(base: Cloud, tuned: Cloud, doses: Sequence[int] | None, n_random: int, seed: int) -> Plan:
    """Every change of a pair whose last-block outputs are spread like this.

    Args:
        base, tuned: outputs of the last blocks.
        doses: numbers of axes; None for 1, 2, 4, ... up to all.
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
        "base_directions": most_kept(seen_along(tuned.covariance, bases["base"]), wanted),
        "new_directions": fewest_removed(seen_along(tuned.covariance, bases["new"]), wanted, grown)
        or None,
    }
    grid = sorted(set(doses or _powers(d)))
    kept = sorted({*(m for m in grid if m <= d), matched["base_directions"] or d, d})
    gone = sorted({*(k for k in grid if k <= grown), *_given(matched["new_directions"])})
    variance = {
        name: seen_along(tuned.covariance, basis).diagonal() for name, basis in bases.items()
    }
    changes: dict[Cell, Along] = {}
    for way, basis, gains in (
        ("base_directions", "base", {m: keeping(m, d) for m in kept}),
        ("new_directions", "new", {k: removing(k, d) for k in gone}),
    ):
        for dose, gain in gains.items():
            lost = float(((1 - gain.square()) * variance[basis]).sum())
            changes[Cell(way, dose, ITSELF, -1)] = Along(basis, gain)
            for i in range(n_random):
                other = f"random {i}"
                exact = removing_variance(variance[other], lost)
                changes[Cell(way, dose, "same_dimension", i)] = Along(other, gain)
                changes[Cell(way, dose, "same_variance", i)] = Along(other, exact)
    values = {name: one.values for name, one in axes.items()}
    spread = seen_along(base.covariance, moved.basis).diagonal()
    for way, basis, gain, own in (
        ("base_spectrum", "tuned", respaced(values["tuned"], values["base"]), values["tuned"]),
        ("tuned_spectrum", "base", respaced(values["base"], values["tuned"]), values["base"]),
        ("tuned_covariance", "transport", moved.values, spread),
    ):
        changes[Cell(way, 0, ITSELF, -1)] = Along(basis, gain)
        for i in range(n_random):
            changes[Cell(way, 0, "dealt_gains", i)] = Along(basis, dealt(gain, own, seed + i))
    empty = {name: int((v <= EMPTY * v.max()).sum()) for name, v in values.items()}
    return Plan(bases, changes, matched, empty)


def written_cells(planned: Plan) -> list[Cell]:
    """The changes under which text is written: few doses, each with one draw of its control."""
    return [
        Cell(way, dose, arm, draw)
        for way in WAYS
        for dose in _few(planned.doses(way), planned.judged(way))
        for arm, draw in ((ITSELF, -1), (VARIANCE_CONTROL[way], 0))
    ]


def _few(doses: list[int], judged: int | None) -> list[int]:
    """Three of the doses, the judged one among them."""
    if len(doses) <= 3:
        return doses
    n = len(doses)
    wanted = [doses[n // 4], doses[n // 2], doses[3 * n // 4]]
    if judged is not None and judged not in wanted:
        wanted[min(range(3), key=lambda i: abs(doses.index(wanted[i]) - doses.index(judged)))] = (
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


def _given(value: Any) -> tuple[Any, ...]:
    return () if value is None else (value,)
