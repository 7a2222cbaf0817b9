"""What every probe is: named sums, updated batch by batch, merged by adding, read at the end."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import ProbeError
from ..passes.streams import StreamPair, StreamSpec
from ..results.rows import ProbeResult


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

    def all_reduce(self) -> None:
        """Add up the sums of all `torch.distributed` ranks, in place, on every rank."""
        for value in self.sums.values():
            torch.distributed.all_reduce(value)

    def options(self) -> dict[str, Any]:
        """The settings this probe was made with, for the record of the run."""
        kept = {k: v for k, v in vars(self).items() if k not in ("spec", "sums")}
        return {k: v for k, v in kept.items() if not k.startswith("_")}

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
