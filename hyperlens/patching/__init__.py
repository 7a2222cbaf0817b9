"""Causality: put activations or weights of one model of a pair into the other."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..hooks.generation import changing as changing
    from ..hooks.generation import donating as donating
    from ..hooks.patching import patch_hooks as patch_hooks
    from ..hooks.patching import record as record
    from ..hooks.sites import Site as Site
    from ..hooks.sites import in_blocks as in_blocks
    from .blocks import BlocksResult as BlocksResult
    from .blocks import patch_blocks as patch_blocks
    from .expansion.experiment import patch_expansion as patch_expansion
    from .expansion.result import ExpansionResult as ExpansionResult
    from .norm import NormResult as NormResult
    from .norm import patch_norm as patch_norm
    from .parts import transplanted as transplanted
    from .positions import PositionsResult as PositionsResult
    from .positions import patch_positions as patch_positions
    from .weights import WeightsResult as WeightsResult
    from .weights import patch_weights as patch_weights

_HOME = {
    "BlocksResult": ".blocks",
    "changing": "..hooks.generation",
    "donating": "..hooks.generation",
    "ExpansionResult": ".expansion.result",
    "in_blocks": "..hooks.sites",
    "NormResult": ".norm",
    "patch_blocks": ".blocks",
    "patch_expansion": ".expansion.experiment",
    "patch_hooks": "..hooks.patching",
    "patch_norm": ".norm",
    "patch_positions": ".positions",
    "patch_weights": ".weights",
    "PositionsResult": ".positions",
    "record": "..hooks.patching",
    "Site": "..hooks.sites",
    "transplanted": ".parts",
    "WeightsResult": ".weights",
}

__all__ = [
    "BlocksResult",
    "ExpansionResult",
    "NormResult",
    "PositionsResult",
    "Site",
    "WeightsResult",
    "changing",
    "donating",
    "in_blocks",
    "patch_blocks",
    "patch_expansion",
    "patch_hooks",
    "patch_norm",
    "patch_positions",
    "patch_weights",
    "record",
    "transplanted",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
