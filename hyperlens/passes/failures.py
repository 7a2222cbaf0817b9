"""Wrap probe and out-of-memory errors with the probe's name and a remedy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..errors import HyperlensError, ProbeError, ResourceError


def run_probe_step(probe: Any, step: str, *args: Any) -> Any:
    """Call a method of a probe.

    Raises:
        ProbeError: if it fails with an error of its own; names the probe, the step and the error.
    """
    try:
        return getattr(probe, step)(*args)
    except (HyperlensError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        name = getattr(probe, "name", type(probe).__name__)
        raise ProbeError(
            f"probe {name!r} failed in {step}: {type(error).__name__}: {error}"
        ) from error


@contextmanager
def explaining_out_of_memory(batch_size: int, also: str = "") -> Iterator[None]:
    """Say what to lower if a GPU runs out of memory inside.

    Args:
        batch_size: texts per forward pass.
        also: what else would help.

    Raises:
        ResourceError: if its memory runs out.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        # Without the cause: its traceback would keep alive the tensors that filled the memory.
        raise ResourceError(
            f"the GPU ran out of memory with batch_size={batch_size}: lower it{also}"
        ) from None
