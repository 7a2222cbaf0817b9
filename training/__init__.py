"""Train the models that the papers study: recipes, fine-tuning, records, hooked form.

Each name is loaded on first use: importing this package loads neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

# Relative: imported as top-level `training` by mistake, the package fails here at once, instead of
# being loaded a second time beside hyperlens.training.
from ..errors import TrainingError

if TYPE_CHECKING:
    from .history import Record as Record
    from .history import read_history as read_history
    from .history_plot import plot_history as plot_history
    from .hyperfitting import HyperfitRun as HyperfitRun
    from .hyperfitting import hyperfit as hyperfit
    from .hyperfitting import to_hooked as to_hooked
    from .merging import merge as merge
    from .recipes import Recipe as Recipe
    from .recipes import preset as preset

_MODULE = {
    "HyperfitRun": ".hyperfitting",
    "Recipe": ".recipes",
    "Record": ".history",
    "hyperfit": ".hyperfitting",
    "merge": ".merging",
    "plot_history": ".history_plot",
    "preset": ".recipes",
    "read_history": ".history",
    "to_hooked": ".hyperfitting",
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
    if name in _MODULE:
        return getattr(import_module(_MODULE[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
