"""What did fine-tuning change, where, and is it real? `compare_models` and its result."""

from .check import CheckResult as CheckResult
from .check import check_comparison as check_comparison
from .check import write_expectations as write_expectations
from .comparison import Comparison as Comparison
from .loggers import report_comparison as report_comparison
from .run import compare_models as compare_models

__all__ = [
    "CheckResult",
    "Comparison",
    "check_comparison",
    "compare_models",
    "report_comparison",
    "write_expectations",
]
