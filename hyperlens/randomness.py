"""Seed torch for a while without changing the caller's random state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def own_randomness(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch inside; afterwards the caller's generators continue as before, on every device.

    Args:
        seed: for all of torch's generators.
        device: where the work is done.
    """
    # Seeding torch seeds every GPU, also for work on the CPU. A GPU that was not used yet is not
    # initialised for that: on first use it takes the last seed that was set.
    initialised: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    awake = initialised or device.type == "cuda"
    apple = torch.mps.get_rng_state() if device.type == "mps" else None  # fork_rng cannot
    try:
        with torch.random.fork_rng(range(torch.cuda.device_count()) if awake else []):
            torch.manual_seed(seed)
            yield
    finally:
        if apple is not None:
            torch.mps.set_rng_state(apple)
        if not awake:
            torch.cuda.manual_seed_all(torch.initial_seed())
