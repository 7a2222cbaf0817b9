"""What a pass takes besides the weights, known before it begins."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from .failures import guarded
from .streams import StreamSpec, logit_chunk_bytes

CGROUPS, OWN_CGROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
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
    d = spec.d_model
    widest = max(rows, spec.n_sampled_sequences * spec.n_sampled_tokens)
    return MemoryNeeded(
        sums=sum(int(guarded(probe, "state_bytes", spec)) for probe in probes),
        streams=2 * len(spec.layers) * rows * d * dtype.itemsize,
        work=8 * logit_chunk_bytes(spec.d_vocab, spec.device) + 8 * d * (COPIES * widest + 4 * d),
    )


def free_bytes(device: torch.device) -> int:
    """What can still be taken on a device."""
    if device.type == "cuda":
        # What torch keeps of freed tensors is free to us, though the driver counts it as taken.
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + kept
    return min(int(psutil.virtual_memory().available), _free_in_container())


def _free_in_container() -> int:
    """What the tightest control group of this process leaves it (Linux, cgroup v2)."""
    free = sys.maxsize
    try:
        own = OWN_CGROUP.read_text().rpartition("::/")[2].strip()
        for group in (CGROUPS / own, *(CGROUPS / own).parents):
            if not group.is_relative_to(CGROUPS) or not (group / "memory.max").exists():
                continue
            limit = (group / "memory.max").read_text().strip()
            if limit != "max":
                stat = dict(x.split() for x in (group / "memory.stat").read_text().splitlines())
                used = int((group / "memory.current").read_text())
                # Pages of files count as used, but are given up when memory is wanted.
                free = min(free, int(limit) - used + int(stat["inactive_file"]))
    except (OSError, ValueError, KeyError):
        return sys.maxsize
    return max(free, 0)
