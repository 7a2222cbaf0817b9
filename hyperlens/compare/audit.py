"""Where a change is: in the blocks, or in how the last layer is read.

The paper reads layer L after the final norm, over all tokens, and every other layer raw. A number
read that way is a sum of what the blocks did and of what the reading adds; here it is taken apart.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

from ..results.rows import Row

# What is taken apart: (probe, metric).
QUANTITIES = (("participation_ratio", "delta"), ("drift", "l2"))

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
class Decomposition:
    """One number at layer L as the paper reads it, and the parts it is the sum of.

    Dimensions for the participation ratio; for L2 the units of the vectors, which the final norm
    changes: its part is then a change of scale as much as of distance.

    Attributes:
        quantity: "participation_ratio" (tuned - base) or "drift" (the L2 distance).
        total: after the final norm, over all tokens, BOS and attention sinks included: the sum of
            the parts.
        block: in the last block's raw output, over ordinary tokens.
        norm: what the final norm adds.
        sinks: what counting attention sinks adds; of dimensions, by the row estimator.
        bos: what counting BOS adds; of dimensions, by the row estimator.
        terminal_jump: the raw number at L minus that at L - 1: what is new in the last block.
            NaN if layer L - 1 was not measured.
    """

    quantity: str
    total: float
    block: float
    norm: float
    sinks: float
    bos: float
    terminal_jump: float

    @property
    def parts(self) -> dict[str, float]:
        """The four parts in words; they add up to `total`."""
        return {
            "blocks' raw output": self.block,
            "final norm": self.norm,
            "attention sinks": self.sinks,
            "BOS": self.bos,
        }


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
    """Take the last layer's change of dimension and L2 distance apart.

    A quantity is left out where a row it needs is missing, not finite, or taken over other
    tokens than the default ones.
    """
    found = (_decompose(comparison, probe, metric) for probe, metric in QUANTITIES)
    return [one for one in found if one is not None]


def _decompose(comparison: Measured, probe: str, metric: str) -> Decomposition | None:
    if _token_set(comparison, probe) != "geometry":
        return None
    last = comparison.n_layers
    raw = _value(comparison, probe, metric, last, "raw")
    normed = _value(comparison, probe, metric, last, "final_norm")
    # Like with like: the audit keeps no sample of tokens, so it has the row estimator only, which
    # in version 0.1 was the only one.
    without = _value(comparison, probe, f"{metric}_row", last, "final_norm")
    if math.isnan(without):
        without = normed
    with_sinks, with_bos = (
        _value(comparison, "artefact_audit", f"{metric}_{tokens}", last, "final_norm")
        for tokens in ("with_sinks", "with_sinks_and_bos")
    )
    if not all(map(math.isfinite, (raw, normed, with_sinks, with_bos))):
        return None
    return Decomposition(
        quantity=probe,
        total=with_bos + (normed - without),
        block=raw,
        norm=normed - raw,
        sinks=with_sinks - without,
        bos=with_bos - with_sinks,
        terminal_jump=raw - _value(comparison, probe, metric, last - 1, "raw"),
    )


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
