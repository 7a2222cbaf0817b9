"""What the changes did, as rows: estimates, paired differences from controls, evidence."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from ...decoding.diversity import REPETITION_METRICS as REPETITION
from ...statistics import significance
from ...statistics.ratios import NOTHING, holm_p_values
from ...statistics.significance import Estimate
from ...statistics.spectrum import Cloud, participation
from ..engine import Outcomes, Repetition
from ..outcomes import METRICS, SIDES, Outcome, Side
from .changes import ADDING, ITSELF, METHODS, VARIANCE_CONTROL, Cell, Plan
from .verdict import Evidence

Row = dict[str, Any]

CONTRASTED = ("to_tuned", "to_base", "agreement_tuned", "agreement_base", "kl_tuned", "kl_base")
# Dimensions and variance are of a covariance: they have no interval.
SPREAD = ("dimension_fitted", "dimension", "variance")


@dataclass(frozen=True)
class Measured:
    """All that was measured.

    Attributes:
        planned: the changes.
        outcomes: of each cell, and of both models as they are.
        fitted, read: both models' outputs on the half that directions are fitted on, and on the
            half that decisions are read on.
        repetition: of greedy text, per prompt, of some cells and of both models.
    """

    planned: Plan
    outcomes: Outcomes[Cell]
    fitted: Mapping[Side, Cloud]
    read: Mapping[Side, Cloud]
    repetition: Mapping[Cell | Side, Repetition]

    def conditions(self, method: str, size: int) -> list[str]:
        """The method itself, then its controls."""
        cells = self.planned.changes
        return list(
            dict.fromkeys(
                c.condition for c in cells if (c.method, c.n_directions) == (method, size)
            )
        )

    def draws(self, method: str, size: int, condition: str) -> list[Cell]:
        """All random draws of an condition; one cell for the method itself."""
        wanted = (method, size, condition)
        return [cell for cell in self.planned.changes if cell[:3] == wanted]

    def outcome(self, method: str, size: int, condition: str) -> Outcome:
        """The mean over the draws of an condition."""
        each = [self.outcomes.patched[cell] for cell in self.draws(method, size, condition)]
        sums = {
            metric: torch.stack([one.sums[metric] for one in each]).mean(0)
            for metric in each[0].sums
        }
        return Outcome(sums, each[0].decisions, each[0].changed)

    @cached_property
    def spread(self) -> dict[Cell, dict[str, float]]:
        """What each change leaves, on both halves; the variance is that of the first."""
        fitted, read = self.planned.spread(self.fitted), self.planned.spread(self.read)
        return {
            cell: dict(
                zip(SPREAD, (fitted[cell].dimension, read[cell].dimension, fitted[cell].variance),
                    strict=True)
            )
            for cell in self.planned.changes
        }  # fmt: skip

    def dimension(self, cell: Cell) -> float:
        """The participation ratio that a change leaves on the half that decisions are read on."""
        return self.spread[cell]["dimension"]


def rows(measured: Measured) -> Iterator[Row]:
    """The table: both models as they are, then every method, number of directions and condition."""
    for side in SIDES:
        outcome = measured.outcomes.models[side]
        yield from (_row("none", 0, side, m, outcome.estimate(m)) for m in METRICS)
        yield from _spread_rows("none", 0, side, _spread(measured, side))
        yield from _repetition_rows("none", 0, side, measured.repetition.get(side))
    for method in METHODS:
        for size in measured.planned.sizes(method):
            for condition in measured.conditions(method, size):
                outcome = measured.outcome(method, size, condition)
                yield from (_row(method, size, condition, m, outcome.estimate(m)) for m in METRICS)
                cells = measured.draws(method, size, condition)
                each = [measured.spread[cell] for cell in cells]
                yield from _spread_rows(method, size, condition, _mean(each))
                yield from _repetition_rows(
                    method, size, condition, measured.repetition.get(cells[0])
                )


def contrasts(measured: Measured) -> Iterator[Row]:
    """Every method less its controls, paired by text; p corrected over the sizes (Holm).

    Generated text: less the control, and less the model as it is, paired by prompt.
    """
    for method in METHODS:
        sizes = measured.planned.sizes(method)
        for against in measured.conditions(method, sizes[0])[1:] if sizes else ():
            for metric in CONTRASTED:
                each = [
                    measured.outcome(method, size, ITSELF).difference(
                        measured.outcome(method, size, against), metric
                    )
                    for size in sizes
                ]
                yield from _corrected(method, sizes, against, metric, each)
        yield from _repetition_contrasts(measured, method)


def draws(measured: Measured) -> Iterator[Row]:
    """Every random draw of every control, without intervals."""
    for cell in measured.planned.changes:
        if cell.condition != ITSELF:
            outcome = measured.outcomes.patched[cell]
            yield cell._asdict() | {
                "to_tuned": outcome.estimate("to_tuned").value,
                "to_base": outcome.estimate("to_base").value,
                "dimension": measured.dimension(cell),
            }


def evidence(measured: Measured, method: str) -> Evidence:
    """What a method did beyond its control, at the size that is judged."""
    size = measured.planned.judged(method)
    if size is None:
        return Evidence(math.nan, {}, {}, NOTHING)
    control = VARIANCE_CONTROL[method]
    itself = measured.outcome(method, size, ITSELF)
    mean = measured.outcome(method, size, control)
    each = [measured.outcomes.patched[cell] for cell in measured.draws(method, size, control)]
    signs = {"brought": ("to_tuned", 1.0)} if method in ADDING else {
        "lost": ("to_tuned", -1.0),
        "returned": ("to_base", 1.0),
    }  # fmt: skip
    effects = {
        name: _times(sign, itself.difference(mean, metric))
        for name, (metric, sign) in signs.items()
    }
    least = {
        name: min(sign * itself.difference(one, metric).value for one in each)
        for name, (metric, sign) in signs.items()
    }
    left = mean.estimate("to_tuned")
    room = left if method not in ADDING else _one_minus(left)
    return Evidence(_moved(measured, method, size), effects, least, room)


def _moved(measured: Measured, method: str, size: int) -> float:
    """By how much of the expansion the dimension moved, where decisions are read."""
    own, other = (participation(measured.read[side].covariance) for side in SIDES)
    if method not in ADDING:
        own, other = other, own
    (cell,) = measured.draws(method, size, ITSELF)
    return (measured.dimension(cell) - own) / (other - own) if other != own else math.nan


def _times(sign: float, x: Estimate) -> Estimate:
    return x if sign > 0 else x._replace(value=-x.value, low=-x.high, high=-x.low)


def _one_minus(x: Estimate) -> Estimate:
    return x._replace(value=1 - x.value, low=1 - x.high, high=1 - x.low)


def _row(method: str, size: int, condition: str, metric: str, estimate: Estimate) -> Row:
    return {
        "method": method,
        "n_directions": size,
        "condition": condition,
        "metric": metric,
    } | estimate._asdict()


def _spread_rows(
    method: str, size: int, condition: str, values: Mapping[str, float]
) -> Iterator[Row]:
    for metric, value in values.items():
        none = math.nan
        yield _row(method, size, condition, metric, Estimate(value, none, none, none, 0))


def _spread(measured: Measured, side: Side) -> dict[str, float]:
    fitted, read = measured.fitted[side].covariance, measured.read[side].covariance
    return dict(zip(SPREAD, (participation(fitted), participation(read), 1.0), strict=True))


def _mean(each: list[dict[str, float]]) -> dict[str, float]:
    return {name: sum(one[name] for one in each) / len(each) for name in each[0]}


def _repetition_rows(
    method: str, size: int, condition: str, metrics: Repetition | None
) -> Iterator[Row]:
    for metric, values in (metrics or {}).items():
        yield _row(method, size, condition, metric, significance.estimate(values))


def _repetition_contrasts(measured: Measured, method: str) -> Iterator[Row]:
    control = VARIANCE_CONTROL[method]
    those = [
        cell for cell in measured.repetition if isinstance(cell, Cell) and cell.method == method
    ]
    sizes = sorted({cell.n_directions for cell in those})
    for against in (control, "unchanged") if sizes else ():
        for metric in REPETITION:
            each = []
            for size in sizes:
                other: Cell | Side = Cell(method, size, control, 0)
                if against == "unchanged":
                    other = Cell(method, size, control, 0).side
                own = measured.repetition[Cell(method, size, ITSELF, -1)][metric]
                each.append(significance.difference(own, measured.repetition[other][metric]))
            yield from _corrected(method, sizes, against, metric, each)


def _corrected(
    method: str, sizes: list[int], against: str, metric: str, each: list[Estimate]
) -> Iterator[Row]:
    for size, one, p in zip(sizes, each, holm_p_values(each), strict=True):
        row = {"method": method, "n_directions": size, "against": against, "metric": metric}
        yield row | one._asdict() | {"p": p}
