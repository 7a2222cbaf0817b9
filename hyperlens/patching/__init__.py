"""Causality: put activations or weights of one model of a pair into the other."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .generating import changing as changing
    from .generating import donating as donating
    from .sites import Site as Site
    from .sites import in_blocks as in_blocks
    from .sites import patch_hooks as patch_hooks
    from .sites import record as record
    from .transplant import transplanted as transplanted

_HOME = {
    "changing": ".generating",
    "donating": ".generating",
    "in_blocks": ".sites",
    "patch_hooks": ".sites",
    "record": ".sites",
    "Site": ".sites",
    "transplanted": ".transplant",
}

__all__ = ["Site", "changing", "donating", "in_blocks", "patch_hooks", "record", "transplanted"]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
