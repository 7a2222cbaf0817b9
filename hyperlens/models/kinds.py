"""What a source is: the pattern of hub ids, and kinds of model objects told by class names.

Class names, because `isinstance` would import libraries that a run may not need.
"""

from __future__ import annotations

import re
from typing import Any, Literal

# "name" or "owner/name", of models and of datasets.
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")

Backend = Literal["residual", "bridge", "hooked_transformer"]


def backend_of(model: object) -> Backend | None:
    """Which kind of hooked model this is; None for one without hooks."""
    kinds: dict[str, Backend] = {
        "ResidualModel": "residual",
        "TransformerBridge": "bridge",
        "HookedTransformer": "hooked_transformer",
    }
    return next((kinds[c.__name__] for c in type(model).__mro__ if c.__name__ in kinds), None)


def is_peft(model: object) -> bool:
    """Whether this is a `peft.PeftModel`."""
    return any(c.__name__ == "PeftModel" for c in type(model).__mro__)


def plain_model(model: Any) -> Any:
    """The Hugging Face model inside a PeftModel; any other model is its own plain model."""
    return model.get_base_model() if is_peft(model) else model


def text_config(model: Any) -> Any:
    """A model's configuration, of one of text and images that of its text; None without one."""
    config: Any = getattr(plain_model(model), "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def quantisation_of(model: Any) -> str | None:
    """How a model's weights are quantised, such as "bitsandbytes"; None where they are not."""
    method = getattr(plain_model(model), "quantization_method", None)
    if method is not None:
        return str(getattr(method, "value", method))
    kinds = {type(parameter).__name__ for parameter in model.parameters()} - {"Parameter"}
    return min(kinds, default=None)
