from . import decoding as decoding
from . import experiments as experiments
from . import judging as judging
from . import patching as patching
from . import probes as probes
from . import reproduction as reproduction
from . import training as training
from . import validation as validation
from .compare import Comparison as Comparison
from .compare import compare_models as compare_models
from .compare.trajectory import trace_trajectory as trace_trajectory
from .errors import HyperlensError as HyperlensError
from .experiments.behaviour import measure_behaviour as measure_behaviour
from .experiments.null_test import run_null_test as run_null_test
from .experiments.provenance import trace_provenance as trace_provenance
from .experiments.static_bias import inject_static_bias as inject_static_bias
from .experiments.temperature import match_temperature as match_temperature
from .experiments.weights import compare_weights as compare_weights
from .hooks.loading import load_hooked as load_hooked
from .pair import Pair as Pair
from .pair import open_pair as open_pair
from .patching import patch_blocks as patch_blocks
from .questions import read_results as read_results
from .render.page import write_report as write_report
from .reproduction import reproduce as reproduce

__version__: str
