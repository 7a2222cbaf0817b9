"""One pass over the texts where everything fits in memory, several where it does not.

Sums of d_model² numbers per layer are larger than the weights of wide models. Probes that keep
such sums can be split by layers, and each part gets its own pass: the same numbers, more time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import Protocol, runtime_checkable

from ..data.corpus import Corpus
from ..hooks import surface
from ..hooks.surface import HookedModel
from ..results.rows import joined
from .failures import run_probe_step
from .memory import free_bytes
from .streaming import PassOptions, PassResult, RunsInAPass, pass_memory, run_pass, stream_spec
from .streams import StreamSpec


@runtime_checkable
class SplitsByLayers(RunsInAPass, Protocol):
    """A probe whose layers can be measured apart."""

    def split(self, spec: StreamSpec, n: int) -> Sequence[RunsInAPass]:
        """At most n probes whose rows in turn are this one's."""


def run_passes(
    base: HookedModel,
    tuned: HookedModel,
    corpus: Corpus,
    probes: Sequence[RunsInAPass],
    options: PassOptions,
) -> PassResult:
    """`run_pass`, over the texts as often as the memory requires.

    Probes that were split hold no sums afterwards.

    Raises:
        HyperlensError: as `run_pass`; ResourceError only if a single layer is too much.
    """
    passes = plan_passes(base, corpus, probes, options)
    n_passes = len(passes)
    done: list[PassResult] = []
    while passes:
        chosen = passes.pop(0)  # the last reference: its sums are freed before the next pass
        title = f"{options.title} ({len(done) + 1} of {n_passes})" if n_passes > 1 else None
        kept = options.kept.of_part(len(done), n_passes) if options.kept is not None else None
        own = replace(options, title=title or options.title, kept=kept)
        done.append(run_pass(base, tuned, corpus, chosen, own))
    results = {
        probe.name: joined(part.results[probe.name] for part in done if probe.name in part.results)
        for probe in probes
    }
    return PassResult(results, done[0].sinks_per_layer, n_passes, done[0].shared)


def plan_passes(
    base: HookedModel, corpus: Corpus, probes: Sequence[RunsInAPass], options: PassOptions
) -> list[list[RunsInAPass]]:
    """The probes of each pass: as few passes as fit, or as many as there are."""
    device = surface.input_device(base)
    spec, free = stream_spec(base, corpus, device), free_bytes(device)
    passes = [list(probes)]
    for n in range(2, len(spec.layers) + 1):
        # Not the first alone: the last layer may take more than others.
        if max(pass_memory(base, corpus, chosen, options).total for chosen in passes) <= free:
            break
        parts = (
            run_probe_step(probe, "split", spec, n)
            if isinstance(probe, SplitsByLayers)
            else [probe]
            for probe in probes
        )
        passes = [
            [probe for probe in together if probe is not None] for together in zip_longest(*parts)
        ]
    return passes
