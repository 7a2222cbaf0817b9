"""hyperlens: what did fine-tuning change inside this model, where, and is it real?

Everything public is importable from here; each name is loaded on first use, so that
`import hyperlens` costs next to nothing and pulls in neither torch nor transformers. The list is
`__init__.pyi`.
"""

from importlib import import_module
from typing import Any
from warnings import warn

import lazy_loader

__version__ = "0.2.0"

_load, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__all__ += ["__version__"]

# Names of version 0.1: where each is today. They go with the next release.
_OLD_NAMES = {
    "BehaviourFinding": ("experiments", "BehaviourResult"),
    "BlocksFinding": ("patching", "BlocksResult"),
    "Corpus": ("data.corpus", "Corpus"),
    "cross_domain": ("experiments", "compare_domains"),
    "CrossDomainFinding": ("experiments", "CrossDomainResult"),
    "decoding_baselines": ("experiments", "compare_decoding"),
    "DecodingFinding": ("experiments", "DecodingResult"),
    "Endpoint": ("judging", "Endpoint"),
    "expansion": ("patching", "patch_expansion"),
    "ExpansionFinding": ("patching", "ExpansionResult"),
    "judge_continuations": ("judging", "judge_continuations"),
    "judge_models": ("judging", "judge_models"),
    "JudgeFinding": ("judging", "JudgeResult"),
    "mauve_score": ("experiments", "measure_mauve"),
    "MauveFinding": ("experiments", "MauveResult"),
    "norm_question": ("patching", "patch_norm"),
    "NormFinding": ("patching", "NormResult"),
    "null_test": ("experiments", "run_null_test"),
    "NullTestFinding": ("experiments", "NullTestResult"),
    "patch_positions": ("patching", "patch_positions"),
    "PositionsFinding": ("patching", "PositionsResult"),
    "provenance": ("experiments", "trace_provenance"),
    "ProvenanceFinding": ("experiments", "ProvenanceResult"),
    "read_texts": ("data.texts", "read_texts"),
    "static_bias": ("experiments", "inject_static_bias"),
    "StaticBiasFinding": ("experiments", "StaticBiasResult"),
    "temperature": ("experiments", "match_temperature"),
    "TemperatureFinding": ("experiments", "TemperatureResult"),
    "transplant_weights": ("patching", "patch_weights"),
    "TransplantFinding": ("patching", "WeightsResult"),
}


def __getattr__(name: str) -> Any:
    if name not in _OLD_NAMES:
        return _load(name)
    module, now = _OLD_NAMES[name]
    warn(
        f"hyperlens.{name} is hyperlens.{module}.{now} now, and goes with the next release",
        DeprecationWarning,
        stacklevel=2,
    )
    return getattr(import_module(f"{__name__}.{module}"), now)
