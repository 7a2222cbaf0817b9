"""Rows of the long table of a comparison, which probes compute."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

COLUMNS = ("probe", "metric", "layer", "view", "value", "low", "high", "n")


class Row(NamedTuple):
    """One number of a comparison.

    Attributes:
        probe, metric: what was measured.
        layer: 0 for the embedding output, l for the output of block l - 1, L for the last.
        view: "raw", "unit_rms" or "final_norm".
        value: the number.
        low, high: its 95% interval over sequences; NaN where there is none.
        n: how many tokens it is taken over.
    """

    probe: str
    metric: str
    layer: int
    view: str
    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class ProbeResult:
    """What a probe computes: rows of the table, and anything else (JSON values only)."""

    rows: tuple[Row, ...]
    extras: Mapping[str, Any] = field(default_factory=dict)


def joined(parts: Iterable[ProbeResult]) -> ProbeResult:
    """The results of parts of a probe, such as some of its layers each, as one."""
    rows: list[Row] = []
    extras: dict[str, Any] = {}
    for part in parts:
        rows.extend(part.rows)
        extras.update(part.extras)
    return ProbeResult(tuple(rows), extras)


def chosen_layers(layers: Sequence[int], most: int) -> list[int]:
    """The first, some in between, and the last two of the layers, at most so many.

    >>> chosen_layers(range(5), 4), chosen_layers(range(3), 4)
    ([0, 2, 3, 4], [0, 1, 2])
    """
    if len(layers) <= most:
        return list(layers)
    *inner, last = layers
    spread = (round(i * (len(inner) - 1) / (most - 2)) for i in range(most - 1))
    return [*(inner[i] for i in spread), last]
