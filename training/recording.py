"""Records during training: every few epochs, to a table as they come, and when to stop."""

from __future__ import annotations

import os
from typing import Any

from torch import nn
from transformers import TrainerCallback

from . import history, processes
from .progress import Progress
from .recipes import Recipe
from .record import Recorder
from .stopping import Decision, decide
from .trainer import save_weights
from .working import Working


class Recording(TrainerCallback):
    """Measures the model every `record_every` epochs and after the last one.

    Args:
        recorder: measures the model that is trained.
        recipe: how often, and whether to stop at a plateau.
        progress: where records go; they come after the epoch's loss.
        working: where the table and the best weights are kept.
    """

    def __init__(
        self, recorder: Recorder, recipe: Recipe, progress: Progress, working: Working
    ) -> None:
        self._recorder, self._recipe = recorder, recipe
        self._progress, self._working = progress, working

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Record the base, or take up the table where the checkpoint has it."""
        if not self._progress.records:
            self._measure(0, 0, float("nan"))
        elif processes.is_first():
            history.write(self._working.history, self._progress.records)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Record, keep the weights if they are the best, stop if nothing grows any more."""
        epoch = len(self._progress.losses)
        if epoch % self._recipe.record_every and epoch < state.num_train_epochs:
            return
        self._measure(epoch, state.global_step, self._progress.losses[-1])
        if self._recipe.stop_at_plateau:
            decision = self.decision
            if self.best_epoch == epoch and processes.is_first():
                _keep(kwargs["model"], self._working, epoch)
            control.should_training_stop |= decision.stop  # the Trainer may have asked, too

    def prune(self) -> None:
        """Drop the weights that are no longer the best."""
        if self._recipe.stop_at_plateau and processes.is_first():
            self._working.keep_only_best(self.best_epoch)

    @property
    def decision(self) -> Decision:
        """What the records so far say about stopping."""
        return decide(self._progress.records, self._recipe.near_zero_loss, self._recipe.patience)

    @property
    def best_epoch(self) -> int | None:
        """The epoch whose weights are to be kept, None if none has come near zero loss."""
        best = self.decision.best
        return None if best is None else self._progress.records[best].epoch

    def _measure(self, epoch: int, step: int, loss: float) -> None:
        self._progress.stop_clock()
        record = self._recorder.measure(epoch, step, loss, self._progress.seconds)
        # All processes measure the same weights, and go by what the first one read.
        self._progress.records.append(processes.from_first(record))
        if processes.is_first():
            history.write(self._working.history, self._progress.records)
        self._progress.start_clock()


class Pruning(TrainerCallback):
    """Drops weights that were the best once; comes after the callback that promotes checkpoints.

    Until a checkpoint that knows better ones is in its place, the one before it needs them.
    """

    def __init__(self, recording: Recording) -> None:
        self._recording = recording

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A checkpoint is in place."""
        self._recording.prune()


def _keep(model: nn.Module, working: Working, epoch: int) -> None:
    file = working.best(epoch)
    unfinished = file.with_suffix(".unfinished")
    save_weights(model, unfinished)
    os.replace(unfinished, file)
