"""Recipes to fine-tuned weights to hooked models: make the models that the papers study.

Each name is loaded on first use: importing this package pulls in neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

# Light, and relative on purpose: imported from the wrong place, under the name `training`, this
# package fails here at once instead of loading everything a second time.
from ..errors import TrainingError

if TYPE_CHECKING:
    from .history import Record as Record
    from .history import read_history as read_history
    from .history_plot import plot_history as plot_history
    from .hooked_form import to_hooked as to_hooked
    from .hyperfitting import HyperfitRun as HyperfitRun
    from .hyperfitting import hyperfit as hyperfit
    from .merging import merge as merge
    from .recipes import Recipe as Recipe
    from .recipes import preset as preset

_HOME = {
    "HyperfitRun": ".hyperfitting",
    "Recipe": ".recipes",
    "Record": ".history",
    "hyperfit": ".hyperfitting",
    "merge": ".merging",
    "plot_history": ".history_plot",
    "preset": ".recipes",
    "read_history": ".history",
    "to_hooked": ".hooked_form",
}

__all__ = [
    "HyperfitRun",
    "Recipe",
    "Record",
    "TrainingError",
    "hyperfit",
    "merge",
    "plot_history",
    "preset",
    "read_history",
    "to_hooked",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
