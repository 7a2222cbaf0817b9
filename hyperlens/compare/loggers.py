"""A comparison in a logger of training runs: TensorBoard, Weights & Biases, MLflow.

Each number of the table is a scalar whose step is the layer; figures, table and page go along.
"""

from __future__ import annotations

import math
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ..checks import check_types
from ..errors import ResultsError, first_line
from ..files import expand_user
from ..render.labels import label_of
from ..results.loggers import (
    TENSORBOARD_FOLDER,
    WANDB_PROJECT,
    add_images,
    check_loggers,
    log_images,
)
from .comparison import Comparison


@check_types
def report_comparison(comparison: Comparison, report_to: str | Sequence[str]) -> None:
    """Send a comparison to loggers: scalars by layer, figures, the page and all saved files.

    A run of Weights & Biases or MLflow that is active in this process gets them, such as that of
    a training; otherwise one is made and ended. TensorBoard's files are written into the folder
    TENSORBOARD_LOGGING_DIR, or "runs", below the models' names. What is no number is left out.

    Args:
        comparison: of two models.
        report_to: "tensorboard", "wandb" and "mlflow", one or several.

    Raises:
        ResultsError: if a logger is unknown, its package is not installed, or it fails.
    """
    names = check_loggers(report_to)
    with TemporaryDirectory() as folder:
        saved = comparison.save(Path(folder) / comparison.name, figures=True) if names else None
        for name in names:
            try:
                SENDERS[name](comparison, saved)
            except Exception as error:  # a library's own, of many kinds
                message = f"{type(error).__name__}: {first_line(error)}"
                raise ResultsError(f"{name} did not take the comparison ({message})") from error


def scalars(comparison: Comparison) -> Iterator[tuple[str, int, float]]:
    """Key, layer and number; the ends of an interval have keys of their own.

    >>> from hyperlens.results.rows import Row
    >>> row = Row("drift", "cosine", 2, "raw", 0.5, 0.4, math.nan, 99)
    >>> list(scalars(Comparison.of([row], {}, {})))
    [('drift/cosine/raw', 2, 0.5), ('drift/cosine/raw/low', 2, 0.4)]
    """
    for row in comparison.long:
        key = f"{row.probe}/{row.metric}/{row.view}"
        numbers = {key: row.value, f"{key}/low": row.low, f"{key}/high": row.high}
        yield from ((k, row.layer, float(x)) for k, x in numbers.items() if math.isfinite(x))


def _settings(comparison: Comparison) -> dict[str, Any]:
    """What a run is found by."""
    meta = comparison.meta
    models = {side: meta.get(side, {}).get("name", side) for side in ("base", "tuned")}
    return {**models, **meta.get("options", {}), "seed": meta.get("seed")}


def _to_tensorboard(comparison: Comparison, folder: Path) -> None:
    tensorboard: Any = import_module("torch.utils.tensorboard")
    runs = expand_user(os.environ.get(TENSORBOARD_FOLDER) or "runs")
    name = re.sub(r"[^\w.-]+", "-", label_of(comparison)).strip("-.") or comparison.name
    with tensorboard.SummaryWriter(str(runs / name)) as writer:
        for key, layer, number in scalars(comparison):
            writer.add_scalar(key, number, layer)
        writer.add_text(comparison.name, comparison.to_markdown())
        add_images(writer, folder)
    # There are no artefacts: the page lies beside the events.
    (runs / name / "report.html").write_bytes((folder / "report.html").read_bytes())


def _to_wandb(comparison: Comparison, folder: Path) -> None:
    wandb: Any = import_module("wandb")
    run = wandb.run
    is_ours = run is None
    if is_ours:
        run = wandb.init(
            project=os.environ.get(WANDB_PROJECT) or "hyperlens",
            name=label_of(comparison),
            job_type=comparison.name,
            config=_settings(comparison),
        )
    try:
        by_layer: dict[int, dict[str, float]] = defaultdict(dict)
        for key, layer, number in scalars(comparison):
            by_layer[layer][key] = number
        run.define_metric("layer")
        for probe in dict.fromkeys(row.probe for row in comparison.long):
            run.define_metric(f"{probe}/*", step_metric="layer")
        for layer in sorted(by_layer):
            run.log({"layer": layer, **by_layer[layer]})
        log_images(run, folder)
        artefact = wandb.Artifact(f"{comparison.name}-{run.id}", type=comparison.name)
        artefact.add_dir(str(folder))
        run.log_artifact(artefact)
    finally:
        if is_ours:
            run.finish()


def _to_mlflow(comparison: Comparison, folder: Path) -> None:
    mlflow: Any = import_module("mlflow")
    is_ours = mlflow.active_run() is None
    if is_ours:
        mlflow.start_run(run_name=label_of(comparison))
        mlflow.log_params(_settings(comparison))
    try:
        for key, layer, number in scalars(comparison):
            mlflow.log_metric(key, number, step=layer)
        mlflow.log_artifacts(str(folder), artifact_path=comparison.name)
    finally:
        if is_ours:
            mlflow.end_run()


SENDERS: dict[str, Callable[[Comparison, Any], None]] = {
    "tensorboard": _to_tensorboard,
    "wandb": _to_wandb,
    "mlflow": _to_mlflow,
}
