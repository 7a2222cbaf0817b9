"""What the changes did, as rows: estimates, paired differences to controls, evidence."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from ...decoding.diversity import REPETITION_METRICS as WRITTEN
from ...statistics import significance
from ...statistics.significance import Estimate, holm
from ..outcomes import METRICS, Outcome, p_value
from ..ratios import NOTHING
from ..spectrum import Cloud, participation
from .interventions import ADDING, ITSELF, VARIANCE_CONTROL, WAYS, Cell, Plan, Side
from .verdict import Evidence

Written = dict[Cell | str, dict[str, list[float]]]
Row = dict[str, Any]

CONTRASTED = ("to_tuned", "to_base", "agreement_tuned", "agreement_base", "kl_tuned", "kl_base")
# Dimensions and variance are of a covariance: they have no interval.
SPREAD = ("dimension_fitted", "dimension", "variance")


@dataclass(frozen=True)
class Found:
    """All that was measured.

    Attributes:
        planned: the changes.
        outcomes: of each cell, and of "base" and "tuned" as they are.
        fitted, read: both models' outputs on the half that directions are fitted on, and on the
            half that decisions are read on.
        written: repetition of greedy text, per prompt, of some cells and of both models.
    """

    planned: Plan
    outcomes: Mapping[Cell | Side, Outcome]
    fitted: Mapping[Side, Cloud]
    read: Mapping[Side, Cloud]
    written: Written

    def arms(self, way: str, dose: int) -> list[str]:
        """The way itself, then its controls."""
        cells = self.planned.changes
        return list(dict.fromkeys(c.arm for c in cells if (c.way, c.dose) == (way, dose)))

    def draws(self, way: str, dose: int, arm: str) -> list[Cell]:
        """All random draws of an arm; one cell for the way itself."""
        wanted = (way, dose, arm)
        return [cell for cell in self.planned.changes if cell[:3] == wanted]

    def outcome(self, way: str, dose: int, arm: str) -> Outcome:
        """The mean over the draws of an arm."""
        each = [self.outcomes[cell] for cell in self.draws(way, dose, arm)]
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


def rows(found: Found) -> Iterator[Row]:
    """The table: both models as they are, then every way, dose and arm."""
    for side in ("base", "tuned"):
        outcome = found.outcomes[side]
        yield from (_row("none", 0, side, m, outcome.estimate(m)) for m in METRICS)
        yield from _spread_rows("none", 0, side, _spread(found, side))
        yield from _written_rows("none", 0, side, found.written.get(side))
    for way in WAYS:
        for dose in found.planned.doses(way):
            for arm in found.arms(way, dose):
                outcome = found.outcome(way, dose, arm)
                yield from (_row(way, dose, arm, m, outcome.estimate(m)) for m in METRICS)
                cells = found.draws(way, dose, arm)
                each = [found.spread[cell] for cell in cells]
                yield from _spread_rows(way, dose, arm, _mean(each))
                yield from _written_rows(way, dose, arm, found.written.get(cells[0]))


def contrasts(found: Found) -> Iterator[Row]:
    """Every way less its controls, paired by text; p corrected over the doses (Holm).

    What is written: less the control, and less the model as it is, paired by prompt.
    """
    for way in WAYS:
        doses = found.planned.doses(way)
        for against in found.arms(way, doses[0])[1:] if doses else ():
            for metric in CONTRASTED:
                each = [
                    found.outcome(way, dose, ITSELF).difference(
                        found.outcome(way, dose, against), metric
                    )
                    for dose in doses
                ]
                yield from _corrected(way, doses, against, metric, each)
        yield from _written_contrasts(found, way)


def draws(found: Found) -> Iterator[Row]:
    """Every random draw of every control, without intervals."""
    for cell in found.planned.changes:
        if cell.arm != ITSELF:
            outcome = found.outcomes[cell]
            yield cell._asdict() | {
                "to_tuned": outcome.estimate("to_tuned").value,
                "to_base": outcome.estimate("to_base").value,
                "dimension": found.dimension(cell),
            }


def evidence(found: Found, way: str) -> Evidence:
    """What a way did beyond its control, at the dose that is judged."""
    dose = found.planned.judged(way)
    if dose is None:
        return Evidence(math.nan, {}, {}, NOTHING)
    control = VARIANCE_CONTROL[way]
    itself = found.outcome(way, dose, ITSELF)
    mean = found.outcome(way, dose, control)
    each = [found.outcomes[cell] for cell in found.draws(way, dose, control)]
    signs = {"brought": ("to_tuned", 1.0)} if way in ADDING else {
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
    room = left if way not in ADDING else _less_from_one(left)
    return Evidence(_moved(found, way, dose), effects, least, room)


def _moved(found: Found, way: str, dose: int) -> float:
    """By how much of the expansion the dimension moved, where decisions are read."""
    own, other = (participation(found.read[side].covariance) for side in ("base", "tuned"))
    if way not in ADDING:
        own, other = other, own
    (cell,) = found.draws(way, dose, ITSELF)
    return (found.dimension(cell) - own) / (other - own) if other != own else math.nan


def _times(sign: float, found: Estimate) -> Estimate:
    if sign > 0:
        return found
    return found._replace(value=-found.value, low=-found.high, high=-found.low)


def _less_from_one(found: Estimate) -> Estimate:
    return found._replace(value=1 - found.value, low=1 - found.high, high=1 - found.low)


def _row(way: str, dose: int, arm: str, metric: str, found: Estimate) -> Row:
    return {"way": way, "dose": dose, "arm": arm, "metric": metric} | found._asdict()


def _spread_rows(way: str, dose: int, arm: str, values: Mapping[str, float]) -> Iterator[Row]:
    for metric, value in values.items():
        none = math.nan
        yield _row(way, dose, arm, metric, Estimate(value, none, none, none, 0))


def _spread(found: Found, side: Side) -> dict[str, float]:
    fitted, read = found.fitted[side].covariance, found.read[side].covariance
    return dict(zip(SPREAD, (participation(fitted), participation(read), 1.0), strict=True))


def _mean(each: list[dict[str, float]]) -> dict[str, float]:
    return {name: sum(one[name] for one in each) / len(each) for name in each[0]}


def _written_rows(
    way: str, dose: int, arm: str, metrics: Mapping[str, list[float]] | None
) -> Iterator[Row]:
    for metric, values in (metrics or {}).items():
        yield _row(way, dose, arm, metric, significance.estimate(values))


def _written_contrasts(found: Found, way: str) -> Iterator[Row]:
    control = VARIANCE_CONTROL[way]
    those = [cell for cell in found.written if isinstance(cell, Cell) and cell.way == way]
    doses = sorted({cell.dose for cell in those})
    for against in (control, "untouched") if doses else ():
        for metric in WRITTEN:
            each = []
            for dose in doses:
                other: Cell | str = Cell(way, dose, control, 0)
                if against == "untouched":
                    other = Cell(way, dose, control, 0).side
                own = found.written[Cell(way, dose, ITSELF, -1)][metric]
                each.append(significance.difference(own, found.written[other][metric]))
            yield from _corrected(way, doses, against, metric, each)


def _corrected(
    way: str, doses: list[int], against: str, metric: str, each: list[Estimate]
) -> Iterator[Row]:
    for dose, one, p in zip(doses, each, holm([p_value(one) for one in each]), strict=True):
        row = {"way": way, "dose": dose, "against": against, "metric": metric}
        yield row | one._asdict() | {"p": p}
