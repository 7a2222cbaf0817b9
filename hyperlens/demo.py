"""The whole idea on the embedded model, in one folder: train, compare, measure, report.

Every step leaves its own folder, which a later run reads instead of working again; a step that was
interrupted is taken up where it stopped.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from . import __version__
from .compare import Comparison, compare_models
from .compare.audit import audit, last_block
from .embedded import HERE, embedded_base, embedded_tales
from .experiments.behaviour import BehaviourResult, measure_behaviour
from .experiments.null_test import RESCALED, NullTestResult, run_null_test
from .render.blocks import Table, Text, Verdict
from .render.format import DIMENSIONS, FRACTION, MISSING, PERCENT, Form, interval, span
from .render.page import write_report
from .render.terminal import to_text
from .results.result import Result
from .results.resume import WorkFolder
from .training import hyperfit

# So many tales are trained on; everything is measured on the others.
TRAINED_ON = 32
# Of each kind: few, to be quick, and too few for a p value that says something.
N_CONTROLS = 3
# Chosen for the demo: near-zero loss within a minute on two cores.
METHODS = MappingProxyType(
    {
        "all-weights": MappingProxyType({"method": "full", "epochs": 20, "learning_rate": 1e-3}),
        "late-stage-lora": MappingProxyType(
            {"method": "late_lora", "last_k": 5, "epochs": 60, "learning_rate": 4e-3}
        ),
    }
)
STAMP = "demo.json"
SMALL = "A model of 3.8 million parameters: a demonstration, not evidence about large models."


@dataclass(frozen=True)
class Measured:
    """What the demo measures of one hyperfitted model."""

    comparison: Comparison
    behaviour: BehaviourResult
    null_test: NullTestResult


@dataclass(frozen=True)
class Demo:
    """The results of the demo.

    Attributes:
        measured: by training method.
        report: the page.
    """

    measured: dict[str, Measured]
    report: Path

    @property
    def results(self) -> list[Result]:
        """Everything that was measured, in the order of the page."""
        return [
            result
            for one in self.measured.values()
            for result in (one.comparison, one.behaviour, one.null_test)
        ]

    def summary(self) -> str:
        """Base, both tuned models and their controls side by side, and what random changes give."""
        answers = [
            Verdict(one.topic, f"{name}: {one.answer}")
            for name, results in self.measured.items()
            for one in results.null_test.verdicts()[:1]
        ]
        small = Text(f"{SMALL} Report: {self.report}")
        return to_text(
            "Measured on tales that were not trained on", [_table(self.measured), *answers, small]
        )


def run_demo(
    out: str | Path, *, progress: bool = True, say: Callable[[str], None] = lambda step: None
) -> Demo:
    """Hyperfit the embedded base model in two ways, compare, measure behaviour, write the report.

    A second run with the same folder reuses what is done; an interrupted one continues.

    Args:
        out: a new folder, or that of an earlier demo of this version.
        progress: show progress bars.
        say: told each step before it begins.

    Raises:
        ResultsError: if the folder holds something else, or cannot be written.
    """
    folder = Path(out).expanduser()
    stamp = {"hyperlens": __version__, "inputs": _inputs_sha256()}
    work = WorkFolder(folder, STAMP, stamp, "a demo")
    work.claim()
    tales = embedded_tales()
    measured = {}
    for name in METHODS:
        tuned = folder / name
        if not tuned.is_dir():
            say(f"hyperfitting, {name}")
            _train(name, tales, tuned, progress)
        measured[name] = _measure(name, tales, tuned, work, progress, say)
    say("writing the report")
    demo = Demo(measured, folder / "report.html")
    write_report(demo.report, demo.results, title="Hyperfitting the embedded model")
    return demo


def _train(name: str, tales: list[str], out: Path, progress: bool) -> None:
    chosen: dict[str, Any] = dict(METHODS[name])
    hyperfit(
        embedded_base(),
        tales[:TRAINED_ON],
        recipe="demo",
        out=out,
        progress=progress,
        sequence_length=160,
        record_every=0,
        checkpoint_minutes=0.25,
        **chosen,
    )


def _measure(
    name: str,
    tales: list[str],
    tuned: Path,
    work: WorkFolder,
    progress: bool,
    say: Callable[[str], None],
) -> Measured:
    def once(what: str, kind: Any, make: Callable[..., Any]) -> Any:
        """The result in its folder, measured first where there is none yet."""

        def measure() -> Any:
            say(f"{what}, {name}")
            return make(embedded_base(), tuned, tales[TRAINED_ON:], progress=progress)

        return work.part(f"results/{name}/{what.replace(' ', '-')}", kind.load, measure)

    return Measured(
        once("comparison", Comparison, compare_models),
        once("behaviour", BehaviourResult, measure_behaviour),
        once("null test", NullTestResult, partial(run_null_test, n_controls=N_CONTROLS)),
    )


def _inputs_sha256() -> str:
    """Of the embedded model and tales and what is done with them."""
    digest = hashlib.sha256()
    for file in (HERE / "base" / "model.safetensors", HERE / "tales.jsonl"):
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    digest.update(json.dumps({k: dict(v) for k, v in METHODS.items()}).encode())
    return digest.hexdigest()


def _table(measured: Mapping[str, Measured]) -> Table:
    columns = {name: list(_lines(one)) for name, one in measured.items()}
    rows = [
        [same[0].words, same[0].base, *(line.tuned for line in same)]
        for same in zip(*columns.values(), strict=True)
    ]
    return Table(
        ["[95% interval]", "base", *columns],
        rows,
        "Greedy text: mean over prompts; all other rows: over all tokens. Random changes have the "
        "rank of the tuned model's and its size, in the weights or in the raw stream at the last "
        "layer; of them least to greatest.",
    )


class _Line(NamedTuple):
    """A row of the summary: what it shows, the base's value, the tuned model's."""

    words: str
    base: str
    tuned: str


def _lines(one: Measured) -> Iterator[_Line]:
    for metric, words in (("ttr", "greedy type-token ratio"), ("rep_2", "greedy repeated bigrams")):
        base, tuned = (
            one.behaviour.at(strategy="greedy", model=side, metric=metric)
            for side in ("base", "tuned")
        )
        yield _Line(words, FRACTION(base["value"]), interval(tuned, FRACTION))
        yield from _controls(one.null_test, metric, "greedy text", FRACTION)
    for metric, words in (
        ("top1_agreement", "top-1 prediction is the base's"),
        ("rank_gt_10", "top-1 prediction from below base rank 10"),
    ):
        yield _last_layer(one.comparison, "rank_reordering", metric, "final_norm", words, PERCENT)
        yield from _controls(one.null_test, metric, "final_norm", PERCENT)
    dimension = ("participation_ratio", "delta")
    words = "Δ dimension at the last layer, all blocks together"
    yield _last_layer(one.comparison, *dimension, "raw", words, DIMENSIONS)
    yield from _controls(one.null_test, "delta", "raw", DIMENSIONS)
    added = last_block(one.comparison)
    yield _Line("... added by the last block", "", MISSING if added is None else DIMENSIONS(added))
    for read in audit(one.comparison):
        if read.quantity == "participation_ratio" and read.jump is not None:
            words = "... that scripts see the last block add, BOS counted in"
            yield _Line(words, "", DIMENSIONS(read.jump.as_read))
    words = "... after the final norm"
    yield _last_layer(one.comparison, *dimension, "final_norm", words, DIMENSIONS)
    yield from _controls(one.null_test, "delta", "final_norm", DIMENSIONS)


def _last_layer(
    comparison: Comparison, probe: str, metric: str, view: str, words: str, form: Form
) -> _Line:
    row = comparison.at(probe, metric, comparison.n_layers, view)
    return _Line(words, "", interval(row._asdict(), form))


def _controls(null_test: NullTestResult, metric: str, view: str, form: Form) -> Iterator[_Line]:
    for kind in null_test.controls:
        row = null_test.last(metric, view, kind)
        if row is not None:
            words = "moving the stream as far" if kind.endswith(RESCALED) else "of the same size"
            reach = span(row["control_low"], row["control_high"], form)
            yield _Line(f"    {null_test.n_controls} random changes {words}", "", reach)
