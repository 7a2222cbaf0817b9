"""How did training go? Losses, diversity and time of several runs (arXiv 2605.22579, section 6).

Figures 2, 6, 8, 10 and 12 to 14 and Table 8 of the paper, from what `hyperfit` saved.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, median
from typing import Any, ClassVar

from ..checks import check_types
from ..errors import TrainingError
from ..render.blocks import Block, Details, Heading, Table, Text, Verdict
from ..render.format import FRACTION, MISSING, count, number, one_line
from ..results.fingerprint import versions
from ..results.result import Result
from .history import Course, called, course_of, curves_of, history_of, read_run

EXAMPLES = (
    "hyperlens training ./full ./late-lora --out training",
    "hyperlens report ./full ./late-lora --out report.html",
)

# A loss is a spike if it is above this many times the median of so many epochs on either side.
SPIKE_FACTOR, SPIKE_WINDOW = 2.0, 5
HOUR = 3600.0


@check_types
def compare_training(runs: Mapping[str, Any]) -> TrainingResult:
    """How did training go, and how do several runs compare?

    Args:
        runs: name to the folder of a run that `hyperfit` saved, or to a `HyperfitRun`. Speed-ups
            and distances are relative to the first.

    Returns:
        A `TrainingResult`: loss, diversity, time and spikes of every run.

    Raises:
        TrainingError: if there is no run, or one has neither losses nor records.
    """
    if not runs:
        raise TrainingError("there is no run to describe: give at least one")
    courses = {name: course_of(run, name, name) for name, run in runs.items()}
    for name, course in courses.items():
        if not course.losses and not course.records:
            raise TrainingError(f"run {name!r} has neither losses nor records: train it again")
    about = {name: _about(run) for name, run in runs.items()}
    first = next(iter(runs))
    table = [
        {"run": name, "metric": metric, "value": float(value)}
        for name in runs
        for metric, value in _metrics(courses[name], about[name], courses[first], about[first])
    ]
    curves = {
        name: {
            "losses": [list(point) for point in course.losses],
            "records": [_numbers(record) for record in course.records],
        }
        for name, course in courses.items()
    }
    spikes = [
        {"run": name, "epoch": epoch, "loss": loss}
        for name, course in courses.items()
        for epoch, loss in find_spikes(course.losses)
    ]
    meta = {
        "title": ", ".join(map(one_line, runs)),
        "runs": about,
        "versions": versions(),
        "notes": ["each run is one draw: times and losses of another would differ"],
    }
    return TrainingResult(tuple(table), {"curves": curves, "spikes": spikes}, meta)


def _about(run: Any) -> dict[str, Any]:
    """Method, size, time and device of a run, as far as they are known."""
    if isinstance(run, str | Path):
        saved = read_run(Path(run).expanduser())
        recipe, manifest = saved.get("recipe", {}), saved.get("manifest", {})
    else:
        recipe = asdict(run.recipe) if hasattr(run, "recipe") else {}
        manifest = getattr(run, "manifest", {})
    known = (
        *("method", "trained_blocks", "trained_parameters", "seconds"),
        *("peak_memory", "device", "prefix_cache"),
    )
    found = {name: manifest[name] for name in known if name in manifest}
    return {"method": recipe.get("method")} | found


def _numbers(record: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in record.items() if name != "ttr_per_prompt"}


def _metrics(
    course: Course, about: Mapping[str, Any], first: Course, about_first: Mapping[str, Any]
) -> Iterator[tuple[str, float]]:
    """Everything that is one number of a run; what is not known is left out."""
    if course.losses:
        yield "epochs", len(course.losses)
        yield "final_loss", course.losses[-1][1]
        yield "n_spikes", len(find_spikes(course.losses))
        if first.losses:
            yield "loss_factor", loss_factor(course.losses, first.losses)
    seconds, weights = about.get("seconds"), about.get("trained_parameters")
    if seconds:
        yield "hours", seconds / HOUR
        if about_first.get("seconds"):
            yield "speedup", about_first["seconds"] / seconds
    if about.get("peak_memory"):
        yield "peak_gib", about["peak_memory"] / 2**30
    if weights:
        yield "trained_parameters", weights
    yield from _of_records(course.records)


def _of_records(records: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, float]]:
    """When diversity came, and what became of perplexity."""
    if not records:
        return
    start, end = records[0], records[-1]
    peak = max(records, key=lambda record: record["ttr"])
    yield "ttr_start", start["ttr"]
    yield "ttr_peak", peak["ttr"]
    yield "epoch_ttr_peak", peak["epoch"]
    yield "hours_ttr_peak", peak["seconds"] / HOUR
    doubled = next((r for r in records if r["ttr"] >= 2 * start["ttr"]), None)
    if doubled is not None:
        yield "epoch_ttr_doubled", doubled["epoch"]
    yield "perplexity_start", start["perplexity"]
    yield "perplexity_end", end["perplexity"]
    # The paper's Figure 2 (c) reads the ranks at epoch 60.
    at_60 = next((record for record in records if record["epoch"] == 60), None)
    if at_60 is not None:
        yield "rank_1_at_60", at_60["rank_1"]
        yield "overridden_at_60", 1 - at_60["rank_1"]


def find_spikes(losses: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Epochs whose loss is far above that of the epochs around it.

    >>> find_spikes([(1, 0.4), (2, 0.3), (3, 0.9), (4, 0.2), (5, 0.1)])
    [(3, 0.9)]
    """
    found = []
    for place, (epoch, loss) in enumerate(losses):
        before = [value for _, value in losses[max(0, place - SPIKE_WINDOW) : place]]
        after = [value for _, value in losses[place + 1 : place + 1 + SPIKE_WINDOW]]
        if before and after and loss > SPIKE_FACTOR * max(median(before), median(after)):
            found.append((epoch, loss))
    return found


def loss_factor(
    losses: Sequence[tuple[int, float]], reference: Sequence[tuple[int, float]]
) -> float:
    """By what factor two loss curves differ: exp of the mean |log ratio| over common epochs.

    1 where they are the same, NaN where no epoch has two positive losses.

    >>> loss_factor([(1, 2.0), (2, 1.0)], [(1, 1.0), (2, 2.0)])
    2.0
    """
    other = {epoch: loss for epoch, loss in reference if loss > 0}
    gaps = [abs(math.log(loss / other[e])) for e, loss in losses if loss > 0 and e in other]
    return round(math.exp(fmean(gaps)), 12) if gaps else math.nan


# Metric, what it is called, and how it is written.
SHOWN = (
    ("final_loss", "final loss", number),
    ("hours", "hours", number),
    ("speedup", "speed-up", lambda x: f"{x:.2f}x"),
    ("peak_gib", "peak memory, GiB", lambda x: f"{x:.2f}"),
    ("trained_parameters", "trained weights", lambda x: f"{x:,.0f}"),
    ("ttr_start", "TTR, base", FRACTION),
    ("ttr_peak", "TTR, peak", FRACTION),
    ("epoch_ttr_doubled", "doubled at epoch", lambda x: f"{x:.0f}"),
    ("epoch_ttr_peak", "peak at epoch", lambda x: f"{x:.0f}"),
    ("n_spikes", "spikes", lambda x: f"{x:.0f}"),
)


class TrainingResult(Result):
    """How one or several runs of `hyperfit` went.

    The table has a row per run and metric. Of all epochs: `epochs`, `final_loss` (nats per token),
    `n_spikes` and `loss_factor`, by which the curve differs from the first run's. `hours` is the
    time of training without that of records, `speedup` the first run's over it; `peak_gib` the most
    memory held since training was last started (of a CPU the whole process's). Of the records:
    `ttr_start`, `ttr_peak`, `epoch_ttr_doubled`, `epoch_ttr_peak`, `hours_ttr_peak`,
    `perplexity_start`, `perplexity_end`, and base ranks at epoch 60, as in the paper's Figure 2.
    What is not known has no row.

    Extras: `curves`, the losses and records of each run; `spikes`, epochs whose loss is more than
    twice the median of the five before and of the five after.
    """

    name: ClassVar[str] = "training"
    title: ClassVar[str] = "How did training go?"
    columns: ClassVar[tuple[str, ...]] = ("run", "metric", "value")

    @property
    def runs(self) -> list[str]:
        """Names of the runs, in order."""
        return list(dict.fromkeys(row["run"] for row in self.table))

    def known(self, run: str) -> dict[str, float]:
        """Metric to value of one run.

        Raises:
            ResultsError: if there is no such run.
        """
        return {row["metric"]: row["value"] for row in self.select(run=run)}

    @property
    def courses(self) -> list[Course]:
        """The curves of every run."""
        return [
            Course(called(name), [(int(e), x) for e, x in curve["losses"]], curve["records"])
            for name, curve in self.extras["curves"].items()
        ]

    def verdicts(self) -> list[Verdict]:
        """The loss each run ended with, and when its text was most diverse."""
        found = [Verdict("training", self._verdict(name)) for name in self.runs]
        caution = (
            "A low loss on the training texts says nothing of quality, and times are of this "
            "machine: compare them only between runs of one machine that had nothing else to do."
        )
        return [*found, Verdict("time", caution, caution=True)]

    def _verdict(self, run: str) -> str:
        known = self.known(run)
        parts = []
        if "final_loss" in known:
            epochs = count(int(known["epochs"]), "epoch")
            parts.append(f"loss {number(known['final_loss'])} nats after {epochs}")
        if "ttr_peak" in known:
            parts.append(
                f"TTR of the recorded prompts {FRACTION(known['ttr_start'])} before and at most "
                f"{FRACTION(known['ttr_peak'])}, at epoch {known['epoch_ttr_peak']:.0f}"
            )
        if known.get("speedup", 1.0) != 1.0:
            parts.append(f"{known['speedup']:.2f}x the speed of {called(self.runs[0])}")
        return f"{called(run)}: {'; '.join(parts)}."

    def evidence(self) -> list[Block]:
        """Numbers of every run, losses and records on common axes, and the record of each."""
        about = Text(
            "Speed-up: time of the first run over this one's, records left out. Spike: a loss "
            f"above {SPIKE_FACTOR:g} times the median of the {SPIKE_WINDOW} epochs before and of "
            f"the {SPIKE_WINDOW} after. TTR here is of the prompts recorded during training, "
            "which may differ from those of other measurements."
        )
        more = [Details("record of each run", records) for records in [self._records()] if records]
        return [about, self._numbers(), *curves_of(self.courses), *more]

    def _numbers(self) -> Table:
        rows = []
        for name in self.runs:
            known = self.known(name)
            cells = (
                write(known[metric]) if metric in known else MISSING for metric, _, write in SHOWN
            )
            rows.append([called(name), *cells])
        return Table(["", *(words for _, words, _ in SHOWN)], rows, "of each training run")

    def _records(self) -> list[Block]:
        """Losses, diversity, error and ranks over epochs, run by run."""
        found: list[Block] = []
        for course in self.courses:
            if course.records:
                found += [Heading(course.label), *history_of(course)]
        return found
