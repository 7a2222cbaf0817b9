"""Figures of training: every number where it belongs, from whatever holds a history."""

import json
import math
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from test_record import a_record

from hyperlens.errors import TrainingError
from hyperlens.render import charts
from hyperlens.render.blocks import Chart, flat
from hyperlens.training import history, plot_history, read_history
from hyperlens.training.history import Record

ROOT = Path(__file__).resolve().parent.parent


def drawn(runs: Any, **options: Any) -> tuple[dict[str, Chart], dict[str, Any]]:
    """The blocks of a figure by their titles, and the figure as Vega-Lite, drawn by its engine."""
    blocks = []
    with pytest.MonkeyPatch.context() as patch:
        whole = charts.figure
        patch.setattr(charts, "figure", lambda b, title="": blocks.append(b) or whole(b, title))
        chart = plot_history(runs, **options)
    assert charts.svg(chart).startswith("<svg")
    (only,) = blocks
    found = {block.title: block for block in flat(only) if isinstance(block, Chart)}
    return found, chart.to_dict()


def line(chart: Chart, series: str) -> tuple[list[int], list[float]]:
    rows = [row for row in chart.rows if row["series"] == series]
    return [row["epoch"] for row in rows], [row["value"] for row in rows]


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


def as_folder(run: Run, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    history.write(folder / history.FILE, run.records)
    saved = {"recipe": {"method": run.method}, "history": list(run.history)}
    (folder / history.RUN_FILE).write_text(json.dumps(saved))
    return folder


# One run: Figure 2

LOSS, PERPLEXITY = "Training loss", "Perplexity of held-out text"
QUALITY, RANKS = "Diversity and error", "Base rank of the model's top-1 predictions"


@pytest.mark.parametrize("source", ["run", "folder", "file", "str"])
def test_charts_show_loss_quality_and_ranks(source: str, tmp_path: Path) -> None:
    run = Run()
    folder = as_folder(run, tmp_path / "mine")
    file = folder / history.FILE
    given = {"run": run, "folder": folder, "file": file, "str": str(folder)}[source]
    found, _ = drawn(given)
    assert list(found) == [LOSS, PERPLEXITY, QUALITY, RANKS]
    epochs = [record.epoch for record in run.records]
    assert line(found[LOSS], "training loss") == (list(range(1, 51)), list(run.history))
    assert line(found[PERPLEXITY], "validation perplexity") == (
        epochs,
        [record.perplexity for record in run.records],
    )
    assert (found[PERPLEXITY].y.scale, found[LOSS].y.scale) == ("log", "zero")
    assert line(found[QUALITY], "TTR of greedy generations") == (
        epochs,
        [record.ttr for record in run.records],
    )
    assert line(found[QUALITY], "top-1 error, held-out text") == (
        epochs,
        [record.top1_error for record in run.records],
    )
    assert found[QUALITY].y.scale == "share"
    assert {chart.x.title for chart in found.values()} == {"epoch"}


def test_the_shares_of_ranks_are_those_of_the_records() -> None:
    run = Run()
    ranks = drawn(run)[0][RANKS]
    assert ranks.series == ["rank 1", "rank 2-10", "rank >10"]
    for series, column in zip(ranks.series, ("rank_1", "rank_2_10", "rank_gt_10"), strict=True):
        assert line(ranks, series)[1] == [getattr(record, column) for record in run.records]
    assert ranks.y.scale == "share"
    assert len(set(charts.colours([ranks]).values())) == 3


def test_a_table_has_the_losses_of_its_records() -> None:
    table = pd.DataFrame([asdict(record) for record in records(4)])
    # The base has no training loss.
    assert line(drawn(table)[0][LOSS], "training loss") == ([10, 20, 30], [1.5, 0.75, 0.375])


def test_a_csv_without_a_run_beside_it_is_enough(tmp_path: Path) -> None:
    history.write(tmp_path / history.FILE, records(4))
    for source in (tmp_path, tmp_path / history.FILE, read_history(tmp_path)):
        assert line(drawn(source)[0][LOSS], "training loss")[0] == [10, 20, 30]
    (tmp_path / history.RUN_FILE).write_text("[not a run")
    assert line(drawn(tmp_path)[0][LOSS], "training loss")[0] == [10, 20, 30]


@pytest.mark.parametrize("n", [0, 1, 2, 26, 300])
def test_any_number_of_records_can_be_drawn(n: int) -> None:
    run = Run(records=tuple(records(min(n, 26))) if n <= 26 else tuple(records(26, 1)) * 12)
    found, spec = drawn(run)
    assert ("no records were kept (record_every)" in str(spec.get("title"))) == (n == 0)
    assert (list(found) == [LOSS]) == (n == 0)


def test_the_axis_of_epochs_has_whole_numbers() -> None:
    _, spec = drawn([Run(records=(), history=(2.0, 1.0))])
    x = [layer["encoding"]["x"]["axis"] for layer in spec["layer"]]
    assert all((axis["tickMinStep"], axis["format"]) == (1, "d") for axis in x)


@pytest.mark.parametrize(("n", "opacity"), [(50, 1), (300, 0)])
def test_marks_do_not_hide_a_line_of_many_epochs(n: int, opacity: int) -> None:
    _, spec = drawn([Run(records=(), history=tuple(3.0 * 0.99**i for i in range(n)))])
    (points,) = [one["mark"] for one in spec["layer"] if one["mark"]["type"] == "point"]
    assert points["opacity"] == opacity


def test_numbers_that_no_axis_can_show_are_left_out() -> None:
    infinite = [a_record(epoch=i, perplexity=math.inf, train_loss=math.nan) for i in range(3)]
    assert list(drawn(Run(records=tuple(infinite), history=()))[0]) == [QUALITY, RANKS]
    found, _ = drawn([Run(history=(1.0, 0.0, math.nan, 0.5)), Run(history=())], labels=["a", "b"])
    assert line(found[LOSS], "a") == ([1, 4], [1.0, 0.5])
    assert line(found[LOSS], "b") == ([], [])


@pytest.mark.parametrize("label", ["TinyLlama, full", "$x_{$", "a\nb"])
def test_any_label_can_be_drawn(label: str) -> None:
    assert drawn(Run(), labels=[label])[1]["title"] == label
    assert drawn([Run()], labels=[label])[0][LOSS].series == [label]
    assert "title" not in drawn(Run())[1]


# Several runs: Figure 6


def test_several_runs_share_a_log_axis(tmp_path: Path) -> None:
    lora, late = Run(method="lora"), Run(method="late_lora", history=(2.0, 1.0, 0.5))
    folder = as_folder(late, tmp_path / "run-7")
    found, _ = drawn([lora, late, folder])
    chart = found[LOSS]
    assert chart.y.scale == "log"
    assert "nats per token" in chart.y.title
    assert chart.series == ["Full LoRA", "Late-Stage LoRA", "run-7"]
    assert len(set(charts.colours([chart]).values())) == 3
    assert line(chart, "Late-Stage LoRA") == ([1, 2, 3], [2.0, 1.0, 0.5])
    assert line(chart, "run-7") == line(chart, "Late-Stage LoRA")
    for title, column in (
        ("Diversity of greedy generations", "ttr"),
        ("Repetition of greedy generations", "bigram_repetition"),
        ("Perplexity of held-out text", "perplexity"),
        ("Top-1 predictions that are the base's too", "rank_1"),
    ):
        for name in chart.series:
            expected = [getattr(record, column) for record in late.records]
            assert line(found[title], name)[1] == expected


def test_labels_come_from_the_dict_or_from_the_caller() -> None:
    table = pd.DataFrame([asdict(record) for record in records(3)])
    assert drawn({"everything": table, "Late-Stage": table})[0][LOSS].series == [
        "everything",
        "Late-Stage",
    ]
    assert drawn((table, Run()), labels=["a", "b"])[0][LOSS].series == ["a", "b"]
    assert drawn([table])[0][LOSS].series == ["run 1"]


def test_runs_of_one_name_stay_apart() -> None:
    chart = drawn([Run(), Run(history=(2.0, 1.0)), Run()])[0][LOSS]
    assert chart.series == [f"Full fine-tuning{number}" for number in ("", " (2)", " (3)")]
    assert line(chart, "Full fine-tuning (2)") == ([1, 2], [2.0, 1.0])


def test_a_run_without_records_still_has_losses(tmp_path: Path) -> None:
    folder = as_folder(Run(records=()), tmp_path / "run")
    (folder / history.FILE).unlink()
    assert line(drawn([folder])[0][LOSS], "run")[0] == list(range(1, 51))
    assert list(drawn(folder)[0]) == [LOSS]


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
    assert "nothing to draw" in refusal([Run(history=(), records=())])
    assert "nothing to draw" in refusal(Run(records=(), history=()))
    assert "no validation_loss" in refusal(
        pd.DataFrame({"epoch": [1], "step": [1], "train_loss": [1.0]})
    )
    assert "expected the folder of a run" in refusal(tmp_path)
    (tmp_path / history.FILE).write_text("a,b\n")
    assert "not a history" in refusal({"x": tmp_path})


def test_neither_torch_nor_matplotlib_is_needed(tmp_path: Path) -> None:
    history.write(tmp_path / history.FILE, records(3))
    code = (
        "import sys\n"
        "from hyperlens.training import plot_history\n"
        f"plot_history({str(tmp_path)!r}).save({str(tmp_path / 'x.png')!r})\n"
        f"plot_history([{str(tmp_path)!r}]).save({str(tmp_path / 'y.png')!r})\n"
        "assert not {'matplotlib', 'torch'} & set(sys.modules)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
