"""How close are two sets of texts? `measure_mauve` and its result."""

from .run import MauveResult as MauveResult
from .run import measure_mauve as measure_mauve

__all__ = ["MauveResult", "measure_mauve"]
