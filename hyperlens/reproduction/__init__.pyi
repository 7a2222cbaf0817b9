from .paper import PaperNumber as PaperNumber
from .paper import paper_numbers as paper_numbers
from .protocol import Protocol as Protocol
from .protocol import protocol_for as protocol_for
from .reproduce import reproduce as reproduce
from .result import ReproductionResult as ReproductionResult
