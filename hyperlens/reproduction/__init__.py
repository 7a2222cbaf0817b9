"""The whole paper on any model: train its variants, measure every exhibit, set both side by side.

The paper is "Beyond Temperature: Hyperfitting as a Late-Stage Geometric Expansion", arXiv
2605.22579.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
