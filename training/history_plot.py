"""Figures of training: loss, quality and ranks over epochs, and the losses of several runs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

from ..errors import TrainingError
from ..render.plots import (
    BLUE,
    BUCKETS,
    GREEN,
    GREY,
    ORANGE,
    VERMILION,
    NotebookFigure,
    label_axis,
    plain_frame,
)
from .history import COLUMNS, FILE, RUN_FILE, read_history

# Okabe and Ito's colours, in the order that the paper gives its methods: blue, then red.
COLOURS = (BLUE, VERMILION, GREEN, ORANGE, "#CC79A7", "#56B4E9")
NAMES = {"full": "Full fine-tuning", "lora": "Full LoRA", "late_lora": "Late-Stage LoRA"}


@dataclass(frozen=True)
class Course:
    """What is known of one run.

    Attributes:
        label: its name in a legend.
        late: trained on late blocks only, which is drawn dashed.
        losses: training loss over epochs, in nats per token.
        records: one row per record, empty if there are none.
    """

    label: str
    late: bool
    losses: pd.Series
    records: pd.DataFrame


def plot_history(runs: Any, labels: Sequence[str] | None = None) -> Figure:
    """Loss, quality and ranks of one run (Figure 2 of arXiv 2605.22579), or the losses of several.

    One run: training loss and validation perplexity; diversity and top-1 error; and which rank
    the base gave the tokens that the model puts first. Several: training loss over epochs on a
    log scale (Figure 6), runs of late blocks only dashed.

    Args:
        runs: a `HyperfitRun`, a table of `read_history`, the folder of a run or its history.csv;
            or a list of these, or a dict from label to one of these.
        labels: names of the runs, in their order.

    Raises:
        TrainingError: if a run has nothing to draw, or labels and runs do not match.
    """
    several = isinstance(runs, Mapping | list | tuple)
    given = list(runs.values()) if isinstance(runs, Mapping) else runs if several else [runs]
    names = list(labels) if labels is not None else list(runs) if isinstance(runs, Mapping) else []
    if not given:
        raise TrainingError("there is no run to draw: give at least one")
    if names and len(names) != len(given):
        raise TrainingError(f"{len(names)} labels for {len(given)} runs: give one for each")
    courses = [_course(run, str(names[i]) if names else None, i + 1) for i, run in enumerate(given)]
    return _several(courses) if several else _single(courses[0], titled=bool(names))


def _single(course: Course, titled: bool) -> Figure:
    figure = NotebookFigure(figsize=(14, 4.2), layout="constrained")
    if titled:
        figure.suptitle(course.label, fontsize=13, fontweight="bold", parse_math=False)
    left, middle, right = figure.subplots(1, 3)
    for axes, letter, title in (
        (left, "a", "Likelihood"),
        (middle, "b", "Quality"),
        (right, "c", "Base rank of the model's first choice"),
    ):
        axes.set_title(f"{letter}  {title}", loc="left", fontsize=11)
        _epoch_axis(axes)
    _draw_losses(left, course)
    if course.records.empty:
        for axes in (middle, right):
            _say(axes, "no records were kept (record_every)")
        return figure
    _draw_quality(middle, course.records)
    _draw_ranks(right, course.records)
    return figure


def _draw_losses(axes: Axes, course: Course) -> None:
    _draw(axes, course.losses, BLUE, "-", "o")
    label_axis(axes, "training loss, nats per token (circles, solid)", BLUE)
    axes.set_ylim(bottom=0.0)
    perplexity = _positive(_column(course.records, "perplexity"))
    if not perplexity.empty:
        other = axes.twinx()
        _draw(other, perplexity, VERMILION, "--", "s")
        other.set_yscale("log")
        # Plain numbers, as perplexities are read: 20, 50, 100.
        wide = perplexity.max() > 5 * perplexity.min()
        ticks = LogLocator(subs=(1.0, 2.0, 5.0)) if wide else MaxNLocator(5)
        other.yaxis.set_major_locator(ticks)
        other.yaxis.set_minor_locator(NullLocator())
        other.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        label_axis(other, "validation perplexity, log scale (squares, dashed)", VERMILION)


def _draw_quality(axes: Axes, records: pd.DataFrame) -> None:
    _draw(axes, _column(records, "ttr"), GREEN, "-", "o", "TTR of greedy continuations")
    _draw(axes, _column(records, "top1_error"), ORANGE, "--", "s", "top-1 error, held-out text")
    axes.set_ylabel("share of tokens")
    axes.set_ylim(0.0, 1.0)
    axes.legend(frameon=False, fontsize=8)


def _draw_ranks(axes: Axes, records: pd.DataFrame) -> None:
    epochs = records["epoch"].to_numpy(dtype=float)
    shares = [100 * records[bucket[-1]].to_numpy(dtype=float) for bucket in BUCKETS]
    if len(epochs) == 1:  # a single record has no area
        epochs = epochs + np.array([-0.5, 0.5])
        shares = [np.repeat(share, 2) for share in shares]
    below = np.zeros_like(shares[0])
    for (_, colour, hatch, name, _), share in zip(BUCKETS, shares, strict=True):
        axes.fill_between(
            epochs, below, below + share, fc=colour, hatch=hatch, ec="white", lw=0.3, label=name
        )
        below = below + share
    axes.set_ylim(0.0, 100.0)
    axes.margins(x=0)
    axes.set_ylabel("share of next-token decisions (%)")
    axes.legend(loc="lower left", fontsize=8)


def _several(courses: Sequence[Course]) -> Figure:
    figure = NotebookFigure(figsize=(7.5, 4.6), layout="constrained")
    axes = figure.add_subplot()
    _epoch_axis(axes)
    for i, course in enumerate(courses):
        colour, style = COLOURS[i % len(COLOURS)], "--" if course.late else "-"
        _draw(axes, _positive(course.losses), colour, style, "", course.label)
    axes.set_yscale("log")
    axes.set_ylabel("training loss, nats per token (log scale)")
    for text in axes.legend(frameon=False).get_texts():
        text.set_parse_math(False)
    return figure


def _course(run: Any, label: str | None, number: int) -> Course:
    """Whatever a run was given as, and what it is called if nobody says."""
    method, losses, name = None, None, None
    if isinstance(run, str | Path):
        path = Path(run).expanduser()
        name = path.name if path.name != FILE else path.absolute().parent.name
        saved = _saved(path / RUN_FILE if path.is_dir() else path.with_name(RUN_FILE))
        method, losses = saved.get("recipe", {}).get("method"), saved.get("history")
        has_records = losses is None or (path / FILE if path.is_dir() else path).exists()
        records = read_history(path) if has_records else _table([])
    elif isinstance(run, pd.DataFrame):
        records = run
    elif hasattr(run, "history") and hasattr(run, "records"):
        method, losses = getattr(getattr(run, "recipe", None), "method", None), run.history
        records = _table([asdict(record) for record in run.records])
    else:
        raise TrainingError(
            f"cannot draw a {type(run).__name__}: expected a HyperfitRun, a table of read_history, "
            "or the folder of a run"
        )
    missing = [column for column in COLUMNS if column not in records]
    if missing:
        raise TrainingError(f"this table is no history of training: it has no {missing[0]}")
    if losses is not None:
        loss = pd.Series(list(losses), index=range(1, len(losses) + 1), dtype=float)
    else:
        loss = _column(records, "train_loss")
    label = label or name or NAMES.get(method or "", f"run {number}")
    return Course(label, method == "late_lora" or "late" in label.lower(), loss, records)


def _saved(file: Path) -> dict[str, Any]:
    try:
        saved = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # not every table lies beside a finished run
        return {}
    return saved if isinstance(saved, dict) else {}


def _table(records: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    return pd.DataFrame([[record[c] for c in COLUMNS] for record in records], columns=list(COLUMNS))


def _column(records: pd.DataFrame, name: str) -> pd.Series:
    """The finite values of a column over epochs."""
    finite = records[np.isfinite(records[name].to_numpy(dtype=float))]
    return pd.Series(finite[name].to_list(), index=finite["epoch"].to_list(), dtype=float)


def _positive(values: pd.Series) -> pd.Series:
    """What a log scale can show."""
    return values[values > 0]


def _draw(
    axes: Axes, values: pd.Series, colour: str, style: str, mark: str, name: str = ""
) -> None:
    # Markers where there are few values; of hundreds they would make a caterpillar.
    size = max(0.0, min(5.0, 120 / max(1, len(values))))
    axes.plot(
        values.index.to_numpy(dtype=float),
        values.to_numpy(),
        style,
        marker=mark or None,
        markersize=size,
        color=colour,
        lw=1.4,
        label=name or None,
    )


def _epoch_axis(axes: Axes) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlabel("epoch")
    plain_frame(axes)


def _say(axes: Axes, sentence: str) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    axes.text(0.5, 0.5, sentence, transform=axes.transAxes, ha="center", color=GREY)
