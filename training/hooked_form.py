"""Trained weights back to a hooked model."""

from __future__ import annotations

from typing import Any

from ..hooks.loading import load_hooked
from ..models.kinds import Backend
from .hyperfitting import HyperfitRun


def to_hooked(run: HyperfitRun, backend: Backend = "bridge") -> Any:
    """The trained model as a hooked model, checked against the plain one.

    Args:
        run: what `hyperfit` returned.
        backend: as in `hyperlens.load_hooked`.

    Raises:
        LoadingError: if the backend is not available for this model.
        ParityError: if the hooked model does not reproduce the trained one.
    """
    return load_hooked((run.model, run.tokenizer), backend=backend)
