"""Participation ratios of both streams read through either final norm, and sums of them.

All are taken over the same tokens, so a sum of several has an interval of its own: the influences
of the sampled tokens add up (see `hyperlens.intervals`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from ...passes.streams import StreamPair, View
from ...probes import ParticipationRatio
from ...statistics.intervals import RatioInfluence, SampledTokens, influence_half_width

Side = Literal["base", "tuned"]


class CrossedNorms(ParticipationRatio):
    """The participation ratio of each model's last output after the *other* model's final norm.

    "base" is the base's stream after the tuned model's norm, "tuned" the other way round.
    """

    name = "crossed_norms"

    def __init__(self) -> None:
        super().__init__(views=("final_norm",), layers=(-1,))

    def update(self, pair: StreamPair) -> None:
        """Add one batch, the norms exchanged."""
        super().update(
            replace(
                pair,
                base=replace(pair.base, final_norm=pair.tuned.final_norm),
                tuned=replace(pair.tuned, final_norm=pair.base.final_norm),
            )
        )


@dataclass(frozen=True)
class Dimension:
    """A participation ratio, or a sum of several.

    Attributes:
        value, low, high: corrected for few tokens, with its 95% interval over texts.
        naive: from the sample covariance.
        n: tokens.
        influence, sample: of the sampled tokens; None if there are too few.
    """

    value: float
    low: float
    high: float
    naive: float
    n: int
    influence: RatioInfluence | None
    sample: SampledTokens | None


def dimensions(probe: ParticipationRatio) -> dict[tuple[Side, int, View], Dimension]:
    """Everything a probe has measured, as `compare_models` reports it."""
    rows = {(row.metric, row.layer, row.view): row for row in probe.compute().rows}
    found: dict[tuple[Side, int, View], Dimension] = {}
    for layer in probe.spec.resolve_layers(probe.layers):
        for view in probe.views:
            linear = probe.linearised(layer, view)
            sides: tuple[Side, Side] = ("base", "tuned")
            for k, side in enumerate(sides):
                row = rows[side, layer, view]
                found[side, layer, view] = Dimension(
                    value=row.value,
                    low=row.low,
                    high=row.high,
                    naive=rows[f"{side}_naive", layer, view].value,
                    n=row.n,
                    influence=None if linear is None else linear[0][k],
                    sample=None if linear is None else linear[1],
                )
    return found


def less(one: Dimension, other: Dimension) -> Dimension:
    """One less another; exactly 0 for equal ones."""
    return total([(1.0, one), (-1.0, other)])


def total(terms: Sequence[tuple[float, Dimension]]) -> Dimension:
    """A weighted sum; without an interval where its parts are not of the same tokens."""
    (first_weight, first), *others = terms
    value, naive = (
        sum((w * getattr(one, key) for w, one in others), first_weight * getattr(first, key))
        for key in ("value", "naive")
    )
    none = Dimension(value, math.nan, math.nan, naive, first.n, None, None)
    if first.influence is None or first.sample is None:
        return none
    centre = first_weight * first.influence.centre
    influence = first_weight * first.influence.influence
    for weight, one in others:
        if one.influence is None or one.sample is None or not _same(first, one):
            return none
        centre += weight * one.influence.centre
        influence = influence + weight * one.influence.influence
    half = influence_half_width(influence, float(first.n), first.sample)
    return replace(
        none,
        low=centre - half,
        high=centre + half,
        influence=RatioInfluence(centre, influence),
        sample=first.sample,
    )


def _same(a: Dimension, b: Dimension) -> bool:
    if a.sample is None or b.sample is None:
        return False
    return a.n == b.n and torch.equal(a.sample.valid, b.sample.valid)
