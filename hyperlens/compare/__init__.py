"""What did fine-tuning change, where, and is it real? `compare_models` and its result.

And the same over the checkpoints of a training run: `trace_trajectory`.
"""

from .comparison import Comparison as Comparison
from .run import compare_models as compare_models
from .trajectory import TrajectoryResult as TrajectoryResult
from .trajectory import trace_trajectory as trace_trajectory

__all__ = ["Comparison", "TrajectoryResult", "compare_models", "trace_trajectory"]
