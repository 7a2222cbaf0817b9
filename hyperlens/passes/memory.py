"""Estimate a pass's peak memory before running it, measure what is free, reuse what is freed."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from .. import processes
from .failures import run_probe_step
from .streams import StreamSpec, logit_chunk_bytes

CGROUPS, OWN_CGROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
# Temporary float64 copies of a batch's (or the sample's) vectors that statistics make.
COPIES = 6
# Room for so many chunks of logits, of both models and of what is made of them, and how many there
# are found to be at the peak.
LOGIT_CHUNKS, LIKELY_CHUNKS = 8, 4.5
# glibc adapts its threshold to freed blocks of up to 32 MiB, their own bookkeeping included.
LARGEST_ADAPTIVE_BLOCK = 32 * 2**20 - 2**16


@dataclass(frozen=True)
class MemoryNeeded:
    """Bytes of the probes' sums, both models' streams over a batch, logits and temporaries."""

    sums: int
    streams: int
    logits: int
    work: int

    @property
    def total(self) -> int:
        """The sum, as if all were needed at the same moment."""
        return self.sums + self.streams + self.logits + self.work

    @property
    def likely(self) -> int:
        """The peak that is to be expected; the room kept for logits is rarely filled."""
        return self.total - int(self.logits * (1 - LIKELY_CHUNKS / LOGIT_CHUNKS))


def memory_needed(
    spec: StreamSpec, probes: Iterable[Any], rows: int, dtype: torch.dtype
) -> MemoryNeeded:
    """Bytes a pass of these probes needs over batches of at most `rows` tokens, weights excluded.

    Raises:
        ProbeError: if a probe's `state_bytes` fails.
    """
    d = spec.d_model
    chunk = logit_chunk_bytes(spec.d_vocab, spec.device)
    widest = max(rows, spec.n_sampled_sequences * spec.n_sampled_tokens)
    return MemoryNeeded(
        sums=sum(int(run_probe_step(probe, "state_bytes", spec)) for probe in probes),
        streams=2 * len(spec.layers) * rows * d * dtype.itemsize,
        logits=LOGIT_CHUNKS * min(chunk, 4 * spec.d_vocab * rows),
        work=8 * d * (COPIES * widest + 4 * d),
    )


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated on a device, by each of the processes that share it."""
    if device.type == "cuda":
        # Memory that torch caches of freed tensors is free, though the driver counts it as used.
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + cached
    free = min(int(psutil.virtual_memory().available), _free_in_container())
    return free // processes.sharing_here()


def _free_in_container() -> int:
    """Bytes that the tightest control group of this process leaves it (Linux, cgroup v2)."""
    free = sys.maxsize
    try:
        group_of_process = OWN_CGROUP.read_text().rpartition("::/")[2].strip()
        for group in (CGROUPS / group_of_process, *(CGROUPS / group_of_process).parents):
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


def keep_freed_memory() -> None:
    """Raise glibc's trim threshold so that freed logit buffers are reused.

    glibc returns memory at the end of the heap to the system once twice the largest block ever
    freed lies there unused. Chunks of logits come and go in that size, and paging them in anew
    takes a tenth of a comparison. Freeing one block of 32 MiB raises the threshold to 64 MiB, as
    larger models would do anyway; other C libraries are not affected.
    """
    torch.empty(LARGEST_ADAPTIVE_BLOCK, dtype=torch.uint8)
