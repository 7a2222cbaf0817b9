"""A comparison in loggers: every number by layer, figures and page, and what goes wrong."""

import math
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from conftest import ROOT, make_tiny, perturbed
from test_cli import failed
from test_results import make_comparison

from hyperlens import Comparison, compare_models
from hyperlens.compare.loggers import SENDERS, report_comparison, scalars
from hyperlens.errors import ResultsError
from hyperlens.results.loggers import MODULES
from hyperlens.results.rows import Row

WHOLE = make_comparison(2)
# Few numbers and one figure: drawing takes most of the time.
MADE = Comparison.of((row for row in WHOLE.long if row.probe == "drift"), {}, WHOLE.meta)
FILES = {"comparison.json", "comparison.png", "comparison.svg", "layers.csv"} | {
    *("report.html", "summary.txt")
}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("TENSORBOARD_LOGGING_DIR", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)


def expected() -> dict[tuple[str, int], float]:
    return {(key, layer): number for key, layer, number in scalars(MADE)}


def test_every_number_is_a_scalar_at_its_layer() -> None:
    found = {(key, layer): number for key, layer, number in scalars(WHOLE)}
    for row in WHOLE.long:
        key = f"{row.probe}/{row.metric}/{row.view}"
        assert found.pop((key, row.layer)) == row.value
        for end in ("low", "high"):
            number = getattr(row, end)
            assert found.pop((f"{key}/{end}", row.layer), math.nan) == pytest.approx(
                number, nan_ok=True
            )
    assert found == {}
    rows = [Row("a", "b", 1, "raw", x, x, x, 9) for x in (math.nan, math.inf, -math.inf)]
    assert list(scalars(Comparison.of(rows, {}, {}))) == []


def test_loggers_have_an_extra_each() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert MODULES.keys() == SENDERS.keys() <= extras["optional-dependencies"].keys()


# Weights & Biases


class Run:
    """Takes what a run of Weights & Biases takes."""

    def __init__(self, **about: Any) -> None:
        self.about, self.id, self.finished = about, "abc", False
        self.steps: dict[str, str | None] = {}
        self.logged: list[dict[str, Any]] = []
        self.artefacts: list[Any] = []

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.steps[name] = step_metric

    def log(self, numbers: dict[str, Any]) -> None:
        self.logged.append(numbers)

    def log_artifact(self, artefact: Any) -> None:
        self.artefacts.append(artefact)

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A stand-in for the module; `runs` are those that it made."""
    fake: Any = ModuleType("wandb")
    fake.run, fake.runs = None, []

    def init(**about: Any) -> Run:
        fake.runs.append(Run(**about))
        return fake.runs[-1]

    class Artifact:
        def __init__(self, name: str, type: str) -> None:
            self.name, self.type = name, type

        def add_dir(self, folder: str) -> None:
            self.files = {path.name for path in Path(folder).iterdir()}

    fake.init, fake.Artifact = init, Artifact
    fake.Image = lambda path: Path(path).read_bytes()[:4]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_a_run_of_wandb(wandb: Any) -> None:
    report_comparison(MADE, "wandb")
    (run,) = wandb.runs
    assert run.about["project"] == "hyperlens"
    assert run.about["name"] == "base → tuned"
    assert run.about["config"]["sink_threshold"] == 10.0
    assert run.finished
    *layers, figures = run.logged
    assert [numbers.pop("layer") for numbers in layers] == [0, 1, 2]
    found = {(k, layer): x for layer, numbers in enumerate(layers) for k, x in numbers.items()}
    assert found == expected()
    assert figures == {"comparison": b"\x89PNG"}
    assert run.steps["layer"] is None
    assert {key.split("/")[0] for key, _ in found} == {
        name.removesuffix("/*") for name, step in run.steps.items() if step == "layer"
    }
    (artefact,) = run.artefacts
    assert artefact.files == FILES


def test_an_active_run_is_used_and_left_open(wandb: Any) -> None:
    wandb.run = Run()
    report_comparison(MADE, ["wandb"])
    assert wandb.runs == []
    assert wandb.run.artefacts
    assert not wandb.run.finished


# MLflow


@pytest.fixture
def mlflow(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A stand-in for the module that keeps what it is told."""
    fake: Any = ModuleType("mlflow")
    fake.active, fake.metrics, fake.files, fake.said = None, {}, set(), []
    fake.active_run = lambda: fake.active
    fake.start_run = lambda run_name: fake.said.append(run_name)
    fake.end_run = lambda: fake.said.append("end")
    fake.log_params = lambda params: fake.said.append(params["tuned"])
    fake.log_metric = lambda key, value, step: fake.metrics.update({(key, step): value})
    fake.log_artifacts = lambda folder, artifact_path: fake.files.update(
        (artifact_path, path.name) for path in Path(folder).iterdir()
    )
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    return fake


def test_a_run_of_mlflow(mlflow: Any) -> None:
    report_comparison(MADE, "mlflow")
    assert mlflow.metrics == expected()
    assert mlflow.files == {("comparison", name) for name in FILES}
    assert mlflow.said == ["base → tuned", "tuned", "end"]


def test_an_active_run_of_mlflow_is_used_and_left_open(mlflow: Any) -> None:
    mlflow.active = object()
    report_comparison(MADE, "mlflow")
    assert mlflow.metrics == expected()
    assert mlflow.said == []


# TensorBoard


def test_tensorboard_with_a_stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    scalars_seen: dict[tuple[str, int], float] = {}
    images, texts = {}, {}

    class SummaryWriter:
        def __init__(self, folder: str) -> None:
            Path(folder).mkdir(parents=True)

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def add_scalar(self, key: str, number: float, step: int) -> None:
            scalars_seen[key, step] = number

        def add_text(self, key: str, text: str) -> None:
            texts[key] = text

        def add_image(self, key: str, pixels: Any, dataformats: str) -> None:
            images[key] = (pixels.ndim, pixels.shape[-1], dataformats)

    fake = SimpleNamespace(SummaryWriter=SummaryWriter)
    monkeypatch.setitem(sys.modules, "tensorboard", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    tuned = {**MADE.meta["tuned"], "name": "a/b c"}
    report_comparison(replace(MADE, meta={**MADE.meta, "tuned": tuned}), "tensorboard")
    assert scalars_seen == expected()
    assert images == {"comparison": (3, 3, "HWC")}
    assert "base → a/b c." in texts["comparison"]
    assert (tmp_path / "logs" / "base-a-b-c" / "report.html").exists()


def test_tensorboard_itself() -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    report_comparison(MADE, "tensorboard")
    (run,) = Path("runs").iterdir()
    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    tags = events.Tags()
    found = {(k, e.step): e.value for k in tags["scalars"] for e in events.Scalars(k)}
    assert found == pytest.approx(expected(), rel=1e-6)
    assert tags["images"] == ["comparison"]


# what goes wrong


def test_unknown_and_missing_loggers_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ResultsError, match=r"no logger 'wanbd': .* did you mean 'wandb'"):
        report_comparison(MADE, ["wanbd"])
    monkeypatch.setitem(sys.modules, "mlflow", None)
    message = r"needs the package mlflow .*: pip install 'hyperlens\[mlflow\]'"
    with pytest.raises(ResultsError, match=message):
        report_comparison(MADE, "mlflow")


def test_a_missing_package_is_told_before_a_model_is_opened(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    monkeypatch.setattr("hyperlens.pair.open_pair", None)
    Path("texts.txt").write_text("w3 w4 w5")
    argv = ("compare", "base", "tuned", "--texts", "texts.txt", "--report-to", "mlflow")
    failed(capsys, 1, argv, "error: --report-to mlflow needs the package mlflow")


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any]:
    """Opened before modules are replaced, at which transformers looks when it is imported."""
    base = make_tiny("llama", num_hidden_layers=1)
    pair = base, perturbed(base)
    compare_models(*pair, [[1, 5, 6, 7]], probes=["drift"], progress=False)
    return pair


def test_what_was_measured_is_not_lost_where_a_logger_fails(
    models: tuple[Any, Any], mlflow: Any, wandb: Any
) -> None:
    def refused(**_: object) -> None:
        raise ConnectionError("no network\nTraceback")

    wandb.init = refused
    options = {"probes": ["drift"], "progress": False}
    found = compare_models(*models, [[1, 5, 6, 7]], report_to=["wandb", "mlflow"], **options)
    assert found.notes[-1] == "wandb did not take the comparison (ConnectionError: no network)"
    assert mlflow.metrics == {(k, layer): x for k, layer, x in scalars(found)}
    with pytest.raises(ResultsError, match="did not take the comparison"):
        report_comparison(found, "wandb")
