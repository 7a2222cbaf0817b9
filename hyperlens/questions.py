"""Every question that hyperlens answers, once: the command line, saved folders and pages go by it.

To add one, write its file (function, result, evidence) and add its line here. The order is that of
`hyperlens --help` and of pages made from saved folders.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from .checks import check_types
from .errors import ResultsError
from .training.history import free_name
from .training.recipes import RUN_FILE


class Question(NamedTuple):
    """A question: where its function and its result are.

    Attributes:
        name: what it is called everywhere; its file is `<name>.json`.
        module: where both are, below hyperlens.
        function: answers it, from two models and texts.
        result: the class of the answer.
        old_names: what version 0.1 called its file.
        command: the module of its command where that is not in `cli.experiments`; one module may
            serve several questions.
    """

    name: str
    module: str
    function: str
    result: str
    old_names: tuple[str, ...] = ()
    command: str = ""


def _patch(name: str, module: str, result: str, old_names: tuple[str, ...]) -> Question:
    """A part of `hyperlens patch`, which is one command for all of them."""
    return Question(name, f"patching.{module}", name, result, old_names, "cli.patch")


QUESTIONS = (
    Question("comparison", "compare", "compare_models", "Comparison"),
    Question("check", "compare.check", "check_comparison", "CheckResult", command="cli.check"),
    Question("behaviour", "experiments.behaviour", "measure_behaviour", "BehaviourResult"),
    Question("null_test", "experiments.null_test", "run_null_test", "NullTestResult"),
    Question("provenance", "experiments.provenance", "trace_provenance", "ProvenanceResult"),
    Question(
        "first_divergence",
        "experiments.first_divergence",
        "find_first_divergence",
        "FirstDivergenceResult",
    ),
    Question("attribute", "experiments.attribution", "attribute", "AttributionResult"),
    Question("temperature", "experiments.temperature", "match_temperature", "TemperatureResult"),
    Question("static_bias", "experiments.static_bias", "inject_static_bias", "StaticBiasResult"),
    Question("decoding", "experiments.decoding", "compare_decoding", "DecodingResult"),
    Question("cross_domain", "experiments.cross_domain", "compare_domains", "CrossDomainResult"),
    Question("variants", "experiments.variants", "compare_variants", "VariantsResult"),
    Question("trajectory", "compare.trajectory", "trace_trajectory", "TrajectoryResult"),
    Question("weights", "experiments.weights", "compare_weights", "WeightChangesResult"),
    Question("training", "training.course", "compare_training", "TrainingResult"),
    Question("sweep", "training.sweeping", "sweep", "SweepResult", command="cli.sweep"),
    Question("mauve", "experiments.mauve", "measure_mauve", "MauveResult"),
    Question("judge", "judging.judge", "judge_models", "JudgeResult", command="cli.judge"),
    Question(
        "reproduction", "reproduction", "reproduce", "ReproductionResult", command="cli.reproduce"
    ),
    _patch("patch_blocks", "blocks", "BlocksResult", ("patching",)),
    _patch("patch_positions", "positions", "PositionsResult", ()),
    _patch("patch_weights", "weights", "WeightsResult", ("transplant",)),
    _patch("patch_expansion", "expansion", "ExpansionResult", ("expansion",)),
    _patch("patch_norm", "norm", "NormResult", ("final_norm",)),
)


def result_class(question: Question) -> Any:
    """The class of a question's result."""
    return getattr(import_module(f"{__package__}.{question.module}"), question.result)


@check_types
def read_results(folders: Sequence[str | Path]) -> list[Any]:
    """Every saved result in these folders and the folders inside them, in the order of QUESTIONS.

    Raises:
        ResultsError: if a folder does not exist or holds none, or a result cannot be read.
    """
    found: list[Any] = []
    runs: list[Path] = []
    for folder in folders:
        results, runs_here = _in_folder(Path(folder).expanduser())
        found, runs = found + results, runs + runs_here
    # Runs of training are read as they are, unless a saved result shows them already.
    if runs and not any(result.name == "training" for result in found):
        from .training.course import compare_training

        found.append(compare_training(named_runs(runs)))
    order = {question.name: place for place, question in enumerate(QUESTIONS)}
    return sorted(found, key=lambda result: order[result.name])


def _in_folder(folder: Path) -> tuple[list[Any], list[Path]]:
    """The results in a folder, and the runs of `hyperfit`; itself may be one."""
    if not folder.is_dir():
        raise ResultsError(f"no folder {folder}: give one that --out of a command wrote")
    by_file = {name: one for one in QUESTIONS for name in (one.name, *one.old_names)}
    found = [
        result_class(by_file[path.stem]).load(path.parent)
        for path in sorted(folder.rglob("*.json"))
        if path.stem in by_file and _is_result(path)
    ]
    # The runs of a sweep are shown by its result.
    sweeps = {path.parent for path in folder.rglob("sweep.json")}
    runs = sorted(p.parent for p in folder.rglob(RUN_FILE) if not sweeps & {*p.parents})
    if not found and not runs:
        raise ResultsError(
            f"no results in {folder}: expected comparison.json, the JSON file of an experiment, "
            "or a run of hyperfit"
        )
    return found, runs


def named_runs(folders: Sequence[Path]) -> dict[str, Path]:
    """Runs by the names of their folders, numbered where several share one.

    >>> list(named_runs([Path("a/full"), Path("b/full")]))
    ['full', 'full (2)']
    """
    found: dict[str, Path] = {}
    for folder in folders:
        found[free_name(folder.absolute().name, found)] = folder
    return found


def _is_result(path: Path) -> bool:
    """Whether a file of a result's name is one; whoever loads a broken one says what is wrong."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return True
    return isinstance(data, dict) and data.get("name", path.stem) == path.stem
