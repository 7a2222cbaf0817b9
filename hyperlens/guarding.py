"""Whatever a probe raises names the probe."""

from __future__ import annotations

from typing import Any

import torch

from .errors import HyperlensError, ProbeError


def guarded(probe: Any, step: str, *args: Any) -> Any:
    """Run one step of a probe.

    Raises:
        ProbeError: if the step fails; it names the probe, the step and what went wrong.
    """
    try:
        return getattr(probe, step)(*args)
    except (HyperlensError, torch.cuda.OutOfMemoryError):
        raise
    except Exception as error:
        name = getattr(probe, "name", type(probe).__name__)
        raise ProbeError(
            f"probe {name!r} failed in {step}: {type(error).__name__}: {error}"
        ) from error
