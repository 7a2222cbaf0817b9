"""What happens between the steps of training: losses, records, checkpoints, signals, progress.

Each task is a callback of transformers' Trainer. Their order matters at the end of an epoch: its
loss first, then its record, then the checkpoint that holds both, then whatever that checkpoint
makes superfluous.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from torch import nn
from tqdm.auto import tqdm
from transformers import TrainerCallback

from .. import processes
from ..errors import ResultsError
from ..models.weight_sharing import weight_sharing_copy
from . import history
from .folders import WorkingFolder
from .history import Record
from .recipes import Recipe
from .record import Recorder
from .starting import Start
from .stopping import Decision, decide
from .weights import save_trained_weights, set_use_cache, use_cache_of

# Seconds between two lines of progress where stderr is not a terminal.
SECONDS_PER_LINE = 30.0


@dataclass
class Progress:
    """What a checkpoint stores besides weights, optimiser and random numbers.

    Attributes:
        losses: mean loss of every finished epoch, nats per token.
        records: loss, ranks and quality every few epochs.
        total: summed loss of the unfinished epoch, nats.
        n: its tokens.
        seconds: time spent training, without recording.
        recording_seconds: time spent recording.
    """

    losses: list[float] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)
    total: float = 0.0
    n: int = 0
    seconds: float = 0.0
    recording_seconds: float = 0.0
    _since: float = field(default_factory=time.perf_counter)

    def add(self, total: float, n: int) -> None:
        """Count a forward pass: summed loss in nats, and over how many tokens."""
        self.total += total
        self.n += n

    @property
    def running(self) -> float:
        """Mean loss of the epoch so far."""
        return self.total / self.n if self.n else math.nan

    def close_epoch(self) -> None:
        """Append the epoch's mean loss over the tokens of all processes."""
        total, n = processes.summed(self.total, float(self.n))
        self.losses.append(total / n)
        self.total, self.n = 0.0, 0

    def start_clock(self) -> None:
        """Count the time from now on."""
        self._since = time.perf_counter()

    def stop_clock(self) -> None:
        """Add the time since the clock was started, or last stopped."""
        now = time.perf_counter()
        self.seconds += now - self._since
        self._since = now

    def recorded(self) -> None:
        """Count the time since the clock was stopped as recording, and start it again."""
        stopped = self._since
        self.start_clock()
        self.recording_seconds += self._since - stopped

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON values; floats survive exactly."""
        self.stop_clock()
        return {
            "losses": self.losses,
            "records": [record.to_json() for record in self.records],
            "total": self.total,
            "n": self.n,
            "seconds": self.seconds,
            "recording_seconds": self.recording_seconds,
        }

    def restore(self, saved: dict[str, Any]) -> None:
        """Continue from what `to_json` returned."""
        self.losses = list(saved["losses"])
        self.records = [Record.from_json(record) for record in saved["records"]]
        # The saved sums are those of all processes: one of them takes them over, so that they
        # are not counted several times when the epoch is closed.
        if processes.is_first():
            self.total, self.n = saved["total"], saved["n"]
        self.seconds = saved["seconds"]
        # Version 0.1 did not count it.
        self.recording_seconds = saved.get("recording_seconds", 0.0)


class Begun(TrainerCallback):
    """Whether a step was begun: what fails before comes of the checkpoint that is resumed from."""

    has_begun = False

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A batch is about to be read."""
        self.has_begun = True


class EpochLosses(TrainerCallback):
    """Closes each epoch; comes before whatever reads the epoch's loss."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._progress.start_clock()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._progress.close_epoch()


# Records


class Recording(TrainerCallback):
    """Measures the model every `record_every` epochs and after the last one.

    Args:
        recorder: measures the model that is trained.
        recipe: how often, and whether to stop at a plateau.
        progress: where records go; they come after the epoch's loss.
        working: folder for the table and the best weights.
    """

    def __init__(
        self, recorder: Recorder, recipe: Recipe, progress: Progress, working: WorkingFolder
    ) -> None:
        self._recorder, self._recipe = recorder, recipe
        self._progress, self._working = progress, working
        # Passes each new record to the loggers, if there are any.
        self.log: Callable[[Record], None] | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Record the base; in a resumed run, write the checkpoint's records as a table again."""
        self._progress.recording_seconds += self._recorder.seconds
        if not self._progress.records:
            self._measure(0, 0, float("nan"))
        else:
            self._write_table()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Record; save the weights if they are the best so far; stop at a plateau."""
        epoch = len(self._progress.losses)
        if epoch % self._recipe.record_every and epoch < state.num_train_epochs:
            return
        self._measure(epoch, state.global_step, self._progress.losses[-1])
        if self._recipe.stop_at_plateau:
            decision = self.decision
            if self.best_epoch == epoch and processes.is_first():
                _save_best(kwargs["model"], self._working, epoch)
            # Another callback may have asked to stop, too.
            control.should_training_stop |= decision.stop

    def prune(self) -> None:
        """Delete the weights that are no longer the best."""
        if self._recipe.stop_at_plateau and processes.is_first():
            self._working.delete_best_except(self.best_epoch)

    @property
    def decision(self) -> Decision:
        """What the records so far say about stopping."""
        return decide(self._progress.records, self._recipe.near_zero_loss, self._recipe.patience)

    @property
    def best_epoch(self) -> int | None:
        """The epoch with the best weights, None if none has come near zero loss."""
        best = self.decision.best
        return None if best is None else self._progress.records[best].epoch

    def _measure(self, epoch: int, step: int, loss: float) -> None:
        self._progress.stop_clock()
        record = self._recorder.measure(epoch, step, loss, self._progress.seconds)
        # All processes measure the same weights; they share the first one's numbers, which decide
        # when to stop.
        self._progress.records.append(processes.from_first(record))
        self._write_table()
        if self.log is not None:
            self.log(self._progress.records[-1])
        self._progress.recorded()

    def _write_table(self) -> None:
        # A full disk must not end the run for it: the table is written again with the result.
        if processes.is_first():
            with suppress(ResultsError):
                history.write(self._working.history, self._progress.records)


class Starting(TrainerCallback):
    """Puts the weights of an adapter in place before the first step, after the base's record.

    Args:
        start: the adapter that the run goes on from.
    """

    def __init__(self, start: Start) -> None:
        self._start = start

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A resumed run has the weights of its checkpoint."""
        if state.global_step == 0:
            self._start.put_into(kwargs["model"])


class Pruning(TrainerCallback):
    """Deletes weights that used to be the best; comes after the callback that makes checkpoints.

    A run resumed from the previous checkpoint needs the weights that were best then. So they stay
    until the next checkpoint, which knows better ones, is in place.
    """

    def __init__(self, recording: Recording) -> None:
        self._recording = recording

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._recording.prune()


def _save_best(model: nn.Module, working: WorkingFolder, epoch: int) -> None:
    file = working.best(epoch)
    unfinished = file.with_suffix(".unfinished")
    save_trained_weights(model, unfinished)
    os.replace(unfinished, file)


# Checkpoints and signals


class Keeping(TrainerCallback):
    """Keeps the model as it is every few epochs, and at the end; comes before `Checkpoints`.

    Args:
        model: the model that is trained, as it is before the Trainer has it.
        tokenizer: saved beside it, unless None.
        every: epochs between two of them.
        progress: knows how many epochs are done.
        working: where they are kept.
    """

    def __init__(
        self, model: Any, tokenizer: Any, every: int, progress: Progress, working: WorkingFolder
    ) -> None:
        self._model, self._tokenizer, self._every = model, tokenizer, every
        self._progress, self._working = progress, working
        self._use_cache = use_cache_of(model)
        self._step = -1

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep the model after every so many epochs."""
        if len(self._progress.losses) % self._every == 0:
            self._keep(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep the last one, too."""
        if state.global_step != self._step:
            self._keep(state.global_step)

    def _keep(self, step: int) -> None:
        self._step = step
        if processes.is_first():
            # A copy around the same weights: the Trainer's changes to the model are not saved, and
            # saving, which joins PiSSA's adapters, does not change what is trained.
            copied = weight_sharing_copy(self._model)
            set_use_cache(copied, self._use_cache)
            self._working.keep(copied, self._tokenizer, step, len(self._progress.losses))


class Interrupts(TrainerCallback):
    """While entered, Ctrl-C or SIGTERM ends the run after the current step, with a checkpoint.

    SIGTERM is what a cluster sends some time before it takes the machine away; the run then exits
    with one line that says how to go on. A second Ctrl-C ends the run at once. Comes after the
    callback that puts checkpoints into place.

    Does nothing outside the main thread, where Python cannot handle signals, and leaves alone a
    signal for which another handler is installed. With several processes, whose launcher handles
    Ctrl-C and passes it on as SIGTERM, only that is handled.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        # What all processes have agreed on.
        self.ending: int | None = None
        self._defaults: dict[int, Any] = {signal.SIGTERM: signal.SIG_DFL}
        if processes.count() == 1:
            self._defaults[signal.SIGINT] = signal.default_int_handler
        self._installed: list[int] = []

    def __enter__(self) -> None:
        for number, default in self._defaults.items():
            if signal.getsignal(number) is default:
                try:
                    signal.signal(number, self._note)
                except ValueError:  # not the main thread
                    return
                self._installed.append(number)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number in self._installed:
            signal.signal(number, self._defaults[number])

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End the run: the checkpoint is in place and nothing is lost."""
        if self.ending == signal.SIGINT:
            raise KeyboardInterrupt
        if self.ending is not None:
            if processes.is_first():
                _write_line(
                    f"ended by SIGTERM after step {state.global_step}/{state.max_steps}: the same "
                    "command continues from there"
                )
            # As the shell would report a process that the signal has killed.
            raise SystemExit(128 + self.ending)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received is not None:
            raise KeyboardInterrupt
        if number == signal.SIGINT:
            text = "stopping after this step; Ctrl-C again stops at once"
            tqdm.write(text, file=sys.stderr)
        self.received = self.received or number


def is_within_epoch(state: Any) -> bool:
    """Whether the latest step is not the last of its epoch."""
    return bool(state.global_step % (state.max_steps // state.num_train_epochs))


class Checkpoints(TrainerCallback):
    """Asks the Trainer for a checkpoint when it is time or a signal came, and moves it into place.

    Comes after the callbacks whose work a checkpoint has to contain. After the last step of an
    epoch it waits for the epoch's end, when its loss and its record are in.

    Args:
        working: where checkpoints go.
        progress: what they store besides the Trainer's own state.
        minutes: between two of them; 0 writes one after every step.
        interrupts: knows whether the run is to end.
    """

    def __init__(
        self, working: WorkingFolder, progress: Progress, minutes: float, interrupts: Interrupts
    ) -> None:
        self._working, self._progress, self._minutes = working, progress, minutes
        self._interrupts = interrupts
        self._last = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if is_within_epoch(state):
            control.should_save = self._is_due()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Where the run is over anyway, its weights are kept soon.
        control.should_save = self._is_due() and not control.should_training_stop

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add our progress to what the Trainer has written, and make it the checkpoint."""
        processes.wait()
        total, n = processes.summed(self._progress.total, float(self._progress.n))
        if processes.is_first():
            written = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            saved = self._progress.to_json() | {"total": total, "n": int(n)}
            self._working.set_checkpoint(written, saved)
        processes.wait()
        self._last = time.monotonic()

    def _is_due(self) -> bool:
        # The first process's clock and signals decide for all: if they disagreed, those that save
        # would wait forever for those that do not.
        is_time = time.monotonic() - self._last >= 60 * self._minutes
        is_time, self._interrupts.ending = processes.from_first(
            (is_time, self._interrupts.received)
        )
        return is_time or self._interrupts.ending is not None


# Progress on stderr


class ProgressDisplay(TrainerCallback):
    """Shows each record once, and how far the run is; comes after the callback that records."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._n_shown = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Show the base's record, or where a resumed run continues."""
        if state.global_step:
            self._n_shown = len(self._progress.records)
            self.write(f"continuing after step {state.global_step}/{state.max_steps}")
        self._show_records(state)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._show_records(state)

    def write(self, text: str) -> None:
        """Write a line."""
        _write_line(text)

    def close(self) -> None:
        """Leave everything as it stands."""

    def _show_records(self, state: Any) -> None:
        for record in self._progress.records[self._n_shown :]:
            whose = "" if record.epoch else "the base, "
            self.write(
                f"epoch {record.epoch}/{state.num_train_epochs}, {whose}held-out text: "
                f"TTR {record.ttr:.3f}, validation loss {record.validation_loss:.4f} (perplexity "
                f"{record.perplexity:,.1f}), top-1 token as the base's {record.rank_1:.1%}"
            )
        self._n_shown = len(self._progress.records)


class ProgressBar(ProgressDisplay):
    """One progress bar over all steps, with epoch, loss and remaining time; records above it."""

    _bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the bar; a resumed run starts where the interrupted one was."""
        self._bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc="hyperfit",
            unit="step",
            dynamic_ncols=True,
        )
        super().on_train_begin(args, state, control, **kwargs)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        text = f"epoch {_epoch(state)}/{state.num_train_epochs}, loss {self._progress.running:.4f}"
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.update(state.global_step - self._bar.n)

    def write(self, text: str) -> None:
        """Write a line above the bar."""
        self._bar.write(f"hyperfit: {text}", file=sys.stderr)

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()


class ProgressLines(ProgressDisplay):
    """Plain lines at each epoch and record, and every half minute, for logs and the like."""

    _started_at = (0, 0.0)
    _last = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        self._last = time.monotonic()
        self._started_at = (state.global_step, self._last)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Show how far the run is within a long epoch."""
        if is_within_epoch(state) and time.monotonic() - self._last >= SECONDS_PER_LINE:
            self._show_step(state, self._progress.running)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._show_step(state, self._progress.losses[-1])
        super().on_epoch_end(args, state, control, **kwargs)

    def _show_step(self, state: Any, loss: float) -> None:
        self._last = time.monotonic()
        step, since = self._started_at
        per_step = (self._last - since) / max(1, state.global_step - step)
        left = per_step * (state.max_steps - state.global_step)
        self.write(
            f"epoch {_epoch(state)}/{state.num_train_epochs}, step {state.global_step}/"
            f"{state.max_steps}, loss {loss:.4f}, about {_duration(left)} left"
        )


def progress_display(progress: Progress) -> ProgressDisplay:
    """A bar on a terminal and in a notebook, plain lines elsewhere."""
    # Jupyter's stderr is not a terminal, but can redraw a bar.
    in_notebook = type(sys.stderr).__module__.startswith("ipykernel")
    return ProgressBar(progress) if sys.stderr.isatty() or in_notebook else ProgressLines(progress)


def _write_line(text: str) -> None:
    tqdm.write(f"hyperfit: {text}", file=sys.stderr)
    sys.stderr.flush()


def _epoch(state: Any) -> int:
    """The epoch that is under way, from 1."""
    epoch: float = state.epoch
    return math.ceil(epoch - 1e-9)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
