"""One pass over the texts: both models on every batch, their residuals shown to all probes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from .. import processes
from ..data.corpus import Batch, Corpus
from ..errors import ActivationError, ResourceError
from ..hooks import surface
from ..hooks.surface import HookedModel
from ..results.rows import ProbeResult
from ..statistics import distances
from .failures import explaining_out_of_memory, run_probe_step
from .kept_sums import KeptSums, SumsKeeper
from .logits_reader import ReadsLogits, read_logits
from .memory import MemoryNeeded, free_bytes, keep_freed_memory, memory_needed
from .shared_prefix import run_tuned, shared_on
from .streams import (
    NOTHING_SHARED,
    ModelStream,
    SharedPrefix,
    StreamPair,
    StreamSpec,
    TokenSample,
)

# Tokens are kept for intervals in at most this many bytes per layer, view and model, or in as
# many as the moments of that stream take.
SAMPLE_BYTES = 2 * 2**20
# So many groups at most are drawn anew for an interval; of more, it is linearised.
MAX_SAMPLED_SEQUENCES = 128
MAX_SAMPLED_TOKENS = 8192
# All pairs of tokens of a text or group are held at once.
MAX_TOKENS_OF_UNIT = 1024


@runtime_checkable
class RunsInAPass(Protocol):
    """What the pass needs of a probe."""

    @property
    def name(self) -> str:
        """What its rows are called."""

    def open(self, spec: StreamSpec) -> None:
        """Allocate."""

    def update(self, pair: StreamPair) -> None:
        """Add one batch."""

    def compute(self) -> ProbeResult:
        """Read the result."""

    def state_bytes(self, spec: StreamSpec) -> int:
        """Memory `open` will take."""


@runtime_checkable
class AddsUp(RunsInAPass, Protocol):
    """A probe that several processes can share."""

    def share_origin(self) -> None:
        """Take what sums are about from the first process."""

    def all_reduce(self) -> None:
        """Add up the sums of all processes."""


@dataclass(frozen=True)
class PassOptions:
    """How the pass is run.

    Attributes:
        batch_size: sequences per batch.
        sink_threshold: a position whose raw norm exceeds this many times its sequence's median
            at a layer, in either model, is an attention sink there; 0 turns the mask off.
        seed: of the token samples.
        progress: show a progress bar.
        title: what the bar is called.
        kept: where sums are kept while the pass runs, to go on from; None keeps nothing.
        lens_tokens: how many tokens of each text a sampled logit lens reads below the output, or
            what share of them; None for all.
    """

    batch_size: int
    sink_threshold: float
    seed: int
    progress: bool
    title: str = "comparing"
    kept: KeptSums | None = None
    lens_tokens: int | float | None = None


@dataclass(frozen=True)
class PassResult:
    """Results by probe name, and how they were obtained.

    Attributes:
        results: by the name of the probe.
        sinks_per_layer: how many tokens were masked as sinks at each layer.
        n_passes: how often the texts were read.
        shared: what both models have in common, which was read once.
    """

    results: dict[str, ProbeResult]
    sinks_per_layer: tuple[int, ...]
    n_passes: int = 1
    shared: SharedPrefix = NOTHING_SHARED


def run_pass(
    base: HookedModel,
    tuned: HookedModel,
    corpus: Corpus,
    probes: Sequence[RunsInAPass],
    options: PassOptions,
) -> PassResult:
    """Feed every batch's residual streams to all probes.

    Raises:
        ActivationError: if a model produces NaN or infinite activations.
        ProbeError: if a probe fails.
        ResourceError: if the probes' sums or a batch cannot fit in memory.
    """
    keep_freed_memory()
    device = surface.input_device(base)
    spec = stream_spec(base, corpus, device)
    _check_memory(pass_memory(base, corpus, probes, options), device, options.progress)
    with explaining_out_of_memory(options.batch_size, ", or measure fewer views or layers"):
        for probe in probes:
            run_probe_step(probe, "open", spec)
        shared = shared_on(base, tuned, corpus.sequences[0])
        share = _share(probes)
        sinks = _read_texts(base, tuned, corpus, probes, options, spec, shared, share)
        if share[1] > 1:
            sinks = torch.tensor(processes.summed(*sinks.tolist())).long()
            for probe in probes:
                run_probe_step(probe, "all_reduce")
        # A probe may divide what it makes of the sums, which are now the same everywhere.
        with processes.in_step():
            results = {probe.name: run_probe_step(probe, "compute") for probe in probes}
    return PassResult(results, tuple(sinks.tolist()), shared=shared)


def _read_texts(
    base: HookedModel,
    tuned: HookedModel,
    corpus: Corpus,
    probes: Sequence[RunsInAPass],
    options: PassOptions,
    spec: StreamSpec,
    shared: SharedPrefix,
    share: tuple[int, int],
) -> Int[Tensor, " layer"]:
    """Show every batch of this process's share to all probes, and count the sinks of all."""
    sinks = torch.zeros(spec.n_layers + 1, dtype=torch.int64)
    batches = corpus.batches(
        options.batch_size,
        n_sampled_sequences=spec.n_sampled_sequences,
        n_sampled_tokens=spec.n_sampled_tokens,
        lens_tokens=options.lens_tokens,
        seed=options.seed,
        share=share,
    )
    n_tokens = corpus.counts.n_tokens
    kept = options.kept.of_part(*share) if options.kept is not None else None
    keeper = SumsKeeper(kept, probes, sinks)
    hidden = not options.progress or not processes.is_heard()
    bar = tqdm(total=n_tokens, unit="tok", desc=options.title, disable=hidden)
    has_begun = share[1] == 1
    with bar, surface.evaluating(base), surface.evaluating(tuned):
        for i, batch in enumerate(batches):
            if i >= keeper.batches:
                pair = read_pair(base, tuned, batch, options.sink_threshold, spec.device, shared)
                sinks += _update(probes, pair) if has_begun else _begin_together(probes, pair)
                has_begun = True
                # Its streams are let go before the next ones, or the results, are made.
                del pair
                keeper.batch_done()
            # Other processes are about as far.
            bar.update(min(int(batch.real.sum()) * share[1], n_tokens - bar.n))
    if not has_begun:
        _begin_together(probes, None)
    return sinks


def _share(probes: Sequence[RunsInAPass]) -> tuple[int, int]:
    """This process's share of the batches; all of them where a probe cannot be shared."""
    return processes.share() if all(isinstance(one, AddsUp) for one in probes) else (0, 1)


def _begin_together(probes: Sequence[RunsInAPass], pair: StreamPair | None) -> Tensor | int:
    """The first batch of this process, if it has any: sums are about what the first one chooses.

    The others have run their models on theirs meanwhile.
    """
    sinks: Tensor | int = 0
    if processes.is_first() and pair is not None:
        sinks = _update(probes, pair)
    for probe in probes:
        run_probe_step(probe, "share_origin")
    if not processes.is_first() and pair is not None:
        sinks = _update(probes, pair)
    return sinks


def _update(probes: Sequence[RunsInAPass], pair: StreamPair) -> Int[Tensor, " layer"]:
    """Show a batch to all probes, and count its sinks."""
    for probe in probes:
        if not isinstance(probe, ReadsLogits):
            run_probe_step(probe, "update", pair)
    read_logits(pair, [probe for probe in probes if isinstance(probe, ReadsLogits)])
    return (pair.sinks & pair.mask(0, "decisions")).sum((-1, -2)).cpu()


def pass_memory(
    base: HookedModel, corpus: Corpus, probes: Sequence[RunsInAPass], options: PassOptions
) -> MemoryNeeded:
    """The memory that `run_pass` needs besides the weights.

    Raises:
        ProbeError: if a probe's `state_bytes` fails.
    """
    spec = stream_spec(base, corpus, surface.input_device(base))
    rows = min(options.batch_size, corpus.counts.n_sequences) * len(corpus.sequences[0])
    return memory_needed(spec, probes, rows, base.cfg.dtype)


def stream_spec(model: HookedModel, corpus: Corpus, device: torch.device) -> StreamSpec:
    """The sizes of this run. Sums live on the CPU where the accelerator has no float64."""
    d_model = model.cfg.d_model
    budget = min(max(SAMPLE_BYTES // (4 * d_model), 2 * d_model), MAX_SAMPLED_TOKENS)
    grouped = corpus.groups is not None
    sequences = corpus.n_units if grouped else min(corpus.n_units, MAX_SAMPLED_SEQUENCES)
    longest = min(corpus.longest_unit(), MAX_TOKENS_OF_UNIT)
    return StreamSpec(
        n_layers=model.cfg.n_layers,
        d_model=d_model,
        d_vocab=model.cfg.d_vocab,
        device=torch.device("cpu") if device.type == "mps" else device,
        n_sampled_sequences=sequences,
        n_sampled_tokens=max(2, min(longest, budget // sequences)),
        grouped=grouped,
    )


def read_pair(
    base: HookedModel,
    tuned: HookedModel,
    batch: Batch,
    sink_threshold: float,
    device: torch.device,
    shared: SharedPrefix = NOTHING_SHARED,
) -> StreamPair:
    """Run both models on one batch and gather what probes see.

    Args:
        base, tuned: the models.
        batch: what they read.
        sink_threshold: see `PassOptions`.
        device: where statistics are computed.
        shared: what both have in common, which is run once.

    Raises:
        ActivationError: if a residual stream holds NaN or infinity at a real token.
    """
    here = surface.input_device(base)
    tokens, real, bos = (x.to(here) for x in (batch.tokens, batch.real, batch.bos))
    of_base = surface.run_residuals(base, tokens, real.long())
    _check_finite("base", of_base, real)
    of_tuned = run_tuned(tuned, tokens, real.long(), shared, of_base)
    _check_finite("tuned", of_tuned, real)
    big = [_exceeds_median(residuals, real, sink_threshold) for residuals in (of_base, of_tuned)]
    return StreamPair(
        base=_stream(base, of_base),
        tuned=_stream(tuned, of_tuned),
        tokens=tokens,
        real=real,
        bos=bos,
        sinks=big[0] | big[1],
        sample=TokenSample(batch.slot.to(here), batch.position.to(here)),
        device=device,
        shared=shared,
        chosen=None if batch.chosen is None else batch.chosen.to(here),
        roles=None if batch.roles is None else batch.roles.to(here),
        lens=None if batch.lens is None else batch.lens.to(here),
    )


def _stream(model: HookedModel, residuals: list[Tensor]) -> ModelStream:
    return ModelStream(
        residuals=residuals,
        final_norm=partial(surface.final_norm, model),
        unembed=partial(surface.float_logits, model),
        d_vocab=model.cfg.d_vocab,
    )


def _exceeds_median(
    residuals: list[Float[Tensor, "batch pos d_model"]],
    real: Bool[Tensor, "batch pos"],
    threshold: float,
) -> Bool[Tensor, "layer batch pos"]:
    if threshold == 0:
        return torch.zeros((len(residuals), *real.shape), dtype=torch.bool, device=real.device)
    norms = torch.stack([torch.linalg.vector_norm(r.float(), dim=-1) for r in residuals])
    median = distances.masked_median(norms, real.expand_as(norms))
    return (norms > threshold * median[..., None]) & real


def _check_finite(
    role: str, residuals: list[Float[Tensor, "batch pos d_model"]], real: Bool[Tensor, "batch pos"]
) -> None:
    layer = surface.first_bad_layer(residuals, real)
    if layer is not None:
        where = "its embedding" if layer == 0 else f"block {layer - 1} (layer {layer})"
        raise ActivationError(
            f"the {role} model's activations become NaN or infinite in {where}: check its "
            "weights, or run it in float32 or bfloat16 (dtype=…)"
        )


def _check_memory(needed: MemoryNeeded, device: torch.device, progress: bool) -> None:
    free = free_bytes(device)
    sums, streams = needed.sums / 2**30, needed.streams / 2**30
    if needed.total > free:
        raise ResourceError(
            f"this comparison needs about {needed.total / 2**30:.1f} GiB ({sums:.1f} for the "
            f"probes' sums, {streams:.1f} for a batch) and {free / 2**30:.1f} GiB is "
            "free: give probes fewer views or layers, e.g. ParticipationRatio(views=['raw']), "
            "or lower batch_size"
        )
    if progress and needed.total > 2**30:
        tqdm.write(
            f"memory besides the weights: {sums:.1f} GiB of sums, {streams:.1f} GiB per batch",
            file=sys.stderr,
        )
