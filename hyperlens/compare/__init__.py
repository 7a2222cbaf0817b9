"""What did fine-tuning change, where, and is it real? `compare_models` and its result."""

from .comparison import Comparison as Comparison
from .run import compare_models as compare_models

__all__ = ["Comparison", "compare_models"]
