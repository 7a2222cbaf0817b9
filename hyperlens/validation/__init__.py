"""Planted pairs of models whose truth is known, and what every experiment says of them."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
