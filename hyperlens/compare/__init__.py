"""What did fine-tuning change, where, and is it real? `compare_models` and its result.

And the same over the checkpoints of a training run: `trace_trajectory`.
"""

from .check import CheckResult as CheckResult
from .check import check_comparison as check_comparison
from .check import write_expectations as write_expectations
from .comparison import Comparison as Comparison
from .loggers import report_comparison as report_comparison
from .run import compare_models as compare_models
from .trajectory import TrajectoryResult as TrajectoryResult
from .trajectory import trace_trajectory as trace_trajectory

__all__ = [
    "CheckResult",
    "Comparison",
    "TrajectoryResult",
    "check_comparison",
    "compare_models",
    "report_comparison",
    "trace_trajectory",
    "write_expectations",
]
