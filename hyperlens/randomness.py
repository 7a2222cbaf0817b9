"""Random numbers of our own: a seed decides what happens inside, and the caller notices nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def own_randomness(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch inside; outside, the caller's generators go on as before, on every device.

    Args:
        seed: for all of torch's generators.
        device: where the work is done.
    """
    # Seeding torch seeds every GPU, also for work on the CPU. One that nobody has used yet is not
    # woken up for that: it takes the last seed that was given before it is first used.
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
