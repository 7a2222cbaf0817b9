"""How much of the last layer's change is BOS and attention sinks rather than ordinary tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import cast

from ..passes.streams import StreamPair, StreamSpec, TokenSet
from ..results.rows import ProbeResult
from .base import Probe
from .drift import ResidualDrift
from .participation_ratio import ParticipationRatio

INCLUDED: dict[TokenSet, str] = {"decisions": "with_sinks", "all": "with_sinks_and_bos"}


class ArtefactAudit(Probe):
    """Distance and participation ratio at the last layer, taken again with the masked tokens in.

    Metrics (layer L, every view): `l2_with_sinks`, `delta_with_sinks`, `l2_with_sinks_and_bos`,
    `delta_with_sinks_and_bos`. Set against `drift` and `participation_ratio`, they tell how much
    of a number read off all tokens, as most code does, comes from a handful of positions.
    """

    name = "artefact_audit"

    def __init__(self) -> None:
        self._parts = [
            (token_set, part(layers=(-1,), token_set=token_set))
            for token_set in INCLUDED
            for part in (ResidualDrift, ParticipationRatio)
        ]

    def sum_shapes(self, spec: StreamSpec) -> Mapping[str, tuple[int, ...]]:
        """Nothing of its own: the parts keep the sums."""
        return {}

    def open(self, spec: StreamSpec) -> None:
        """Open the parts, without tokens sampled for intervals, which the audit does not give."""
        super().open(spec)
        for _, part in self._parts:
            part.open(_unsampled(spec))

    def state_bytes(self, spec: StreamSpec) -> int:
        """Memory of the parts."""
        return sum(part.state_bytes(_unsampled(spec)) for _, part in self._parts)

    def update(self, pair: StreamPair) -> None:
        """Add one batch to every part."""
        for _, part in self._parts:
            part.update(pair)

    def merge(self, other: Probe) -> None:
        """Merge part by part."""
        self._check_mergeable(other)
        parts = cast(ArtefactAudit, other)._parts
        for (_, part), (_, theirs) in zip(self._parts, parts, strict=True):
            part.merge(theirs)

    def all_reduce(self) -> None:
        """Reduce part by part."""
        for _, part in self._parts:
            part.all_reduce()

    def compute(self) -> ProbeResult:
        """The parts' L2 and change of dimension, renamed after the tokens they include."""
        rows = (
            row._replace(probe=self.name, metric=f"{row.metric}_{INCLUDED[token_set]}")
            for token_set, part in self._parts
            for row in part.compute().rows
            if row.metric in ("l2", "delta")
        )
        return ProbeResult(tuple(rows))


def _unsampled(spec: StreamSpec) -> StreamSpec:
    return replace(spec, n_sampled_sequences=0, n_sampled_tokens=0)
