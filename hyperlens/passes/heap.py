"""Memory that a pass frees is memory that it needs again a moment later."""

from __future__ import annotations

import torch

# glibc learns from blocks of up to 32 MiB, their own bookkeeping included.
LARGEST_LESSON = 32 * 2**20 - 2**16


def keep_freed_memory() -> None:
    """Have the C library keep up to 64 MiB that was freed, instead of returning it at once.

    glibc gives memory at the end of the heap back to the system once twice the largest block
    ever freed lies there unused. Chunks of logits come and go in just that size, and to page them
    in anew each time takes a tenth of a comparison. One freed block teaches it, as those of a
    larger model would; other C libraries learn nothing and lose nothing.
    """
    torch.empty(LARGEST_LESSON, dtype=torch.uint8)
