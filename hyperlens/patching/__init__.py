"""Causality: put activations or weights of one model of a pair into the other."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .hooks.generating import changing as changing
    from .hooks.generating import donating as donating
    from .hooks.sites import Site as Site
    from .hooks.sites import in_blocks as in_blocks
    from .hooks.sites import patch_hooks as patch_hooks
    from .hooks.sites import record as record
    from .weights.parts import transplanted as transplanted

_HOME = {
    "changing": ".hooks.generating",
    "donating": ".hooks.generating",
    "in_blocks": ".hooks.sites",
    "patch_hooks": ".hooks.sites",
    "record": ".hooks.sites",
    "Site": ".hooks.sites",
    "transplanted": ".weights.parts",
}

__all__ = ["Site", "changing", "donating", "in_blocks", "patch_hooks", "record", "transplanted"]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
