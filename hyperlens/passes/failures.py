"""What goes wrong while texts are read says where, and what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..errors import HyperlensError, ProbeError, ResourceError


def guarded(probe: Any, step: str, *args: Any) -> Any:
    """Run one step of a probe.

    Raises:
        ProbeError: if the step fails; it names the probe, the step and what went wrong.
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
def naming_what_to_lower(batch_size: int, also: str = "") -> Iterator[None]:
    """Run what may need more memory than a GPU has.

    Args:
        batch_size: texts per forward pass.
        also: what else would help.

    Raises:
        ResourceError: if its memory runs out.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        # Without the cause: its traceback would keep alive all that filled the memory.
        raise ResourceError(
            f"the GPU ran out of memory with batch_size={batch_size}: lower it{also}"
        ) from None
