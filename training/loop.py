"""Put a training run together: the Trainer, what is recorded, and what is kept on disk."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PrinterCallback, TrainerCallback

from ..errors import TrainingError, first_line
from . import processes
from .checkpoints import Checkpoints
from .interrupts import Interrupts
from .prefix import PrefixCache
from .progress import Bar, EpochLosses, Progress
from .recipes import Recipe
from .record import Recorder
from .recording import Pruning, Recording
from .token_loss import TokenLoss
from .trainer import Sequences, TokenTrainer, arguments, load_weights
from .weights import kept_forward
from .working import PROGRESS, Working


@dataclass(frozen=True)
class Manner:
    """How a run is carried out; none of it changes a bit of the result.

    Attributes:
        checkpoint_minutes: between two checkpoints.
        report_to: loggers of the Trainer ("tensorboard", "wandb", ...).
        progress: show a bar with epoch, loss and remaining time.
    """

    checkpoint_minutes: float
    report_to: tuple[str, ...]
    progress: bool


class Ending(NamedTuple):
    """How a run ended.

    Attributes:
        reason: in words.
        kept_epoch: the epoch whose weights the model has now.
    """

    reason: str
    kept_epoch: int


def train(
    model: nn.Module,
    tokens: Int[Tensor, "sequences pos"],
    recipe: Recipe,
    device: torch.device,
    working: Working,
    manner: Manner,
    recorder: Recorder | None = None,
    prefix: PrefixCache | None = None,
) -> tuple[Progress, Ending]:
    """Train the weights that require gradients, in place, from the checkpoint if there is one.

    Args:
        model: plain model or PeftModel on `device`; left in evaluation mode.
        tokens: sequences of equal length, without padding.
        recipe: how to train.
        device: the device to train on.
        working: where checkpoints and records are kept.
        manner: how the run is carried out.
        recorder: measures loss, ranks and quality; None for no records.
        prefix: serves the frozen blocks; None runs them every time.

    Returns:
        Losses, records and seconds; and how it ended.

    Raises:
        TrainingError: if the loss or the weights become NaN or infinite.
        ResultsError: if a checkpoint cannot be written.
    """
    progress = Progress()
    made = arguments(recipe, device, working.scratch, list(manner.report_to))
    recording = Recording(recorder, recipe, progress, working) if recorder else None
    bar = Bar(progress) if manner.progress and processes.is_first() else None
    saving = Checkpoints(working, progress, manner.checkpoint_minutes) if working.keeps else None
    interrupts = Interrupts() if working.keeps else None
    # In this order at the end of an epoch: its loss, its record, the checkpoint of both, and then
    # what that one makes superfluous.
    parts: Sequence[TrainerCallback | None] = (
        EpochLosses(progress),
        recording,
        saving,
        Pruning(recording) if recording and saving else None,
        interrupts,
        bar,
    )
    callbacks = [part for part in parts if part is not None]
    trainer = _trainer(model, tokens, recipe, made, progress, prefix, callbacks)
    checkpoint = working.checkpoint if working.keeps else None
    if checkpoint is not None:
        progress.restore(json.loads((checkpoint / PROGRESS).read_text(encoding="utf-8")))
        _take_over(progress)
    try:
        with kept_forward(model), interrupts or contextlib.nullcontext():
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            f"out of memory on {device}: lower batch_size (now {recipe.batch_size}), set "
            "gradient_checkpointing=True, or train an adapter with 'late_lora'"
        ) from error
    finally:
        if bar is not None:
            bar.close()
        model.zero_grad(set_to_none=True)
        model.eval()
    progress.stop_clock()
    if not all(bool(torch.isfinite(p).all()) for p in model.parameters() if p.requires_grad):
        raise TrainingError(
            f"a weight became NaN or infinite by step {trainer.state.global_step}, the last: "
            f"lower learning_rate (now {recipe.learning_rate:g})"
        )
    return progress, _ending(model, recipe, recording, working, len(progress.losses))


def _trainer(
    model: nn.Module,
    tokens: Int[Tensor, "sequences pos"],
    recipe: Recipe,
    made: Any,
    progress: Progress,
    prefix: PrefixCache | None,
    callbacks: list[TrainerCallback],
) -> TokenTrainer:
    trained = [p for p in model.parameters() if p.requires_grad]
    # One group: PyTorch's own default decays every weight, norms and biases too.
    optimizer = torch.optim.AdamW(
        trained, lr=recipe.learning_rate, weight_decay=recipe.weight_decay
    )
    try:
        trainer = TokenTrainer(
            progress=progress,
            prefix=prefix,
            token_loss=TokenLoss(model),
            model=model,
            args=made,
            train_dataset=Sequences(tokens),
            callbacks=callbacks,
            optimizers=(optimizer, None),
        )
    except (ValueError, ImportError, RuntimeError) as error:
        raise TrainingError(f"cannot train here: {first_line(error)}") from error
    trainer.remove_callback(PrinterCallback)
    return trainer


def _take_over(progress: Progress) -> None:
    """Of several processes only the first goes on with the sums of all of them."""
    if not processes.is_first():
        progress.total, progress.n = 0.0, 0


def _ending(
    model: nn.Module, recipe: Recipe, recording: Recording | None, working: Working, last: int
) -> Ending:
    """Put the best weights back where that was asked for."""
    if recording is None or not recipe.stop_at_plateau:
        return Ending(f"all {recipe.epochs} epochs were run", last)
    best, reason = recording.best_epoch, recording.decision.reason
    if best is None:
        return Ending(reason, last)
    load_weights(model, working.best(best))
    return Ending(f"{reason}; the weights are those of epoch {best}", best)
