"""hyperlens: what did fine-tuning change inside this model, where, and is it real?

Everything public is importable from here; each name is loaded on first use, so that
`import hyperlens` costs next to nothing and pulls in neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .compare import compare_models as compare_models
    from .data.corpus import Corpus as Corpus
    from .data.texts import read_texts as read_texts
    from .errors import HyperlensError as HyperlensError
    from .experiments.behaviour import measure_behaviour as measure_behaviour
    from .experiments.behaviour_finding import BehaviourResult as BehaviourResult
    from .experiments.cross_domain import cross_domain as cross_domain
    from .experiments.cross_domain_finding import CrossDomainResult as CrossDomainResult
    from .experiments.decoding_baselines import decoding_baselines as decoding_baselines
    from .experiments.decoding_finding import DecodingResult as DecodingResult
    from .experiments.mauve import mauve_score as mauve_score
    from .experiments.mauve_finding import MauveResult as MauveResult
    from .experiments.null_test import null_test as null_test
    from .experiments.null_test_finding import NullTestResult as NullTestResult
    from .experiments.provenance import provenance as provenance
    from .experiments.provenance_finding import ProvenanceResult as ProvenanceResult
    from .experiments.static_bias import static_bias as static_bias
    from .experiments.static_bias_finding import StaticBiasResult as StaticBiasResult
    from .experiments.temperature import temperature as temperature
    from .experiments.temperature_finding import TemperatureResult as TemperatureResult
    from .hooks.loading import load_hooked as load_hooked
    from .judging.endpoint import Endpoint as Endpoint
    from .judging.finding import JudgeResult as JudgeResult
    from .judging.judge import judge_continuations as judge_continuations
    from .judging.judge import judge_models as judge_models
    from .patching.blocks import BlocksResult as BlocksResult
    from .patching.blocks import patch_blocks as patch_blocks
    from .patching.expansion.experiment import patch_expansion as expansion
    from .patching.expansion.experiment import patch_expansion as patch_expansion
    from .patching.expansion.result import ExpansionResult as ExpansionResult
    from .patching.norm import NormResult as NormResult
    from .patching.norm import patch_norm as norm_question
    from .patching.norm import patch_norm as patch_norm
    from .patching.positions import PositionsResult as PositionsResult
    from .patching.positions import patch_positions as patch_positions
    from .patching.weights import WeightsResult as TransplantResult
    from .patching.weights import WeightsResult as WeightsResult
    from .patching.weights import patch_weights as patch_weights
    from .patching.weights import patch_weights as transplant_weights
    from .results.comparison import Comparison as Comparison

__version__ = "0.1.0"

_HOME = {
    "BehaviourResult": ".experiments.behaviour_finding",
    "BlocksResult": ".patching.blocks",
    "compare_models": ".compare",
    "Comparison": ".results.comparison",
    "Corpus": ".data.corpus",
    "cross_domain": ".experiments.cross_domain",
    "CrossDomainResult": ".experiments.cross_domain_finding",
    "decoding_baselines": ".experiments.decoding_baselines",
    "DecodingResult": ".experiments.decoding_finding",
    "Endpoint": ".judging.endpoint",
    "expansion": ".patching.expansion.experiment:patch_expansion",
    "ExpansionResult": ".patching.expansion.result",
    "HyperlensError": ".errors",
    "judge_continuations": ".judging.judge",
    "judge_models": ".judging.judge",
    "JudgeResult": ".judging.finding",
    "load_hooked": ".hooks.loading",
    "mauve_score": ".experiments.mauve",
    "MauveResult": ".experiments.mauve_finding",
    "measure_behaviour": ".experiments.behaviour",
    "norm_question": ".patching.norm:patch_norm",
    "NormResult": ".patching.norm",
    "null_test": ".experiments.null_test",
    "NullTestResult": ".experiments.null_test_finding",
    "patch_blocks": ".patching.blocks",
    "patch_expansion": ".patching.expansion.experiment",
    "patch_norm": ".patching.norm",
    "patch_positions": ".patching.positions",
    "patch_weights": ".patching.weights",
    "PositionsResult": ".patching.positions",
    "provenance": ".experiments.provenance",
    "ProvenanceResult": ".experiments.provenance_finding",
    "read_texts": ".data.texts",
    "static_bias": ".experiments.static_bias",
    "StaticBiasResult": ".experiments.static_bias_finding",
    "temperature": ".experiments.temperature",
    "TemperatureResult": ".experiments.temperature_finding",
    "transplant_weights": ".patching.weights:patch_weights",
    "TransplantResult": ".patching.weights:WeightsResult",
    "WeightsResult": ".patching.weights",
}

__all__ = [
    "BehaviourResult",
    "BlocksResult",
    "Comparison",
    "Corpus",
    "CrossDomainResult",
    "DecodingResult",
    "Endpoint",
    "ExpansionResult",
    "HyperlensError",
    "JudgeResult",
    "MauveResult",
    "NormResult",
    "NullTestResult",
    "PositionsResult",
    "ProvenanceResult",
    "StaticBiasResult",
    "TemperatureResult",
    "TransplantResult",
    "WeightsResult",
    "__version__",
    "compare_models",
    "cross_domain",
    "decoding_baselines",
    "expansion",
    "judge_continuations",
    "judge_models",
    "load_hooked",
    "mauve_score",
    "measure_behaviour",
    "norm_question",
    "null_test",
    "patch_blocks",
    "patch_expansion",
    "patch_norm",
    "patch_positions",
    "patch_weights",
    "provenance",
    "read_texts",
    "static_bias",
    "temperature",
    "transplant_weights",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        module, _, now = _HOME[name].partition(":")
        return getattr(import_module(module, __name__), now or name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
