"""The records of a run: one row per measurement, kept in a CSV that is always complete, and charts.

Imports neither torch nor transformers, so that reading a history is quick.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checks import check_types
from ..errors import TrainingError
from ..files import expand_user, write_text
from ..render import charts
from ..render.blocks import Axis, Block, Chart, Grid, Role, Scale
from ..render.format import one_line
from ..statistics.rank_buckets import RANK_BUCKETS
from .recipes import RUN_FILE

if TYPE_CHECKING:
    import altair
    import pandas as pd

# What `hyperfit` writes beside the weights: the records.
FILE = "history.csv"


@dataclass(frozen=True)
class Record:
    """Loss, rank and quality of a model in training (arXiv 2605.22579, Figure 2).

    Everything but `train_loss` is measured on held-out sequences. Losses and entropy are in nats
    per token; errors and ranks are shares of the next-token decisions, teacher-forced.

    Attributes:
        epoch: epochs trained; 0 is the base.
        step: optimiser steps made.
        train_loss: mean over the last epoch, each batch before the step on it; NaN before the first
            epoch.
        validation_loss: mean next-token loss.
        perplexity: exp of it.
        top1_error: share of tokens that are not the model's top-1 prediction.
        ttr: distinct tokens / tokens of the greedy generations, mean over prompts.
        bigram_repetition: 1 - distinct bigrams / bigrams of the same.
        rank_1, rank_2_10, rank_gt_10: rank, in the base model's logits, of the model's top-1
            token; tied logits share the best rank.
        entropy: of the model's predictions.
        seconds: training time so far, without the time that records take.
        ttr_per_prompt: what `ttr` is the mean of, for paired comparisons; not in the CSV.
    """

    epoch: int
    step: int
    train_loss: float
    validation_loss: float
    perplexity: float
    top1_error: float
    ttr: float
    bigram_repetition: float
    rank_1: float
    rank_2_10: float
    rank_gt_10: float
    entropy: float
    seconds: float
    ttr_per_prompt: tuple[float, ...]

    def to_json(self) -> dict[str, Any]:
        """Every field as a JSON value; floats come back bit for bit."""
        values = {name: _to_json_value(value) for name, value in asdict(self).items()}
        return values | {"ttr_per_prompt": list(self.ttr_per_prompt)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Record:
        """The record that `to_json` wrote.

        Raises:
            TrainingError: if fields are missing or unknown.
        """
        unexpected = values.keys() ^ {f.name for f in fields(cls)}
        if unexpected:
            raise TrainingError(
                "this record was written by another version of hyperlens (missing or unknown: "
                f"{', '.join(sorted(unexpected))}): start the run again"
            )
        numbers: dict[str, Any] = {
            name: values[name] if name in WHOLE_NUMBERS else _from_json_value(values[name])
            for name in COLUMNS
        }
        return cls(**numbers, ttr_per_prompt=tuple(values["ttr_per_prompt"]))


# The columns of the CSV, in this order, on which users' scripts may rely.
COLUMNS = tuple(f.name for f in fields(Record) if f.name != "ttr_per_prompt")
WHOLE_NUMBERS = ("epoch", "step")


def write(path: Path, records: Sequence[Record]) -> None:
    """Write the records so far as a CSV, which `read_history` returns bit for bit.

    The small file is replaced as a whole each time, so a reader never sees half a row, even after
    this process was killed.

    Raises:
        ResultsError: if it cannot be written.
    """
    rows = [[repr(getattr(record, name)) for name in COLUMNS] for record in records]
    write_text(path, "".join(",".join(row) + "\n" for row in [COLUMNS, *rows]))


@check_types
def read_history(source: str | Path) -> pd.DataFrame:
    """The records of a run as a table, one row each; `Record` says what the columns are.

    Args:
        source: the folder of a run, or its history.csv.

    Raises:
        TrainingError: if there is no history, or the file is not one.
    """
    import pandas as pd

    path = expand_user(source)
    path = path / FILE if path.is_dir() else path
    try:
        header, *lines = path.read_text(encoding="utf-8").splitlines() or [""]
    except (FileNotFoundError, NotADirectoryError):
        raise TrainingError(
            f"no {path}: expected the folder of a run that kept a record (record_every above 0), "
            f"or its {FILE}"
        ) from None
    except (OSError, ValueError) as error:
        raise TrainingError(f"cannot read {path} as a history of training: {error}") from None
    if header != ",".join(COLUMNS):
        raise TrainingError(
            f"{path} is not a history of training: expected the columns {', '.join(COLUMNS)}"
        )
    try:
        rows = [_numbers(line) for line in lines]
    except ValueError as error:
        raise TrainingError(f"{path} is not a history of training: {error}") from None
    kinds = {name: "int64" if name in WHOLE_NUMBERS else "float64" for name in COLUMNS}
    return pd.DataFrame(rows, columns=list(COLUMNS)).astype(kinds)


def _numbers(line: str) -> list[int | float]:
    cells = zip(COLUMNS, line.split(","), strict=True)
    return [int(cell) if name in WHOLE_NUMBERS else float(cell) for name, cell in cells]


def _to_json_value(value: Any) -> Any:
    """NaN as null and infinities as strings, which JSON has no numbers for."""
    if not isinstance(value, float) or math.isfinite(value):
        return value
    return None if math.isnan(value) else str(value)


def _from_json_value(value: Any) -> float:
    return math.nan if value is None else float(value)


# What a run is called in a chart if nobody names it.
METHOD_NAMES = {"full": "Full fine-tuning", "lora": "Full LoRA", "late_lora": "Late-Stage LoRA"}


def called(name: str) -> str:
    """A run or model in words where it is named after its method, else its own name.

    >>> called("lora"), called("my run")
    ('Full LoRA', 'my run')
    """
    return METHOD_NAMES.get(name, one_line(name))


def free_name(name: str, taken: Collection[str]) -> str:
    """The name, or the first of "name (2)", "name (3)", ... that is not taken.

    >>> free_name("a", {"a"}), free_name("b", {"a"})
    ('a (2)', 'b')
    """
    numbered = (f"{name} ({n})" for n in count(2))
    return next(one for one in chain([name], numbered) if one not in taken)


EPOCH = Axis("epoch", "epoch")

# Values over epochs.
Points = Sequence[tuple[int, float]]


@dataclass(frozen=True)
class Course:
    """What is known of one run.

    Attributes:
        label: what it is called.
        losses: mean training loss of each epoch, in nats per token.
        records: one mapping per record, by the names of `COLUMNS`; empty if there are none.
    """

    label: str
    losses: Points
    records: Sequence[Mapping[str, Any]]

    def over_epochs(self, column: str) -> Points:
        """A column of the records."""
        return [(int(record["epoch"]), float(record[column])) for record in self.records]


@check_types
def plot_history(runs: Any, labels: Sequence[str] | None = None) -> altair.TopLevelMixin:
    """Loss, quality and ranks of one run (Figure 2 of arXiv 2605.22579), or several runs compared.

    One run: training loss; validation perplexity; diversity and top-1 error; and where the base
    ranked the model's top-1 predictions. Several: training loss over epochs on a log scale
    (Figure 6), and what was recorded of each, on one axis for all.

    Args:
        runs: a `HyperfitRun`, a table of `read_history`, the folder of a run or its history.csv;
            or a list of these, or a dict from label to one of these.
        labels: names of the runs, in their order.

    Returns:
        An Altair chart, which shows itself in notebooks; `.save("figure.svg")` writes it.

    Raises:
        TrainingError: if a run has nothing to draw, or labels and runs do not match.
    """
    several = isinstance(runs, Mapping | list | tuple)
    if isinstance(runs, Mapping):
        sources, labels = list(runs.values()), list(runs) if labels is None else labels
    else:
        sources = list(runs) if several else [runs]
    names = [] if labels is None else list(labels)
    if not sources:
        raise TrainingError("there is no run to draw: give at least one")
    if names and len(names) != len(sources):
        raise TrainingError(f"{len(names)} labels for {len(sources)} runs: give one for each")
    courses = [
        course_of(run, str(names[i]) if names else "", f"run {i + 1}")
        for i, run in enumerate(sources)
    ]
    title = courses[0].label if names and not several else ""
    if not several and not courses[0].records:
        title = f"{title}: no records were kept (record_every)".removeprefix(": ")
    drawn = charts.figure(curves_of(courses) if several else history_of(courses[0]), title)
    if drawn is None:
        raise TrainingError("there is nothing to draw: no run has a loss above 0 or a record")
    return drawn


def history_of(course: Course) -> list[Block]:
    """The charts of one run, those that have no finite value left out."""
    likelihood = [
        _chart("Training loss", "nats per token", "zero", {"training loss": course.losses}),
        _chart(
            "Perplexity of held-out text",
            "perplexity, log scale",
            "log",
            {"validation perplexity": course.over_epochs("perplexity")},
        ),
    ]
    decisions = [
        _chart(
            "Diversity and error",
            "share of tokens",
            "share",
            {
                "TTR of greedy generations": course.over_epochs("ttr"),
                "top-1 error, held-out text": course.over_epochs("top1_error"),
            },
        ),
        _chart(
            "Base rank of the model's top-1 predictions",
            "share of next-token decisions",
            "share",
            {f"rank {one.label}": course.over_epochs(one.metric) for one in RANK_BUCKETS},
        ),
    ]
    rows = ([chart for chart in row if chart.rows] for row in (likelihood, decisions))
    return [Grid(row) for row in rows if row]


# What of the records is compared between runs: its column, title, unit and axis.
COMPARED: tuple[tuple[str, str, str, Scale], ...] = (
    ("ttr", "Diversity of greedy generations", "type-token ratio", "share"),
    ("bigram_repetition", "Repetition of greedy generations", "share of bigrams", "share"),
    ("perplexity", "Perplexity of held-out text", "perplexity, log scale", "log"),
    ("rank_1", "Top-1 predictions that are the base's too", "share of decisions", "share"),
)


def curves_of(courses: Sequence[Course]) -> list[Block]:
    """Losses and records of several runs, each kind in one chart; runs of one name get a number."""
    named: dict[str, Course] = {}
    for course in courses:
        named[free_name(course.label, named)] = course
    losses = {name: course.losses for name, course in named.items()}
    drawn = [
        _chart("Training loss", "nats per token, log scale", "log", losses, role="tuned"),
        *(
            _chart(title, unit, scale, _over_epochs(named, column), role="tuned")
            for column, title, unit, scale in COMPARED
        ),
    ]
    drawn = [chart for chart in drawn if chart.rows]
    if len(drawn) == 1:
        return list(drawn)
    return [Grid(drawn[i : i + 2]) for i in range(0, len(drawn), 2)]


def _over_epochs(named: Mapping[str, Course], column: str) -> dict[str, Points]:
    return {name: course.over_epochs(column) for name, course in named.items()}


def _chart(
    title: str, unit: str, scale: Scale, series: Mapping[str, Points], role: Role = "other"
) -> Chart:
    """Series over epochs; values that the axis cannot show are left out."""
    least = 0.0 if scale == "log" else -math.inf
    rows = [
        {"series": name, "epoch": epoch, "value": value}
        for name, points in series.items()
        for epoch, value in points
        if math.isfinite(value) and value > least
    ]
    alt = f"{title} over the epochs of training: {', '.join(series)}"
    return Chart(
        "lines", title, alt, rows, EPOCH, Axis("value", unit, scale), dict.fromkeys(series, role)
    )


def course_of(run: Any, label: str, otherwise: str) -> Course:
    """A run from whatever it was given as.

    Args:
        run: see `plot_history`.
        label: what to call it; if empty, the name of its folder or its method.
        otherwise: what to call it if it has neither.
    """
    method, losses, name = None, None, ""
    if isinstance(run, str | Path):
        path = Path(run).expanduser()
        name = path.name if path.name != FILE else path.absolute().parent.name
        saved = read_run(path if path.is_dir() else path.parent)
        method, losses = saved.get("recipe", {}).get("method"), saved.get("history")
        has_records = losses is None or (path / FILE if path.is_dir() else path).exists()
        records = list(_records_of(read_history(path))) if has_records else []
    elif hasattr(run, "columns"):
        records = list(_records_of(run))
    elif hasattr(run, "history") and hasattr(run, "records"):
        method, losses = getattr(getattr(run, "recipe", None), "method", None), run.history
        records = [asdict(record) for record in run.records]
    else:
        raise TrainingError(
            f"cannot draw a {type(run).__name__}: expected a HyperfitRun, a table of read_history, "
            "or the folder of a run"
        )
    course = Course(label or name or METHOD_NAMES.get(method or "", otherwise), (), records)
    points = course.over_epochs("train_loss") if losses is None else list(enumerate(losses, 1))
    return Course(course.label, points, records)


def _records_of(table: pd.DataFrame) -> Iterator[dict[str, Any]]:
    missing = [column for column in COLUMNS if column not in table]
    if missing:
        raise TrainingError(f"this table is no history of training: it has no {missing[0]}")
    for values in zip(*(table[column].tolist() for column in COLUMNS), strict=True):
        yield dict(zip(COLUMNS, values, strict=True))


def read_run(folder: Path) -> dict[str, Any]:
    """What `hyperfit` wrote about the run in a folder; empty where it wrote nothing readable."""
    try:
        saved = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # not every table lies beside a finished run
        return {}
    return saved if isinstance(saved, dict) else {}
