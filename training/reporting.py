"""The figure of a run, sent at its end to the loggers that have its numbers from the Trainer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import Trainer, TrainerCallback

from .. import processes
from ..errors import first_line
from ..render import charts
from ..results.loggers import MODULES, add_images, log_images
from .callbacks import Progress
from .history import Course, history_of

# What the figure is called in a logger, as the file of its numbers.
FIGURE = "history"


class Figure(TrainerCallback):
    """Sends the figure of losses and records to the loggers when training ends.

    A logger that fails loses nothing: `notes` then says what happened.

    Args:
        progress: losses and records.
    """

    def __init__(self, progress: Progress) -> None:
        self.notes: list[str] = []
        self._progress = progress
        self._loggers: Sequence[str] = ()
        self._trainer: Any = None

    def join(self, trainer: Trainer) -> None:
        """Become the first callback: the loggers' own, when they hear of the end, close the run."""
        self._loggers = [name for name in trainer.args.report_to or () if name in MODULES]
        self._trainer = trainer
        trainer.callback_handler.callbacks.insert(0, self)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Draw and send; without records there is nothing but the losses, which they have."""
        if not self._loggers or not self._progress.records or not processes.is_first():
            return
        self._progress.stop_clock()
        with TemporaryDirectory() as folder:
            file = Path(folder) / f"{FIGURE}.png"
            for name in self._loggers:
                try:
                    if not file.exists():
                        file.write_bytes(_drawn(self._progress))
                    self._send(name, file.parent)
                except Exception as error:  # a library's own, of many kinds
                    message = f"{type(error).__name__}: {first_line(error)}"
                    self.notes.append(f"{name} did not take the figure ({message})")
        self._progress.start_clock()  # drawing is no training

    def _send(self, name: str, folder: Path) -> None:
        if name == "tensorboard":
            callbacks = self._trainer.callback_handler.callbacks
            writers = (getattr(callback, "tb_writer", None) for callback in callbacks)
            add_images(next(writer for writer in writers if writer is not None), folder)
        elif name == "wandb":
            log_images(import_module("wandb").run, folder)
        else:
            import_module("mlflow").log_artifacts(str(folder), artifact_path=FIGURE)


def _drawn(progress: Progress) -> bytes:
    records = [asdict(record) for record in progress.records]
    chart = charts.figure(history_of(Course("", list(enumerate(progress.losses, 1)), records)))
    assert chart is not None  # noqa: S101 - records have shares, which are always drawn
    return charts.png(chart)
