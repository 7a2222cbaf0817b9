"""A judge reads two continuations of the same opening and says which is better, and why.

A judge is an `Endpoint` (a model behind an HTTP server), a local chat model, a rule, any function
from prompt to answer, or any object with `identity` and `answers` (see `Judge`).
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
