"""Checkpoints every few minutes, each one whole or not there at all."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from . import processes
from .progress import Progress
from .working import Working


def is_within_epoch(state: Any) -> bool:
    """Whether the step just made is not the last of its epoch."""
    return bool(state.global_step % (state.max_steps // state.num_train_epochs))


class Checkpoints(TrainerCallback):
    """Asks the Trainer for a checkpoint when enough time has passed, and puts it in its place.

    Comes after the callbacks whose work a checkpoint has to contain. The last step of an epoch is
    left to the epoch's end, when its loss and its record are in.

    Args:
        working: where checkpoints are kept.
        progress: what they keep besides the Trainer's own state.
        minutes: between two of them; 0 writes one after every step.
    """

    def __init__(self, working: Working, progress: Progress, minutes: float) -> None:
        self._working, self._progress, self._minutes = working, progress, minutes
        self._last = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Within an epoch."""
        if is_within_epoch(state):
            control.should_save = self._due()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Between epochs."""
        control.should_save = self._due() and not control.should_training_stop

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The Trainer has written its part."""
        processes.wait()
        total, n = processes.summed(self._progress.total, float(self._progress.n))
        if processes.is_first():
            written = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            saved = self._progress.to_json() | {"total": total, "n": int(n)}
            self._working.promote(written, saved)
        processes.wait()
        self._last = time.monotonic()

    def _due(self) -> bool:
        # One clock for all: processes that disagree would wait for each other forever.
        return bool(processes.from_first(time.monotonic() - self._last >= 60 * self._minutes))
