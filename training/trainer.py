"""transformers' Trainer with a loss over every token and checkpoints of the trained weights."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Int
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from .. import processes
from ..errors import ResultsError, TrainingError, first_line
from .callbacks import Progress
from .folders import WorkingFolder
from .history import COLUMNS, Record
from .prefix import PrefixCache
from .recipes import Recipe
from .token_loss import TokenLoss
from .weights import WEIGHTS, load_trained_weights, save_trained_weights

# What loggers call the columns of a record; they know epoch, step and training loss anyway.
LOGGED = {
    name: "eval_loss" if name == "validation_loss" else f"eval_{name}"
    for name in COLUMNS
    if name not in ("epoch", "step", "train_loss")
}


# What the Trainer does not count among the labels.
IGNORED = -100


class Sequences(Dataset[dict[str, Tensor]]):
    """One item per sequence: its tokens, labels and index.

    The loss comes from `TokenLoss`; the Trainer only counts the labels, so the first token, which
    is never predicted, is marked as ignored, as are all that the loss is not on.
    """

    def __init__(
        self,
        tokens: Int[Tensor, "sequences pos"],
        counted: Bool[Tensor, "sequences pos"] | None = None,
    ) -> None:
        self.tokens = tokens
        self.counted = counted

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        labels = self.tokens[index].clone()
        labels[0] = IGNORED
        if self.counted is not None:
            labels[~self.counted[index]] = IGNORED
        return {"input_ids": self.tokens[index], "labels": labels, "index": torch.tensor(index)}


class TokenTrainer(Trainer):
    """A Trainer whose loss is the mean over all predicted tokens of an optimiser step.

    Its checkpoints hold the trained weights only: the frozen ones are those of the base.
    """

    model: Any
    train_dataset: Any
    progress: Progress
    working: WorkingFolder
    prefix: PrefixCache | None
    token_loss: TokenLoss

    def __init__(
        self,
        *,
        progress: Progress,
        working: WorkingFolder,
        prefix: PrefixCache | None,
        token_loss: TokenLoss,
        **arguments: Any,
    ) -> None:
        super().__init__(**arguments)
        self.progress, self.working = progress, working
        self.prefix, self.token_loss = prefix, token_loss
        # With this the Trainer passes the number of tokens of the whole step, over all of its
        # forward passes, to `compute_loss`, which divides by it. Dividing each forward pass by its
        # own would give the tokens of a smaller last batch more weight.
        self.model_accepts_loss_kwargs = True

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Cross-entropy of every next token, in nats, as a share of the step's mean."""
        tokens = inputs["input_ids"]
        counted = inputs["labels"] != IGNORED
        is_masked = self.train_dataset.counted is not None
        prefix = self.prefix.serving(inputs["index"]) if self.prefix else contextlib.nullcontext()
        with prefix, self.accelerator.autocast():
            loss = self.token_loss(model, tokens, counted if is_masked else None)
        n = int(counted.sum())
        total = float(loss.detach())
        if not math.isfinite(total):
            raise TrainingError(
                f"the loss became {total} at step {self.state.global_step + 1} of "
                f"{self.state.max_steps}: lower learning_rate (now {self.args.learning_rate:g}) "
                "or set max_grad_norm"
            )
        self.progress.add(total, n)
        # Gradients are averaged over processes, while the tokens are counted over all of them.
        scale = processes.count() / (n if num_items_in_batch is None else num_items_in_batch)
        return loss * scale

    def log_record(self, record: Record) -> None:
        """Pass a record to the loggers, as the Trainer passes its own evaluations."""
        # Logging cancels what the Trainer has planned to log, the epoch's loss.
        should_log = self.control.should_log
        self.log({key: float(getattr(record, name)) for name, key in LOGGED.items()})
        self.control.should_log = should_log

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the trained weights into a checkpoint."""
        if self.args.should_save:
            assert output_dir is not None  # noqa: S101 - only ever called for a checkpoint
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            save_trained_weights(self.model, Path(output_dir) / WEIGHTS)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.working.release()
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:
            raise ResultsError(
                f"cannot write a checkpoint at step {self.state.global_step} "
                f"({first_line(error)}): free some space"
            ) from error

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_trained_weights(self.model, Path(resume_from_checkpoint) / WEIGHTS)


def arguments(recipe: Recipe, device: torch.device, folder: Path, report_to: list[str]) -> Any:
    """The recipe as TrainingArguments; the Trainer writes only under `folder`.

    Raises:
        TrainingError: if the recipe asks for what this device cannot do.
    """
    schedule: str = recipe.schedule
    if schedule == "constant" and recipe.warmup_steps:
        schedule = "constant_with_warmup"
    try:
        result = TrainingArguments(
            output_dir=str(folder),
            num_train_epochs=recipe.epochs,
            per_device_train_batch_size=recipe.batch_size // processes.count(),
            gradient_accumulation_steps=recipe.gradient_accumulation,
            learning_rate=recipe.learning_rate,
            lr_scheduler_type=schedule,
            warmup_steps=recipe.warmup_steps,
            max_grad_norm=recipe.max_grad_norm,
            bf16=recipe.bf16,
            seed=recipe.seed,
            data_seed=recipe.seed,
            dataloader_drop_last=recipe.drop_last,
            dataloader_pin_memory=device.type == "cuda",
            use_cpu=device.type == "cpu",
            ddp_find_unused_parameters=False,
            remove_unused_columns=False,
            label_names=["labels"],
            logging_strategy="epoch" if report_to else "no",
            save_strategy="no",
            eval_strategy="no",
            report_to=report_to,
            disable_tqdm=True,
            # A NaN loss ends the run; it must not be left out of the logs.
            logging_nan_inf_filter=False,
        )
    except (ValueError, ImportError) as error:
        raise TrainingError(f"cannot train here: {first_line(error)}") from error
    if result.device.type != device.type or (device.index or 0) != (result.device.index or 0):
        raise TrainingError(
            f"training runs on {result.device}, got {device}: choose the device with "
            "CUDA_VISIBLE_DEVICES, or pass device='cpu'"
        )
    # With several GPUs the Trainer would use DataParallel, which changes the batch size.
    result._n_gpu = min(result.n_gpu, 1)
    return result
