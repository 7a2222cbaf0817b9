"""What a pass takes besides the weights, known before it begins."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import psutil
import torch

from .guarding import guarded
from .streams import LOGIT_CHUNK_BYTES, StreamSpec

# Of the vectors of a batch, or of the sample: float64 copies that statistics make for a moment.
COPIES = 6


@dataclass(frozen=True)
class MemoryNeeded:
    """Bytes of the probes' sums, of both models' streams over a batch, and of passing work."""

    sums: int
    streams: int
    work: int

    @property
    def total(self) -> int:
        """All of it, as if needed at the same moment."""
        return self.sums + self.streams + self.work


def memory_needed(
    spec: StreamSpec, probes: Iterable[Any], rows: int, dtype: torch.dtype
) -> MemoryNeeded:
    """What a pass of these probes takes, over batches of at most `rows` tokens.

    Raises:
        ProbeError: if a probe cannot say what it takes.
    """
    widest = max(rows, spec.n_sampled_sequences * spec.n_sampled_tokens)
    return MemoryNeeded(
        sums=sum(int(guarded(probe, "state_bytes", spec)) for probe in probes),
        streams=2 * len(spec.layers) * rows * spec.d_model * dtype.itemsize,
        work=8 * LOGIT_CHUNK_BYTES + 8 * spec.d_model * (COPIES * widest + 4 * spec.d_model),
    )


def free_bytes(device: torch.device) -> int:
    """What can still be taken on a device."""
    if device.type == "cuda":
        # What torch keeps of freed tensors is free to us, though the driver counts it as taken.
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + kept
    return int(psutil.virtual_memory().available)
