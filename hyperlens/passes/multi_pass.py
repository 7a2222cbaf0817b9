"""One pass over the texts where everything fits in memory, several where it does not.

Sums of d_model² numbers per layer outgrow the weights of wide models. Probes that keep them can
be split by layers, and each part gets a pass of its own: the same numbers for more time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import Any, Protocol, runtime_checkable

from ..data.corpus import Corpus
from ..hooks import surface
from ..hooks.surface import HookedModel
from ..results.rows import ProbeResult, Row
from .failures import guarded
from .memory import free_bytes
from .streaming import PassOptions, PassResult, RunsInAPass, pass_memory, run_pass, stream_spec
from .streams import StreamSpec


@runtime_checkable
class SplitsByLayers(RunsInAPass, Protocol):
    """A probe whose layers can be measured apart."""

    def split(self, spec: StreamSpec, n: int) -> Sequence[RunsInAPass]:
        """At most n probes, the largest first, whose rows in turn are this one's."""


def run_passes(
    base: HookedModel,
    tuned: HookedModel,
    corpus: Corpus,
    probes: Sequence[RunsInAPass],
    options: PassOptions,
) -> PassResult:
    """`run_pass`, over the texts as often as memory demands.

    Probes that were split hold no sums afterwards.

    Raises:
        HyperlensError: as `run_pass`; ResourceError only if a single layer is too much.
    """
    rounds = _rounds(base, corpus, probes, options)
    n_passes = len(rounds)
    found: list[PassResult] = []
    while rounds:
        chosen = rounds.pop(0)  # nothing else holds it: its sums make room for the next
        title = f"{options.title} ({len(found) + 1} of {n_passes})" if n_passes > 1 else None
        apart = replace(options, title=title or options.title)
        found.append(run_pass(base, tuned, corpus, chosen, apart))
    results = {
        probe.name: _joined(one.results[probe.name] for one in found if probe.name in one.results)
        for probe in probes
    }
    return PassResult(results, found[0].sinks_per_layer, n_passes)


def _rounds(
    base: HookedModel, corpus: Corpus, probes: Sequence[RunsInAPass], options: PassOptions
) -> list[list[RunsInAPass]]:
    """The probes of each pass: as few passes as fit, or as many as there are."""
    device = surface.input_device(base)
    spec, free = stream_spec(base, corpus, device), free_bytes(device)
    rounds = [list(probes)]
    for n in range(2, len(spec.layers) + 1):
        if pass_memory(base, corpus, rounds[0], options).total <= free:
            break
        parts = (
            guarded(probe, "split", spec, n) if isinstance(probe, SplitsByLayers) else [probe]
            for probe in probes
        )
        rounds = [[one for one in chosen if one is not None] for chosen in zip_longest(*parts)]
    return rounds


def _joined(parts: Iterable[ProbeResult]) -> ProbeResult:
    rows: list[Row] = []
    extras: dict[str, Any] = {}
    for part in parts:
        rows.extend(part.rows)
        extras.update(part.extras)
    return ProbeResult(tuple(rows), extras)
