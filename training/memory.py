"""The most memory that training held at once."""

from __future__ import annotations

import re
from pathlib import Path

import torch

PROC = Path("/proc/self")


def forget_peak(device: torch.device) -> None:
    """Let the peak start again from what is held now, where it is known at all."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        (PROC / "clear_refs").write_text("5")
    except OSError:  # not Linux, or not allowed
        return


def peak_memory(device: torch.device) -> int | None:
    """Bytes held at most since then; None where nobody counts them.

    On a GPU what torch allocated there; on a CPU all of the process, as Linux counts it (VmHWM),
    libraries included.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type != "cpu":
        return None
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", (PROC / "status").read_text())
    except OSError:
        return None
    return 1024 * int(found[1]) if found else None
