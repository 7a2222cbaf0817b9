"""Where a change is: in the blocks, or in how the layers are read.

Scripts read Hugging Face's `hidden_states`: every layer raw but the last, which has passed the
final norm; over all tokens, BOS and attention sinks included; and with the sample covariance. The
paper (Figure 5) seems to. A number read that way is a sum of what the blocks did and of what the
reading adds; here it is taken apart at every layer, because a jump at the last one may be made by
what BOS hides at those below it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, Protocol, runtime_checkable

from ..probes import OutputByPosition, OutputByRole
from ..probes.base import WITH_EXCLUDED
from ..results.rows import Row

# What is taken apart: (probe, metric, the metric as scripts compute it over the same tokens).
QUANTITIES = (("participation_ratio", "delta", "delta_naive"), ("drift", "l2", "l2"))

# Metrics that are exactly at this value when two models are the same.
AT_REST = {
    ("drift", "cosine"): 1.0,
    ("drift", "l2"): 0.0,
    ("drift", "relative_l2"): 0.0,
    ("participation_ratio", "delta"): 0.0,
    ("logit_lens", "kl"): 0.0,
    ("logit_lens", "top1_agreement"): 1.0,
    ("rank_reordering", "top1_agreement"): 1.0,
    ("rank_reordering", "spearman"): 1.0,
    ("rank_reordering", "rank_1"): 1.0,
    ("rank_reordering", "rank_2_10"): 0.0,
    ("rank_reordering", "rank_gt_10"): 0.0,
    ("rank_reordering", "rank_ge_200"): 0.0,
    **{
        (probe.name, f"{metric}_{group}"): value
        for probe in (OutputByRole(), OutputByPosition())
        for group in probe.groups
        for metric, value in (("kl", 0.0), ("top1_agreement", 1.0))
    },
}


@runtime_checkable
class Measured(Protocol):
    """A comparison, as far as the audit reads it."""

    @property
    def n_layers(self) -> int:
        """Number of blocks."""

    @property
    def meta(self) -> Mapping[str, Any]:
        """Options of the probes among others."""

    @property
    def long(self) -> tuple[Row, ...]:
        """Every row."""

    def measured(self, probe: str, metric: str, view: str | None = None) -> list[Row]:
        """Rows of one metric in order of layer."""


@dataclass(frozen=True)
class LayerReading:
    """A change at one layer as scripts read it, and the parts it is the sum of.

    Dimensions for the participation ratio; for L2 the units of the vectors, which the final norm
    changes: its part is then a change of scale as much as of distance.

    Attributes:
        layer: 0 to L.
        blocks: in the blocks' raw output, over ordinary tokens: as everywhere in a comparison.
        norm: what reading it after the final norm adds, at layer L alone; 0 below it.
        estimator: what the sample covariance adds, which is biased for few tokens; 0 for L2.
        sinks: what counting attention sinks adds.
        bos: what counting BOS adds.
        as_read: all of it: Hugging Face's `hidden_states` over every token.
    """

    layer: int
    blocks: float
    norm: float
    estimator: float
    sinks: float
    bos: float
    as_read: float

    @property
    def reading(self) -> dict[str, float]:
        """The parts that come from the way of reading, in words."""
        return {
            "the final norm": self.norm,
            "the sample covariance": self.estimator,
            "attention sinks": self.sinks,
            "BOS": self.bos,
        }


@dataclass(frozen=True)
class Decomposition:
    """A change along the layers, in two readings, and what makes them differ.

    The parts are added in the order of `LayerReading`, the norm first. In another order they
    differ: BOS weighs much in raw streams and little after a norm.

    Attributes:
        quantity: "participation_ratio" (tuned - base) or "drift" (the L2 distance).
        layers: every layer measured, in order; the last is layer L.
        jump_normed: the jump in the last block over ordinary tokens with both of its sides read
            after the final norm; NaN if layer L - 1 was not.
    """

    quantity: str
    layers: tuple[LayerReading, ...]
    jump_normed: float

    @property
    def last(self) -> LayerReading:
        """Layer L."""
        return self.layers[-1]

    @property
    def before(self) -> LayerReading | None:
        """Layer L - 1, if it was measured."""
        return next((one for one in self.layers if one.layer == self.last.layer - 1), None)

    @property
    def jump(self) -> LayerReading | None:
        """What is new in the last block: layer L less layer L - 1, part by part."""
        if self.before is None:
            return None
        names = [field.name for field in fields(LayerReading) if field.name != "layer"]
        changes = {name: getattr(self.last, name) - getattr(self.before, name) for name in names}
        return LayerReading(layer=self.last.layer, **changes)


class Step(NamedTuple):
    """A metric before and after one block: at layer `layer` - 1 and at `layer`."""

    layer: int
    before: float
    after: float

    @property
    def change(self) -> float:
        """After minus before, signed."""
        return self.after - self.before


def audit(comparison: Measured) -> list[Decomposition]:
    """Take the change of dimension and the L2 distance apart at every layer.

    A layer is left out where a row it needs is missing or not finite, and a quantity where layer L
    is, or where it was taken over other tokens than the default ones.
    """
    found = (_decompose(comparison, *which) for which in QUANTITIES)
    return [one for one in found if one is not None]


def _decompose(comparison: Measured, probe: str, metric: str, naive: str) -> Decomposition | None:
    if _token_set(comparison, probe) != "geometry":
        return None
    last = comparison.n_layers
    at = _by_layer(comparison, probe, metric, naive)
    layers = []
    for layer in range(last + 1):
        raw = at[metric, "raw"].get(layer, math.nan)
        # What scripts are given: Hugging Face's last hidden state has passed the final norm.
        view = "final_norm" if layer == last else "raw"
        ordinary, plain, with_sinks, as_read = (
            at[name, view].get(layer, math.nan) for name in _names(metric, naive)
        )
        parts = (raw, ordinary - raw, plain - ordinary, with_sinks - plain, as_read - with_sinks)
        if all(map(math.isfinite, (*parts, as_read))):
            layers.append(LayerReading(layer, *parts, as_read))
    if not layers or layers[-1].layer != last:
        return None
    normed = at[metric, "final_norm"]
    jump_normed = normed.get(last, math.nan) - normed.get(last - 1, math.nan)
    return Decomposition(probe, tuple(layers), jump_normed)


def _names(metric: str, naive: str) -> tuple[str, ...]:
    """A metric over ordinary tokens, by the scripts' estimator, and over more and more tokens."""
    return metric, naive, *(f"{naive}_{words}" for words in WITH_EXCLUDED)


def _by_layer(
    comparison: Measured, probe: str, metric: str, naive: str
) -> dict[tuple[str, str], dict[int, float]]:
    """(metric, view) to the number at each layer."""
    return {
        (name, view): {row.layer: row.value for row in comparison.measured(probe, name, view)}
        for name in _names(metric, naive)
        for view in ("raw", "final_norm")
    }


def readings_agree(jump: LayerReading) -> bool:
    """Whether scripts see the last block's change of dimension about as it is.

    Within a dimension, or a quarter of the larger of the two numbers.
    """
    largest = max(abs(jump.as_read), abs(jump.blocks))
    return abs(jump.as_read - jump.blocks) <= max(1.0, largest / 4)


def _token_set(comparison: Measured, probe: str) -> str:
    options = comparison.meta.get("probes", {}).get(probe, {})
    return str(options.get("token_set", "geometry"))


def largest_step(comparison: Measured, probe: str, metric: str) -> Step | None:
    """The block over which the raw metric moves most, up or down.

    Only layers measured side by side count: a step across a gap is not one block's.
    """
    rows = comparison.measured(probe, metric, "raw")
    at = {row.layer: row.value for row in rows if math.isfinite(row.value)}
    steps = (Step(layer, at[layer - 1], at[layer]) for layer in sorted(at) if layer - 1 in at)
    return max(steps, key=lambda step: abs(step.change), default=None)


def without_doubt(rows: Iterable[Row]) -> Iterator[Row]:
    """The rows of one model compared with itself: what is at rest is so on any text."""
    for row in rows:
        at_rest = AT_REST.get((row.probe, row.metric)) == row.value
        yield row._replace(low=row.value, high=row.value) if at_rest else row


def unchanged(comparison: Measured) -> bool:
    """Whether everything measured reads exactly as it does for two identical models."""
    seen = [
        row.value == AT_REST[row.probe, row.metric]
        for row in comparison.long
        if (row.probe, row.metric) in AT_REST
    ]
    return bool(seen) and all(seen)


def last_block(comparison: Measured) -> float | None:
    """How many raw dimensions the last block alone adds: the change at L less that at L - 1."""
    last = comparison.n_layers
    at, before = (
        _value(comparison, "participation_ratio", "delta", layer, "raw")
        for layer in (last, last - 1)
    )
    return at - before if math.isfinite(at - before) else None


def _value(comparison: Measured, probe: str, metric: str, layer: int, view: str) -> float:
    """One number; NaN if it was not measured."""
    rows = comparison.measured(probe, metric, view)
    return next((row.value for row in rows if row.layer == layer), math.nan)
