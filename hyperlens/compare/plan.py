"""What a comparison will take, before any weights are read: FLOPs, bytes, memory and time.

Nothing but configurations, tokenizers and the texts is needed. The time comes from timing what a
comparison does on a model of the same width and vocabulary with few blocks, for a few tokens;
everything grows in proportion to the tokens, the layers, or both.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import nn

from ..checks import check_counts, check_types
from ..costs import ModelSize, build, config_of, fastest, in_bytes, in_time, size_of
from ..data.conversations import read_examples
from ..data.corpus import Batch, Corpus, are_token_ids, build_corpus, check_max_length
from ..data.reading import Reading, read_as
from ..errors import CorpusError
from ..files import expand_user
from ..hooks.loading import LoadedModel, parse_device, parse_dtype
from ..hooks.surface import evaluating, import_transformer_lens
from ..models.adapters import ADAPTER_CONFIG, adapter_folder
from ..models.kinds import Backend
from ..models.sources import best_device
from ..models.tokenizers import read_tokenizer
from ..pair import Pair
from ..passes.logits_reader import read_logits
from ..passes.multi_pass import plan_passes
from ..passes.streaming import (
    MAX_SAMPLED_SEQUENCES,
    PassOptions,
    pass_memory,
    read_pair,
    stream_spec,
)
from ..passes.streams import StreamPair, StreamSpec
from ..probes import LogitLens, ParticipationRatio, Probe, RankReordering, ResidualDrift
from ..render.blocks import Table, Text
from ..render.format import MISSING, count, listed
from ..render.terminal import to_text
from ..results.fingerprint import weights_sha256
from ..statistics.moments import corrected_traces, moments_of, naive_traces
from ..statistics.ratios import SampledTokens, measured_ratio, ratio_ends, sum_ends, weighted_ratio
from .run import checked_options, checked_probes

# The two models that are timed have so many blocks.
ONE, TWO = 1, 2
# About so many operations are timed, and at least so many tokens.
OPERATIONS, FEWEST_TOKENS = 1.5e10, 32
# A threshold that has sinks looked for, as almost every comparison has.
SINKS = 10.0
# Of an interval; of more texts than that the rest is reckoned.
OPERATIONS_OF_INTERVAL = 4e9
# Of the distances of a layer, for each number of a vector: three views, about ten of each.
DRIFT_OPERATIONS = 30
# Letters of a token, where no tokenizer is at hand.
LETTERS = 4
COUNTED = (ResidualDrift, ParticipationRatio, LogitLens, RankReordering)


class Part(NamedTuple):
    """What one part of a comparison will take.

    Attributes:
        name: of the part.
        flops: of its products.
        seconds: estimated.
    """

    name: str
    flops: float
    seconds: float


@dataclass(frozen=True)
class ComparisonPlan:
    """What a comparison will take.

    Attributes:
        model: the base, in words.
        device: what the times are for.
        n_texts, n_tokens: how much is read, BOS included.
        parts: in order.
        bytes_read: of the weights of both models.
        memory: of weights, sums and a batch at the peak, in bytes.
        n_passes: how often the texts are read, because the sums do not fit in memory at once.
        notes: what a reader of the plan should know.
    """

    model: str
    device: str
    n_texts: int
    n_tokens: int
    parts: tuple[Part, ...]
    bytes_read: float
    memory: float
    n_passes: int
    notes: tuple[str, ...] = ()

    @property
    def flops(self) -> float:
        """Of all parts."""
        return sum(part.flops for part in self.parts)

    @property
    def seconds(self) -> float:
        """Of all parts."""
        return sum(part.seconds for part in self.parts)

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return fields | {
            "seconds": self.seconds,
            "flops": self.flops,
            "parts": [part._asdict() for part in self.parts],
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        rows = [
            [part.name, f"{part.flops:.1e}" if part.flops else MISSING, in_time(part.seconds)]
            for part in (*self.parts, Part("all", self.flops, self.seconds))
        ]
        read = f"{count(self.n_texts, 'text')}, {count(self.n_tokens, 'token')}"
        passes = f", read {self.n_passes} times to fit in memory" if self.n_passes > 1 else ""
        sizes = (
            f"memory at the peak, besides Python and its libraries: {in_bytes(self.memory)}; "
            "weights to read: "
            f"{in_bytes(self.bytes_read)}"
        )
        return to_text(
            f"Plan for {self.model} on {self.device}: {read}{passes}",
            [
                Table(["part", "FLOPs", "time"], rows, CAPTION),
                Text(sizes),
                *(Text(note) for note in self.notes),
            ],
        )


CAPTION = (
    "time: of a few tokens and blocks, timed here; starting and loading are not counted. Expect it "
    "to be off by up to a factor of 1.5, and more where the machine is shared."
)


@check_types
def plan_comparison(
    base: Any,
    tuned: Any,
    texts: Any,
    *,
    probes: Sequence[Probe | str] | None = None,
    max_length: int = 256,
    batch_size: int = 8,
    include_bos: bool = False,
    chat_template: str | Path | None = None,
    roles: Sequence[str] | None = None,
    tokens: Any = None,
    sink_threshold: float = 10.0,
    lens_tokens: int | float | None = None,
    backend: Backend | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    seed: int = 0,
    n_tuned: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> ComparisonPlan:
    """Say what `compare_models` would take, without reading any weights.

    Args:
        base: the model before: a folder (its config.json suffices), hub id, model or
            configuration.
        tuned: the model after, or an adapter of the base. Only whether it is an adapter, and at
            which block that begins, matters.
        texts, probes, max_length, batch_size, include_bos: as in `compare_models`.
        chat_template, roles, tokens, sink_threshold, lens_tokens: as in `compare_models`.
        backend: as in `compare_models`; the time is that of "residual".
        device, dtype, seed: as in `compare_models`.
        n_tuned: how many tuned models like this one are compared with the base one after another,
            as `trace_trajectory` does with checkpoints.
        clock: in seconds; `time.process_time` gives CPU seconds.

    Raises:
        HyperlensError: LoadingError if there is no configuration of a causal language model;
            CorpusError or ProbeError as in `compare_models`.

    Example::

        print(plan_comparison("base", "tuned", "held_out.txt"))
    """
    check_counts(n_tuned=n_tuned)
    chosen = checked_probes(probes)
    options = checked_options(batch_size, sink_threshold, seed, False, lens_tokens)
    check_max_length(max_length)
    config = config_of(base)
    size = size_of(config)
    where = parse_device(device) or best_device()
    kind = parse_dtype(dtype) or _dtype_of(config)
    described = _Described(config, size, where, kind)
    reading = read_as(chat_template, roles, tokens)
    corpus, notes = _corpus(base, tuned, texts, described, max_length, include_bos, reading)
    adapter = _Adapter.of(tuned)
    passes = plan_passes(described, corpus, chosen, options)
    needed = max(pass_memory(described, corpus, part, options).likely for part in passes)
    weights = size.parameters * kind.itemsize
    spec = stream_spec(described, corpus, where)
    work = _Work(size, corpus, chosen, options, spec, kind.itemsize, adapter, n_tuned)
    speed = measure_speed_of_reading(config, kind, where, work, clock)
    unknown = [probe.name for probe in chosen if type(probe) not in COUNTED]
    if unknown:
        notes = (*notes, f"not counted: {listed(unknown)}")
    words = f"{size.parameters / 1e6:,.1f}M parameters, {count(size.n_layers, 'block')}"
    name = Path(str(base)).name if isinstance(base, str | Path) else type(base).__name__
    stored = size.parameters * _dtype_of(config).itemsize
    return ComparisonPlan(
        model=f"{name} ({words})",
        device=str(where),
        n_texts=len(corpus.sequences),
        n_tokens=corpus.counts.n_tokens,
        parts=tuple(work.parts(speed, len(passes))),
        bytes_read=stored + n_tuned * (stored if adapter is None else adapter.n_bytes),
        memory=needed + (2 * weights if adapter is None else weights + adapter.n_bytes),
        n_passes=len(passes),
        notes=notes,
    )


class _Described(nn.Module):
    """A hooked model as far as its configuration tells, for those who ask for its sizes alone."""

    hook_dict: ClassVar[Mapping[str, Any]] = {}

    def __init__(
        self, config: Any, size: ModelSize, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__()
        inner = config.get_text_config()
        self.config = config
        self.cfg = SimpleNamespace(
            n_layers=size.n_layers,
            d_model=size.d_model,
            d_vocab=size.d_vocab,
            n_ctx=max(0, getattr(inner, "max_position_embeddings", 0) or 0),
            dtype=dtype,
            device=device,
        )
        self.nothing = nn.Parameter(torch.empty(0, device=device))

    def run_with_hooks(self, *args: Any, **kwargs: Any) -> Any:
        """It cannot be run."""
        raise NotImplementedError


def _dtype_of(config: Any) -> torch.dtype:
    inner = config.get_text_config()
    found = getattr(config, "dtype", None) or getattr(inner, "dtype", None) or torch.float32
    return getattr(torch, found) if isinstance(found, str) else found


@dataclass(frozen=True)
class _Adapter:
    """An adapter as far as its files tell.

    Attributes:
        n_bytes: of its weights.
        first_block: the first one that it changes; None where that is not known.
    """

    n_bytes: float
    first_block: int | None

    @classmethod
    def of(cls, source: Any) -> _Adapter | None:
        """None for a whole model."""
        folder = adapter_folder(source)
        if folder is None:
            return None
        n_bytes = float(sum(path.stat().st_size for path in folder.glob("adapter_model*")))
        config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        blocks = config.get("layers_to_transform")
        if blocks is None or config.get("modules_to_save"):
            return cls(n_bytes, None)
        return cls(n_bytes, min(blocks) if isinstance(blocks, list) else blocks)


def _corpus(
    base: Any,
    tuned: Any,
    texts: Any,
    described: _Described,
    max_length: int,
    include_bos: bool,
    reading: Reading,
) -> tuple[Corpus, tuple[str, ...]]:
    """The texts as a comparison reads them, or about so where there is no tokenizer."""
    tokenizers = [_tokenizer(source) for source in (base, tuned)]
    first, second = (
        LoadedModel(described, one, "", "", (), hooked=described, backend="residual")
        for one in tokenizers
    )
    if are_token_ids(texts) or any(one is not None for one in tokenizers):
        pair = Pair(first, second)
        found = pair.tokenize(
            texts, max_length=max_length, include_bos=include_bos, reading=reading
        )
        return found, ()
    rows = read_examples(texts)
    if not all(isinstance(row, str) for row in rows):
        raise CorpusError(
            "conversations are written by a chat template, and neither model has a tokenizer: "
            "give a folder that has one"
        )
    lengths = [max(2, len(row) // LETTERS) for row in rows]
    ids = [np.full(min(n, max_length), 2 % described.cfg.d_vocab) for n in lengths]
    note = f"there is no tokenizer: a token is taken for {LETTERS} letters"
    return build_corpus(ids, None, max_length=max_length, include_bos=include_bos), (note,)


def _tokenizer(source: Any) -> Any:
    if isinstance(source, tuple) and len(source) == 2:
        return source[1]
    if not isinstance(source, str | Path):
        return None
    folder = expand_user(source)
    return read_tokenizer(str(folder), local=True) if folder.is_dir() else _of_hub(str(source))


def _of_hub(name: str) -> Any:
    from ..errors import LoadingError

    try:
        return read_tokenizer(name, local=False)
    except LoadingError:  # an adapter without one
        return None


@dataclass(frozen=True)
class SpeedOfReading:
    """Seconds of what a comparison does.

    Attributes:
        block: of one model, for a token.
        rest: of a model's embedding and of what is looked up in its stream, for a token.
        lens: of both models' logits at one layer and what is read of them, for a token.
        ranks: of the output's ranks, for a token.
        drift: of one layer, for a token.
        moments: of one layer and view of a model, for a token.
        add: of the same, for a batch.
        interval: of one layer and view, both models and their difference.
        hash: for a byte.
    """

    block: float
    rest: float
    lens: float
    ranks: float
    drift: float
    moments: float
    add: float
    interval: float
    hash: float


@dataclass(frozen=True)
class _Work:
    """How much there is to do.

    Attributes:
        size: of the base.
        corpus: what is read.
        probes: what is measured.
        options: how it is read.
        spec: sizes of the pass.
        itemsize: bytes of a weight.
        adapter: None where the tuned model is a whole one.
        n_tuned: how many tuned models there are.
    """

    size: ModelSize
    corpus: Corpus
    probes: Sequence[Probe]
    options: PassOptions
    spec: StreamSpec
    itemsize: int
    adapter: _Adapter | None = None
    n_tuned: int = 1

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Texts and positions of every batch, pads included."""
        sequences, size = self.corpus.sequences, self.options.batch_size
        starts = range(0, len(sequences), size)
        return [(len(sequences[i : i + size]), len(sequences[i])) for i in starts]

    @property
    def same_blocks(self) -> int:
        """So many blocks from the first on are the same in both models."""
        first = None if self.adapter is None else self.adapter.first_block
        return min(first or 0, self.size.n_layers)

    def times(self, layer: int) -> float:
        """How often a layer is measured, of both models: half of it where they are the same."""
        return 0.5 if self.same_blocks and layer <= self.same_blocks else 1.0

    def layers_of(self, kind: type[Probe]) -> tuple[int, ...]:
        """The layers at which a probe of this kind measures."""
        found = [one for one in self.probes if type(one) is kind]
        return tuple(
            layer
            for one in found
            for layer in self.spec.resolve_layers(getattr(one, "layers", None))
        )

    def parts(self, speed: SpeedOfReading, n_passes: int) -> list[Part]:
        """Every part, with all tuned models and passes."""
        size, d, n = self.size, self.size.d_model, self.n_tuned
        padded = float(sum(rows * length for rows, length in self.shapes))
        squares = float(sum(rows * length**2 for rows, length in self.shapes))
        _, decisions = self.corpus.n_read_by_lens(1.0)
        blocks = 2 * size.n_layers - self.same_blocks
        of_blocks = 2 * padded * size.in_blocks / size.n_layers + 4 * squares * d
        hashed = self.itemsize * size.parameters * (1 if self.adapter else 1 + n)
        seconds = padded * (2 * speed.rest + blocks * speed.block)
        found = [
            Part("hashing the weights", 0.0, speed.hash * hashed),
            Part("reading", n * n_passes * blocks * of_blocks, n * n_passes * seconds),
        ]
        lens = self.layers_of(LogitLens)
        if lens:
            n_read = decisions
            if self.options.lens_tokens is not None:
                n_read, _ = self.corpus.n_read_by_lens(self.options.lens_tokens)
            rows = n * sum(
                self.times(layer) * (n_read if layer < size.n_layers else decisions)
                for layer in lens
            )
            found.append(Part("logit lens", 4 * rows * size.in_head, rows * speed.lens))
        if self.layers_of(RankReordering):
            rows = n * decisions
            alone = size.n_layers not in lens
            flops = 4 * rows * size.in_head if alone else 0.0
            seconds = rows * (speed.ranks + (speed.lens if alone else 0.0))
            found.append(Part("output ranks", flops, seconds))
        if self.layers_of(ResidualDrift):
            rows = n * decisions * sum(map(self.times, self.layers_of(ResidualDrift)))
            found.append(Part("drift", DRIFT_OPERATIONS * rows * d, rows * speed.drift))
        for probe in self.probes:
            if type(probe) is not ParticipationRatio:
                continue
            sets = n * len(probe.views) * sum(map(self.times, self.layers_of(ParticipationRatio)))
            seconds = 2 * sets * (decisions * speed.moments + len(self.shapes) * speed.add)
            found.append(Part("dimensions", 4 * sets * decisions * d**2, seconds))
            flops = 2 * sets * interval_operations(self.spec.n_sampled_sequences, self.spec)
            found.append(Part("intervals of dimensions", flops, sets * speed.interval))
        return found


def interval_operations(n: int, spec: StreamSpec) -> float:
    """About how many operations the interval of one participation ratio of n texts takes."""
    tokens, d = spec.n_sampled_tokens, spec.d_model
    of_pairs = min(d * d * n * (tokens + n), n * n * tokens * tokens * d)
    return float(of_pairs if n <= MAX_SAMPLED_SEQUENCES else 0) + 2.0 * n * tokens * d * d


def measure_speed_of_reading(
    config: Any,
    dtype: torch.dtype,
    device: torch.device,
    work: _Work,
    clock: Callable[[], float] = time.perf_counter,
) -> SpeedOfReading:
    """Time what a comparison does, on models with one and with two blocks.

    Args:
        config: of the base.
        dtype: of the weights.
        device: where to time.
        work: what is to be done; decides the shapes that are timed.
        clock: in seconds.
    """
    import_transformer_lens()
    from ..hooks.residual import ResidualModel

    def seconds(function: Callable[[], Any]) -> float:
        return fastest(function, device, clock)

    size, spec = work.size, replace(work.spec, n_layers=ONE)
    batch = _batch_to_time(work, device)
    n = batch.tokens.numel()
    pairs, times = {}, {}
    for n_blocks in (ONE, TWO):
        model: Any = ResidualModel(build(config, n_blocks, device).to(dtype).eval())
        with evaluating(model), torch.no_grad():
            read = partial(read_pair, model, model, batch, SINKS, spec.device)
            times[n_blocks] = seconds(read)
            pairs[n_blocks] = read()
    pair = pairs[ONE]
    block = max(0.0, times[TWO] - times[ONE])
    with torch.no_grad():
        lens, with_ranks = LogitLens(layers=(ONE,)), [RankReordering(), LogitLens(layers=(ONE,))]
        drift = ResidualDrift(layers=(0,), with_excluded=True)
        for probe in (lens, *with_ranks, drift):
            probe.open(spec)
        of_lens = seconds(lambda: read_logits(pair, [lens]))
        of_both = seconds(lambda: read_logits(pair, with_ranks))
        of_drift = seconds(lambda: drift.update(pair))
        of_moments, add, interval = _time_dimensions(pair, spec, size, seconds)
    hashed = nn.Linear(1024, 1024, bias=False)
    return SpeedOfReading(
        block=block / (2 * n),
        rest=max(0.0, times[ONE] - block) / (2 * n),
        lens=of_lens / n,
        ranks=max(0.0, of_both - of_lens) / n,
        drift=of_drift / n,
        moments=of_moments / n,
        add=add,
        interval=interval,
        hash=seconds(lambda: weights_sha256(hashed)) / (4 * hashed.weight.numel()),
    )


def _batch_to_time(work: _Work, device: torch.device) -> Batch:
    """Arbitrary tokens in the shape of the first batch, as many of them as are quickly read."""
    size, (rows, length) = work.size, work.shapes[0]
    per_token = 2 * (6 * size.in_blocks / size.n_layers + 6 * size.in_head)
    most = max(FEWEST_TOKENS, int(OPERATIONS / per_token))
    length = min(length, most)
    rows = max(1, min(rows, most // length))
    tokens = torch.randint(size.d_vocab, (rows, length), device=device)
    none = torch.zeros_like(tokens, dtype=torch.bool)
    return Batch(
        tokens=tokens,
        real=~none,
        bos=none,
        slot=torch.full((rows,), -1),
        position=torch.full((rows, work.spec.n_sampled_tokens), -1),
    )


def _time_dimensions(
    pair: StreamPair, spec: StreamSpec, size: ModelSize, seconds: Callable[[Any], float]
) -> tuple[float, float, float]:
    """Seconds of the moments of a batch's vectors, of adding them, and of an interval."""
    d = size.d_model
    origin = torch.zeros(d, dtype=torch.float64, device=spec.device)
    index = pair.index(0, "decisions")

    def moments() -> Any:
        return moments_of(pair.base.vectors(0, "unit_rms", index).to(spec.device), origin)

    of_moments, one = seconds(moments), moments()
    total = torch.zeros_like(one.outer)
    add = seconds(lambda: total.add_(one.outer))
    n = all_texts = spec.n_sampled_sequences
    while n > 8 and interval_operations(n, spec) > OPERATIONS_OF_INTERVAL:
        n //= 2
    scale = interval_operations(all_texts, spec) / interval_operations(n, spec)
    shape = (n, spec.n_sampled_tokens)
    length = torch.full(shape[:1], 2.0 * shape[1], dtype=torch.float64, device=spec.device)
    vectors = torch.randn(*shape, d, device=spec.device).to(torch.float64)
    whole = replace(one, n=length.sum())
    sample = SampledTokens(
        vectors=vectors,
        valid=torch.ones(shape, dtype=torch.bool, device=spec.device),
        length=length,
        sum_nn=float(length.square().sum()),
    )

    def interval() -> None:
        measured = [measured_ratio(whole, sample, all_texts <= MAX_SAMPLED_SEQUENCES)] * 2
        corrected_traces(whole), naive_traces(whole)
        ratio_ends(measured[0], d)

    def difference() -> None:
        sum_ends(weighted_ratio([(1.0, known), (-1.0, known)]))

    known = measured_ratio(whole, sample, all_texts <= MAX_SAMPLED_SEQUENCES)
    return of_moments, add, 2 * scale * seconds(interval) + seconds(difference)
