"""Train the models that the papers study: recipes, fine-tuning, records, hooked form.

Each name is loaded on first use: importing this package loads neither torch nor transformers. The
list is `__init__.pyi`.
"""

import lazy_loader

# Relative: imported as top-level `training` by mistake, the package fails here at once, instead of
# being loaded a second time beside hyperlens.training.
from ..errors import TrainingError

__getattr__, _, __all__ = lazy_loader.attach_stub(__name__, __file__)
__all__ += ["TrainingError"]


def __dir__() -> list[str]:
    return sorted(__all__)
