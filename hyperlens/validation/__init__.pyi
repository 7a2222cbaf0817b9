from .experiment import validate as validate
from .result import ValidationResult as ValidationResult
