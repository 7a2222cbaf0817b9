"""Is it the extra dimensions? Take them away, or bring them about, and judge."""

from .experiment import patch_expansion as patch_expansion
from .result import ExpansionResult as ExpansionResult
