"""How far a run has come: the losses and records so far, and the bar that shows them."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback

from . import processes
from .history import Record


@dataclass
class Progress:
    """What a checkpoint keeps besides weights, optimiser and random numbers.

    Attributes:
        losses: mean loss of every finished epoch, nats per token.
        records: loss, ranks and quality every few epochs.
        total: summed loss of the unfinished epoch, nats.
        n: its tokens.
        seconds: time spent training, without recording.
    """

    losses: list[float] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)
    total: float = 0.0
    n: int = 0
    seconds: float = 0.0
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
        """Write down the epoch's mean loss over the tokens of all processes."""
        total, n = processes.summed(self.total, float(self.n))
        self.losses.append(total / n)
        self.total, self.n = 0.0, 0

    def start_clock(self) -> None:
        """Training goes on."""
        self._since = time.perf_counter()

    def stop_clock(self) -> None:
        """Something else is done meanwhile, or the time is read."""
        now = time.perf_counter()
        self.seconds += now - self._since
        self._since = now

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON values; floats survive exactly."""
        self.stop_clock()
        return {
            "losses": self.losses,
            "records": [record.to_json() for record in self.records],
            "total": self.total,
            "n": self.n,
            "seconds": self.seconds,
        }

    def restore(self, saved: dict[str, Any]) -> None:
        """Go on from what `to_json` returned."""
        self.losses = list(saved["losses"])
        self.records = [Record.from_json(record) for record in saved["records"]]
        self.total, self.n = saved["total"], saved["n"]
        self.seconds = saved["seconds"]


class EpochLosses(TrainerCallback):
    """Closes each epoch; comes before whatever reads the epoch's loss."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self._progress.start_clock()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the epoch."""
        self._progress.close_epoch()


class Bar(TrainerCallback):
    """One progress bar over all steps, with epoch, loss and remaining time."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the bar, where an interrupted run had left it."""
        self._bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc="hyperfit",
            unit="step",
            dynamic_ncols=True,
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Advance by an optimiser step."""
        epoch = math.ceil(state.epoch - 1e-9)
        text = f"epoch {epoch}/{state.num_train_epochs}, loss {self._progress.running:.4f}"
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.update(state.global_step - self._bar.n)

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()
