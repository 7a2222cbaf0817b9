"""Ctrl-C ends a run after the step it is in, with a checkpoint; a second one ends it at once."""

from __future__ import annotations

import signal
import sys
from types import FrameType, TracebackType
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback

from . import processes
from .checkpoints import is_within_epoch


class Interrupts(TrainerCallback):
    """While entered, the first Ctrl-C is noted and acted upon between steps.

    Comes after the callback that puts checkpoints in their place. Does nothing outside the main
    thread, where signals do not arrive, where somebody else handles them, and with several
    processes, whose launcher does.
    """

    def __init__(self) -> None:
        self.asked = False
        self._handles = False

    def __enter__(self) -> None:
        if processes.count() == 1 and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            try:
                signal.signal(signal.SIGINT, self._note)
                self._handles = True
            except ValueError:  # not the main thread
                pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._handles:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask for a checkpoint; the last step of an epoch gets it at the epoch's end."""
        if self.asked and is_within_epoch(state):
            control.should_save = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask for a checkpoint, now that the epoch's loss and record are in."""
        if self.asked and not control.should_training_stop:  # else the run is done anyway
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The checkpoint is in its place: nothing will be lost."""
        if self.asked:
            raise KeyboardInterrupt

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        tqdm.write("stopping after this step; Ctrl-C again stops at once", file=sys.stderr)
