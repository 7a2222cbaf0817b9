"""The whole idea on the embedded model, in one folder: train, compare, measure, report.

Every step leaves its own folder, which a later run reads instead of working again; a step that was
interrupted is taken up where it stopped.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

from . import __version__
from .embedded import HERE, embedded_base, embedded_tales

if TYPE_CHECKING:
    from .compare.comparison import Comparison
    from .experiments.behaviour import BehaviourResult
    from .experiments.null_test_finding import NullTestResult

# So many tales are trained on; everything is measured on the others.
TRAINED_ON = 32
# All ours: near-zero loss within a minute on two cores.
METHODS = MappingProxyType(
    {
        "all-weights": MappingProxyType({"method": "full", "epochs": 20, "learning_rate": 1e-3}),
        "late-stage-lora": MappingProxyType(
            {"method": "late_lora", "last_k": 5, "epochs": 60, "learning_rate": 4e-3}
        ),
    }
)
STAMP = "demo.json"
SMALL = "A model of 3.8 million parameters: a demonstration, and no evidence about large ones."


@runtime_checkable
class Saves(Protocol):
    """What every result can do."""

    def save(self, folder: str | Path) -> Path:
        """Write into a new folder."""


Result = TypeVar("Result", bound=Saves)


@dataclass(frozen=True)
class Measured:
    """What the demo measures of one hyperfitted model."""

    comparison: Comparison
    behaviour: BehaviourResult
    null_test: NullTestResult


@dataclass(frozen=True)
class Demo:
    """What the demo found.

    Attributes:
        measured: by training method.
        report: the page.
    """

    measured: dict[str, Measured]
    report: Path

    def summary(self) -> str:
        """The few lines that matter."""
        names = list(self.measured)
        rows = [_column(found) for found in self.measured.values()]
        lines = ["", "measured on tales that were not trained on [95% interval]", ""]
        lines.append(f"{'':<38}{'base':>8}" + "".join(f"{name:>28}" for name in names))
        for i, (what, base, _) in enumerate(rows[0]):
            values = "".join(f"{row[i][2]:>28}" for row in rows)
            lines.append(f"{what:<38}{base:>8}{values}")
        return "\n".join([*lines, "", SMALL, "", f"report: {self.report}"])


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
    from .results.resume import WorkFolder

    WorkFolder(folder, STAMP, stamp, "a demo").claim()
    tales = embedded_tales()
    measured = {}
    for name in METHODS:
        tuned = folder / name
        if not tuned.is_dir():
            say(f"hyperfitting, {name}")
            _train(name, tales, tuned, progress)
        measured[name] = _measure(name, tales, tuned, folder / "results" / name, progress, say)
    say("writing the report")
    from .render.page import write_report

    findings = [
        finding
        for found in measured.values()
        for finding in (found.comparison, found.behaviour, found.null_test)
    ]
    page = write_report(folder / "report.html", findings, title="Hyperfitting the embedded model")
    return Demo(measured, page)


def _train(name: str, tales: list[str], out: Path, progress: bool) -> None:
    from .training import hyperfit

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
    results: Path,
    progress: bool,
    say: Callable[[str], None],
) -> Measured:
    from .compare import compare_models
    from .compare.comparison import Comparison
    from .experiments.behaviour import BehaviourResult, measure_behaviour
    from .experiments.null_test import run_null_test
    from .experiments.null_test_finding import NullTestResult

    base, unseen = embedded_base(), tales[TRAINED_ON:]

    def once(what: str, load: Callable[[Path], Result], make: Callable[[], Result]) -> Result:
        place = results / what.replace(" ", "-")
        if not place.is_dir():
            say(f"{what}, {name}")
            make().save(place)
        return load(place)

    return Measured(
        once(
            "comparison",
            Comparison.load,
            lambda: compare_models(base, tuned, unseen, progress=progress),
        ),
        once(
            "behaviour",
            BehaviourResult.load,
            lambda: measure_behaviour(base, tuned, unseen, progress=progress),
        ),
        once(
            "null test",
            NullTestResult.load,
            lambda: run_null_test(base, tuned, unseen, progress=progress),
        ),
    )


def _inputs_sha256() -> str:
    """Of the embedded model and tales and what is done with them."""
    digest = hashlib.sha256()
    for file in (HERE / "base" / "model.safetensors", HERE / "tales.jsonl"):
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    digest.update(json.dumps({k: dict(v) for k, v in METHODS.items()}).encode())
    return digest.hexdigest()


def _column(found: Measured) -> list[tuple[str, str, str]]:
    """(what, the base's value, the tuned model's with its interval) of one hyperfitted model."""
    from .render.format import DIMENSIONS, FRACTION, PERCENT, interval

    behaviour, comparison = found.behaviour, found.comparison
    last, rows = comparison.n_layers, []
    for metric, what in (("ttr", "greedy type-token ratio"), ("rep_2", "greedy repeated bigrams")):
        base, tuned = (
            behaviour.at(strategy="greedy", model=side, metric=metric) for side in ("base", "tuned")
        )
        rows.append((what, FRACTION(base["value"]), interval(tuned, FRACTION)))
    for probe, metric, view, what, form in (
        ("rank_reordering", "rank_1", "final_norm", "top-1 prediction is the base's", PERCENT),
        ("rank_reordering", "rank_gt_10", "final_norm", "... from below base rank 10", PERCENT),
        ("participation_ratio", "delta", "raw", "Δ dimension at the last layer", DIMENSIONS),
        ("participation_ratio", "delta", "final_norm", "... after the final norm", DIMENSIONS),
    ):
        row = comparison.at(probe, metric, last, view)
        rows.append((what, "", interval(row._asdict(), form)))
    rows += [
        (f"... of {len(found.null_test.extras['placebo_seeds'])} random changes as large", "", text)
        for text in _placebos(found.null_test)
    ]
    return rows


def _placebos(null: NullTestResult) -> list[str]:
    """The range of the change of dimension over placebos, after the final norm."""
    rows = null.select(metric="delta", view="final_norm", layer=null.meta["n_layers"])
    return [f"{row['placebo_low']:+.1f} to {row['placebo_high']:+.1f}" for row in rows]
