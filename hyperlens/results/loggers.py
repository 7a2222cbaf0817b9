"""Loggers of training runs, by their own packages: TensorBoard, Weights & Biases, MLflow."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from ..errors import ResultsError, first_line
from .result import unknown

# Where transformers' Trainer looks, too.
TENSORBOARD_FOLDER = "TENSORBOARD_LOGGING_DIR"
WANDB_PROJECT = "WANDB_PROJECT"
# Logger to the modules of its package; the extra of hyperlens is called like the logger.
MODULES = {
    "tensorboard": ("tensorboard", "torch.utils.tensorboard"),
    "wandb": ("wandb",),
    "mlflow": ("mlflow",),
}


def check_loggers(report_to: str | Sequence[str]) -> list[str]:
    """The names, once each, of loggers that can be used here.

    Raises:
        ResultsError: if one is unknown or its package is not installed.
    """
    names = [report_to] if isinstance(report_to, str) else list(dict.fromkeys(report_to))
    for name in names:
        if name not in MODULES:
            raise ResultsError(unknown("logger", name, list(MODULES)))
        for module in MODULES[name]:
            try:
                import_module(module)
            except ImportError as error:
                raise ResultsError(
                    f"report_to={name!r} needs the package {name} ({first_line(error)}): "
                    f"pip install 'hyperlens[{name}]'"
                ) from None
    return names


def add_images(writer: Any, folder: Path) -> None:
    """Show the PNG files of a folder in TensorBoard.

    Args:
        writer: a `SummaryWriter` of torch.
        folder: what is no PNG file is left out; an image is called as its file.
    """
    import numpy as np
    from PIL import Image

    for file in sorted(folder.glob("*.png")):
        with Image.open(file) as image:
            pixels = np.asarray(image.convert("RGB"))
        writer.add_image(file.stem, pixels, dataformats="HWC")


def log_images(run: Any, folder: Path) -> None:
    """Show the PNG files of a folder in a run of Weights & Biases."""
    wandb: Any = import_module("wandb")
    run.log({file.stem: wandb.Image(str(file)) for file in sorted(folder.glob("*.png"))})
