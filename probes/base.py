"""What every probe is: named sums, updated batch by batch, merged by adding, read at the end.

`Probe` is the base of all; `MeanProbe` of means over tokens of what vectors say, `LogitProbe` of
means of what logits say, with 95% intervals over sequences.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from ..errors import ProbeError
from ..passes.logits_reader import LogitChunk, read_logits, reads_sample
from ..passes.streams import (
    StreamPair,
    StreamSpec,
    TokenSet,
    View,
    checked_layers,
    checked_token_set,
)
from ..results.rows import ProbeResult, Row
from ..statistics.intervals import mean_half_width
from ..statistics.shares import ratio

# What metrics are called with the tokens of each of WIDER_SETS counted in.
WITH_EXCLUDED = ("with_sinks", "with_sinks_and_bos")


def views_with_excluded(layer: int, spec: StreamSpec) -> tuple[View, ...]:
    """The views that a script reads a layer in, where the tokens left out are kept as well.

    Hugging Face's `hidden_states` are raw, but for the last, which is taken after the final norm.
    """
    return ("raw", "final_norm") if layer == spec.n_layers else ("raw",)


class Probe(ABC):
    """A statistic over pairs of residual streams, held as named float64 sums.

    Because a probe's state is nothing but sums allocated by `open`, batching is invisible,
    shards merge exactly, and memory does not grow with the number of tokens. Subclass
    `MeanProbe` for anything that is a mean over tokens; subclass this for the rest.
    """

    name: ClassVar[str]
    float32_sums: ClassVar[frozenset[str]] = frozenset()

    spec: StreamSpec
    sums: dict[str, Tensor]

    @abstractmethod
    def sum_shapes(self, spec: StreamSpec) -> Mapping[str, tuple[int, ...]]:
        """Name and shape of every sum this probe keeps."""

    @abstractmethod
    def update(self, pair: StreamPair) -> None:
        """Add one batch to the sums, and do nothing else."""

    @abstractmethod
    def compute(self) -> ProbeResult:
        """Rows of the table from the sums so far; leaves the sums as they are."""

    def open(self, spec: StreamSpec) -> None:
        """Start from zero for models of these sizes."""
        self.spec = spec
        self.sums = {
            name: torch.zeros(shape, dtype=self._dtype(name), device=spec.device)
            for name, shape in self.sum_shapes(spec).items()
        }

    def state_bytes(self, spec: StreamSpec) -> int:
        """Memory `open` would take, to be known before a run."""
        return sum(
            math.prod(shape) * self._dtype(name).itemsize
            for name, shape in self.sum_shapes(spec).items()
        )

    def merge(self, other: Probe) -> None:
        """Add another shard's sums to this one's: the same as having seen its batches too.

        Raises:
            ProbeError: if the other probe is of another kind or for other models.
        """
        self._check_mergeable(other)
        for name, value in other.sums.items():
            self.sums[name] += value

    def share_origin(self) -> None:  # noqa: B027
        """Take what the sums are about from the first rank, which has seen its first batch.

        Called on every rank, before any other rank has seen a batch. Sums about zero need nothing.
        """

    def all_reduce(self) -> None:
        """Add up the sums of all `torch.distributed` ranks, in place, on every rank."""
        for value in self.sums.values():
            torch.distributed.all_reduce(value)

    def options(self) -> dict[str, Any]:
        """The settings this probe was made with, for the record of the run."""
        settings = {k: v for k, v in vars(self).items() if k not in ("spec", "sums")}
        return {k: v for k, v in settings.items() if not k.startswith("_")}

    def _check_mergeable(self, other: Probe) -> None:
        if type(other) is not type(self) or other.options() != self.options():
            raise ProbeError(
                f"cannot merge {type(other).__name__}{other.options()} into "
                f"{type(self).__name__}{self.options()}: make both with the same settings"
            )
        if other.spec != self.spec:
            raise ProbeError(
                "cannot merge probes opened for different models or token samples: "
                f"{other.spec} and {self.spec}"
            )

    def _dtype(self, name: str) -> torch.dtype:
        return torch.float32 if name in self.float32_sums else torch.float64


class TokenMeans(Probe):
    """Means of one number per token, with the interval of a ratio of per-sequence sums.

    Subclasses get the numbers and hand them to `add`; the sums, the cluster-robust intervals and
    the rows of the table follow. `MeanProbe` gets them from vectors, `LogitProbe` from logits.

    Attributes:
        metrics: names of the numbers.
        views: the views they are taken in.
        token_set: which tokens are counted.
        bounds: metrics that cannot leave a range, so that their intervals do not either.
        layers: residual layers to measure, None for all; -1 is the last.
    """

    metrics: ClassVar[tuple[str, ...]]
    views: ClassVar[tuple[View, ...]] = ("raw",)
    bounds: ClassVar[Mapping[str, tuple[float, float]]] = {}
    token_set: TokenSet = "geometry"
    layers: tuple[int, ...] | None = None

    def __init__(
        self, layers: Sequence[int] | None = None, token_set: TokenSet | None = None
    ) -> None:
        self.layers = checked_layers(layers) or self.layers
        self.token_set = checked_token_set(self.token_set if token_set is None else token_set)

    def sum_shapes(self, spec: StreamSpec) -> dict[str, tuple[int, ...]]:
        """Per-sequence sums y of every metric and their second moments; n counts tokens.

        Of the sequences, or groups, that are sampled, the sums themselves: they tell more, where
        they are all.
        """
        n_layers = len(spec.resolve_layers(self.layers))
        each = (len(self.metrics), n_layers, len(self.views))
        return {
            "y": each,
            "yy": each,
            "yn": each,
            "n": (n_layers,),
            "nn": (n_layers,),
            "read": (n_layers,),
            "sequences": (n_layers,),
            "sampled_y": (*each, spec.n_sampled_sequences),
            "sampled_n": (n_layers, spec.n_sampled_sequences),
        }

    def add(
        self,
        pair: StreamPair,
        layer: int,
        measured: Mapping[View, Mapping[str, Float[Tensor, " n"]]],
    ) -> None:
        """Add one batch's numbers of one layer, for each metric and view.

        Args:
            pair: the batch.
            layer: 0 to L.
            measured: one number per counted token, or per token that is read where a probe of
                logits reads a sample of them.
        """
        sums, i = self.sums, self.spec.resolve_layers(self.layers).index(layer)
        n = pair.mask(layer, self.token_set).sum(-1).to(self.spec.device, torch.float64)
        sums["n"][i] += n.sum()
        sums["nn"][i] += n.square().sum()
        sums["sequences"][i] += (n > 0).sum()
        slot = pair.sample.slot.to(self.spec.device)
        sampled = (
            slot >= 0 if self.spec.n_sampled_sequences else torch.zeros_like(slot, dtype=torch.bool)
        )
        slot = slot[sampled]
        sums["sampled_n"][i].index_add_(0, slot, n[sampled])
        for j, view in enumerate(self.views):
            for k, metric in enumerate(self.metrics):
                y = self.per_sequence(pair, measured[view][metric], layer)
                sums["y"][k, i, j] += y.sum()
                sums["yy"][k, i, j] += y.square().sum()
                sums["yn"][k, i, j] += (y * n).sum()
                sums["sampled_y"][k, i, j].index_add_(0, slot, y[sampled])
        sums["read"][i] += measured[self.views[0]][self.metrics[0]].numel()

    def per_sequence(
        self, pair: StreamPair, values: Float[Tensor, " n"], layer: int
    ) -> Float[Tensor, " batch"]:
        """Each sequence's sum over its counted tokens, float64."""
        return pair.per_sequence(values, layer, self.token_set)

    def compute(self) -> ProbeResult:
        """One row per metric, layer and view."""
        return ProbeResult(tuple(self._rows()))

    def _rows(self) -> list[Row]:
        s = {name: value.cpu() for name, value in self.sums.items()}
        rows = []
        for i, layer in enumerate(self.spec.resolve_layers(self.layers)):
            mean = s["y"][:, i] / s["n"][i]
            half = mean_half_width(
                float(s["sequences"][i]), mean, s["n"][i], s["yy"][:, i], s["yn"][:, i], s["nn"][i]
            )
            n = s["sampled_n"][i]
            has_all = self.spec.grouped or int((n > 0).sum()) == int(s["sequences"][i])
            for k, metric in enumerate(self.metrics):
                for j, view in enumerate(self.views):
                    value, width = float(mean[k, j]), float(half[k, j])
                    ends = (value - width, value + width)
                    if has_all:
                        ends = self._ends(metric, s["sampled_y"][k, i, j], n)
                    low, high = self.bounds.get(metric, (-math.inf, math.inf))
                    # NaN, the absence of an interval, must survive the bounds.
                    ends = (max(ends[0], low), min(ends[1], high))
                    n_read = int(s["read"][i])
                    rows.append(Row(self.name, metric, layer, view, value, *ends, n_read))
        return rows

    def _ends(
        self, metric: str, y: Float[Tensor, " text"], n: Float[Tensor, " text"]
    ) -> tuple[float, float]:
        """The interval of a metric from its sums over every text."""
        bounds = self.bounds.get(metric, (-math.inf, math.inf))
        found = ratio(y, n, within=bounds if all(map(math.isfinite, bounds)) else None)
        return found.low, found.high


class MeanProbe(TokenMeans):
    """A probe whose every metric is the mean of one number per token.

    Subclasses name their `metrics` and write `measure`.
    """

    @abstractmethod
    def measure(
        self, pair: StreamPair, layer: int, view: View
    ) -> Mapping[str, Float[Tensor, " n"]]:
        """One number per counted token for each metric, at one layer in one view."""

    def update(self, pair: StreamPair) -> None:
        """Measure every layer and view of one batch."""
        for layer in self.spec.resolve_layers(self.layers):
            self.add(pair, layer, {view: self.measure(pair, layer, view) for view in self.views})


class LogitProbe(TokenMeans):
    """A probe whose every metric is the mean of one number per row of logits.

    Subclasses name their `metrics` and write `read`. All such probes of a comparison are shown
    the same logits, so that a further one costs no further unembedding.

    Attributes:
        overwrites: whether `read` changes the logits it is given, which saves memory.
        samples: whether a comparison's `lens_tokens` is of this probe: below the output it is shown
            some tokens of each text, and its sums stand for all of them.
    """

    views: ClassVar[tuple[View, ...]] = ("final_norm",)
    token_set: TokenSet = "decisions"
    overwrites: bool = False
    samples: bool = False

    def __init__(
        self, layers: Sequence[int] | None = None, token_set: TokenSet | None = None
    ) -> None:
        super().__init__(layers, token_set)
        if self.token_set != "decisions":
            raise ProbeError(
                f"a probe of logits counts next-token decisions: token_set must be 'decisions', "
                f"got {self.token_set!r}"
            )

    @abstractmethod
    def read(self, chunk: LogitChunk) -> Mapping[str, Shaped[Tensor, " chunk"]]:
        """One number per row of the chunk for each metric."""

    def finish(self, pair: StreamPair, layer: int, numbers: Mapping[str, Tensor]) -> None:
        """Add the metrics that `read` returned, now of all the batch's tokens, to the sums."""
        means = {metric: numbers[metric] for metric in self.metrics}
        self.add(pair, layer, dict.fromkeys(self.views, means))

    def per_sequence(
        self, pair: StreamPair, values: Float[Tensor, " n"], layer: int
    ) -> Float[Tensor, " batch"]:
        """Each sequence's sum over its decisions, as far as the sample tells where there is one."""
        if not reads_sample(pair, self, layer):
            return super().per_sequence(pair, values, layer)
        read = replace(pair, chosen=pair.lens)
        return read.per_sequence(values, layer, self.token_set) * pair.lens_scale()

    def logit_layers(self) -> tuple[int, ...]:
        """The layers whose logits are read."""
        return self.spec.resolve_layers(self.layers)

    def update(self, pair: StreamPair) -> None:
        """Read one batch alone; in a comparison, all such probes are read together."""
        read_logits(pair, [self])
