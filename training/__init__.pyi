# Only names of this package can be loaded lazily: TrainingError is imported in __init__.py.
import hyperlens.errors

from .course import TrainingResult as TrainingResult
from .course import compare_training as compare_training
from .history import Record as Record
from .history import plot_history as plot_history
from .history import read_history as read_history
from .hyperfitting import HyperfitRun as HyperfitRun
from .hyperfitting import hyperfit as hyperfit
from .hyperfitting import to_hooked as to_hooked
from .merging import merge as merge
from .recipes import Recipe as Recipe
from .recipes import preset as preset
from .sweeping import SweepResult as SweepResult
from .sweeping import sweep as sweep

TrainingError = hyperlens.errors.TrainingError
