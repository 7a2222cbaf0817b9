"""Experiments on two models: one file per question, with its function, its result and its evidence.

The causal ones are in `hyperlens.patching`, the judge in `hyperlens.judging`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
