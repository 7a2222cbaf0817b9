"""Figures of training: every number where it belongs, from whatever holds a history."""

import io
import json
import math
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from test_record import a_record

from hyperlens.errors import TrainingError
from hyperlens.training import history, history_plot, plot_history, read_history
from hyperlens.training.history import Record

ROOT = Path(__file__).resolve().parent.parent


def draw(figure: Figure) -> None:
    """Everything is drawn only now; a warning of matplotlib's is an error here."""
    figure.savefig(io.BytesIO(), format="png", dpi=50)


def records(n: int, every: int = 10) -> list[Record]:
    return [
        a_record(
            epoch=every * i,
            step=4 * every * i,
            train_loss=math.nan if i == 0 else 3.0 * 0.5**i,
            perplexity=20.0 * 1.5**i,
            ttr=0.4 + 0.02 * i,
            top1_error=0.7 - 0.01 * i,
            rank_1=1 - 0.03 * i,
            rank_2_10=0.02 * i,
            rank_gt_10=0.01 * i,
        )
        for i in range(n)
    ]


@dataclass
class Run:
    """What is read of a HyperfitRun."""

    records: tuple[Record, ...] = field(default_factory=lambda: tuple(records(6)))
    history: tuple[float, ...] = tuple(3.0 * 0.9**i for i in range(50))
    method: str = "full"

    @property
    def recipe(self) -> Any:
        return SimpleNamespace(method=self.method)


def panel(figure: Figure, label: str) -> Axes:
    (found,) = [axes for axes in figure.axes if label in axes.get_ylabel()]
    return found


def line(axes: Axes, i: int = 0) -> tuple[list[float], list[float]]:
    one = axes.lines[i]
    return list(np.asarray(one.get_xdata())), list(np.asarray(one.get_ydata()))


def as_folder(run: Run, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    history.write(folder / history.FILE, run.records)
    saved = {"recipe": {"method": run.method}, "history": list(run.history)}
    (folder / history.RUN_FILE).write_text(json.dumps(saved))
    return folder


def test_it_reads_the_files_that_a_run_writes() -> None:
    assert history_plot.RUN_FILE == history.RUN_FILE
    assert history.FILE == "history.csv"


# One run: Figure 2


@pytest.mark.parametrize("source", ["run", "folder", "file", "str"])
def test_three_panels_show_loss_quality_and_ranks(source: str, tmp_path: Path) -> None:
    run = Run()
    folder = as_folder(run, tmp_path / "mine")
    file = folder / history.FILE
    given = {"run": run, "folder": folder, "file": file, "str": str(folder)}[source]
    figure = plot_history(given)
    draw(figure)
    titles = [axes.get_title(loc="left") for axes in figure.axes if axes.get_title(loc="left")]
    assert [title[0] for title in titles] == ["a", "b", "c"]
    epochs = [record.epoch for record in run.records]
    assert line(panel(figure, "training loss")) == (list(range(1, 51)), list(run.history))
    perplexity = panel(figure, "perplexity")
    assert line(perplexity) == (epochs, [record.perplexity for record in run.records])
    assert perplexity.get_yscale() == "log"
    assert panel(figure, "training loss").get_yscale() == "linear"
    quality = panel(figure, "share of tokens")
    assert line(quality, 0) == (epochs, [record.ttr for record in run.records])
    assert line(quality, 1) == (epochs, [record.top1_error for record in run.records])
    assert quality.get_ylim() == (0, 1)


def test_the_areas_of_ranks_are_stacked() -> None:
    run = Run()
    axes = panel(plot_history(run), "decisions")
    areas = [area for area in axes.collections if isinstance(area, PolyCollection)]
    tops = []
    for area in areas:
        (path,) = area.get_paths()
        at_end = path.vertices[path.vertices[:, 0] == run.records[-1].epoch][:, 1]  # type: ignore[index]
        tops.append((at_end.min(), at_end.max()))
    last = run.records[-1]
    expected = np.cumsum([0, last.rank_1, last.rank_2_10, last.rank_gt_10]) * 100
    assert [low for low, _ in tops] == pytest.approx(expected[:3])
    assert [high for _, high in tops] == pytest.approx(expected[1:])
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["rank 1", "rank 2-10", "rank > 10"]
    assert len({area.get_hatch() for area in areas}) == 3
    assert axes.get_ylim() == (0, 100)


def test_a_table_has_the_losses_of_its_records() -> None:
    table = pd.DataFrame([asdict(record) for record in records(4)])
    figure = plot_history(table)
    draw(figure)
    # The base has no training loss.
    assert line(panel(figure, "training loss")) == ([10, 20, 30], [1.5, 0.75, 0.375])


def test_a_csv_without_a_run_beside_it_is_enough(tmp_path: Path) -> None:
    history.write(tmp_path / history.FILE, records(4))
    for source in (tmp_path, tmp_path / history.FILE, read_history(tmp_path)):
        assert line(panel(plot_history(source), "training loss"))[0] == [10, 20, 30]
    (tmp_path / history.RUN_FILE).write_text("[not a run")
    assert line(panel(plot_history(tmp_path), "training loss"))[0] == [10, 20, 30]


@pytest.mark.parametrize("n", [0, 1, 2, 26, 300])
def test_any_number_of_records_can_be_drawn(n: int) -> None:
    run = Run(records=tuple(records(min(n, 26))) if n <= 26 else tuple(records(26, 1)) * 12)
    figure = plot_history(run)
    draw(figure)
    said = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert ("no records were kept (record_every)" in said) == (n == 0)
    for axes in figure.axes:
        assert all(float(tick).is_integer() for tick in axes.get_xticks())


def test_numbers_that_no_axis_can_show_are_left_out() -> None:
    infinite = [a_record(epoch=i, perplexity=math.inf, train_loss=math.nan) for i in range(3)]
    figure = plot_history(Run(records=tuple(infinite), history=()))
    draw(figure)
    assert not [axes for axes in figure.axes if "perplexity" in axes.get_ylabel()]
    draw(plot_history([Run(history=(1.0, 0.0, math.nan, 0.5)), Run(history=())]))


@pytest.mark.parametrize("label", ["TinyLlama, full", "$x_{$", "a\nb"])
def test_any_label_can_be_drawn(label: str) -> None:
    figure = plot_history(Run(), labels=[label])
    draw(figure)
    assert figure.get_suptitle() == label
    draw(plot_history([Run()], labels=[label]))
    assert plot_history(Run()).get_suptitle() == ""


# Several runs: Figure 6


def test_several_runs_share_a_log_axis_and_late_ones_are_dashed(tmp_path: Path) -> None:
    lora, late = Run(method="lora"), Run(method="late_lora", history=(2.0, 1.0, 0.5))
    folder = as_folder(late, tmp_path / "run-7")
    figure = plot_history([lora, late, folder])
    draw(figure)
    (axes,) = figure.axes
    assert axes.get_yscale() == "log"
    assert "nats per token" in axes.get_ylabel()
    assert [one.get_label() for one in axes.lines] == ["Full LoRA", "Late-Stage LoRA", "run-7"]
    assert [one.get_linestyle() for one in axes.lines] == ["-", "--", "--"]
    assert len({one.get_color() for one in axes.lines}) == 3
    assert line(axes, 1) == ([1, 2, 3], [2.0, 1.0, 0.5])
    assert line(axes, 2) == line(axes, 1)


def test_labels_come_from_the_dict_or_from_the_caller() -> None:
    table = pd.DataFrame([asdict(record) for record in records(3)])
    by_name = plot_history({"everything": table, "Late-Stage": table})
    assert [one.get_label() for one in by_name.axes[0].lines] == ["everything", "Late-Stage"]
    assert [one.get_linestyle() for one in by_name.axes[0].lines] == ["-", "--"]
    named = plot_history((table, Run()), labels=["a", "b"])
    assert [one.get_label() for one in named.axes[0].lines] == ["a", "b"]
    assert [one.get_label() for one in plot_history([table]).axes[0].lines] == ["run 1"]


def test_a_run_without_records_still_has_losses(tmp_path: Path) -> None:
    folder = as_folder(Run(records=()), tmp_path / "run")
    (folder / history.FILE).unlink()
    assert line(plot_history([folder]).axes[0])[0] == list(range(1, 51))
    draw(plot_history(folder))


# What cannot be drawn


def refusal(*args: Any, **options: Any) -> str:
    with pytest.raises(TrainingError) as caught:
        plot_history(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_cannot_be_drawn_is_said(tmp_path: Path) -> None:
    assert "no run to draw" in refusal([])
    assert "no run to draw" in refusal({})
    assert "2 labels for 1 runs" in refusal([Run()], labels=["a", "b"])
    assert "cannot draw a int" in refusal([Run(), 3])
    assert "no validation_loss" in refusal(
        pd.DataFrame({"epoch": [1], "step": [1], "train_loss": [1.0]})
    )
    assert "expected the folder of a run" in refusal(tmp_path)
    (tmp_path / history.FILE).write_text("a,b\n")
    assert "not a history" in refusal({"x": tmp_path})


def test_pyplot_is_left_alone(tmp_path: Path) -> None:
    history.write(tmp_path / history.FILE, records(3))
    code = (
        "import sys\n"
        "from hyperlens.training import plot_history\n"
        f"plot_history({str(tmp_path)!r}).savefig({str(tmp_path / 'x.png')!r})\n"
        f"plot_history([{str(tmp_path)!r}]).savefig({str(tmp_path / 'y.png')!r})\n"
        "assert not {'matplotlib.pyplot', 'torch'} & set(sys.modules)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
