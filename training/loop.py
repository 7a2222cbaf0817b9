"""The training loop: transformers' Trainer, kept quiet, with a loss over every token."""

from __future__ import annotations

import math
import tempfile
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from ..errors import TrainingError
from .recipes import Recipe
from .weights import kept_forward


def train(
    model: nn.Module,
    tokens: Int[Tensor, "sequences pos"],
    recipe: Recipe,
    device: torch.device,
    progress: bool,
) -> tuple[float, ...]:
    """Train the weights that require gradients, in place.

    Args:
        model: plain model or PeftModel on `device`; left in evaluation mode.
        tokens: sequences of equal length, without padding.
        recipe: how to train.
        device: the device to train on.
        progress: show a bar with epoch, loss and remaining time.

    Returns:
        For each epoch, the mean loss over all its predicted tokens in nats, as they were seen:
        before the step that learned from them.

    Raises:
        TrainingError: if the loss or the weights become NaN or infinite.
    """
    history = History()
    callbacks: list[TrainerCallback] = [history]
    if progress:
        callbacks.append(Bar(history))
    with tempfile.TemporaryDirectory(prefix="hyperlens-") as folder:
        arguments = _arguments(recipe, device, folder)
        trainer = TokenTrainer(
            model=model,
            args=arguments,
            train_dataset=Sequences(tokens),
            callbacks=callbacks,
            # One group: PyTorch's own default decays every weight, norms and biases too.
            optimizers=(_optimizer(model, recipe), None),
        )
        trainer.history = history
        trainer.remove_callback(PrinterCallback)
        try:
            with kept_forward(model):
                trainer.train()
        except torch.OutOfMemoryError as error:
            raise TrainingError(
                f"out of memory on {device}: lower batch_size (now {recipe.batch_size}), set "
                "gradient_checkpointing=True, or train an adapter with 'late_lora'"
            ) from error
        finally:
            for callback in callbacks:
                if isinstance(callback, Bar):
                    callback.close()
            model.zero_grad(set_to_none=True)
            model.eval()
    if not all(bool(torch.isfinite(p).all()) for p in model.parameters() if p.requires_grad):
        raise TrainingError(
            f"a weight became NaN or infinite by step {trainer.state.global_step}, the last: "
            f"lower learning_rate (now {recipe.learning_rate:g})"
        )
    return tuple(history.losses)


class Sequences(Dataset[dict[str, Tensor]]):
    """Rows for the Trainer. The first token is never predicted, and so never counted."""

    def __init__(self, tokens: Int[Tensor, "sequences pos"]) -> None:
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        labels = self.tokens[index].clone()
        labels[0] = -100
        return {"input_ids": self.tokens[index], "labels": labels}


class TokenTrainer(Trainer):
    """A Trainer whose loss is the mean over all predicted tokens of an optimiser step."""

    history: History

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        # The Trainer then counts the tokens of the whole step, over all of its forward passes,
        # and leaves the division by them to us.
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
        logits = model(input_ids=tokens, use_cache=False).logits
        # Float32: in bfloat16 the loss itself would stop moving long before zero.
        summed = functional.cross_entropy(
            logits[:, :-1].float().flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum"
        )
        n = tokens.shape[0] * (tokens.shape[1] - 1)
        total = float(summed.detach())
        if not math.isfinite(total):
            raise TrainingError(
                f"the loss became {total} at step {self.state.global_step + 1} of "
                f"{self.state.max_steps}: lower learning_rate (now {self.args.learning_rate:g}) "
                "or set max_grad_norm"
            )
        self.history.add(total, n)
        return summed / (n if num_items_in_batch is None else num_items_in_batch)


class History(TrainerCallback):
    """Mean loss per epoch, over tokens."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self._total = 0.0
        self._n = 0

    def add(self, total: float, n: int) -> None:
        """Count a forward pass: summed loss in nats, and over how many tokens."""
        self._total += total
        self._n += n

    @property
    def running(self) -> float:
        """Mean loss of the epoch so far."""
        return self._total / self._n if self._n else math.nan

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the epoch."""
        self.losses.append(self.running)
        self._total, self._n = 0.0, 0


class Bar(TrainerCallback):
    """One progress bar over all steps, with epoch, loss and remaining time."""

    def __init__(self, history: History) -> None:
        self._history = history
        self._bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the bar."""
        self._bar = tqdm(total=state.max_steps, desc="hyperfit", unit="step", dynamic_ncols=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Advance by an optimiser step."""
        self._bar.set_postfix_str(self._text(state), refresh=False)
        self._bar.update(state.global_step - self._bar.n)

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()

    def _text(self, state: Any) -> str:
        epoch = math.ceil(state.epoch - 1e-9)
        return f"epoch {epoch}/{state.num_train_epochs}, loss {self._history.running:.4f}"


def _optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)


def _arguments(recipe: Recipe, device: torch.device, folder: str) -> TrainingArguments:
    schedule: str = recipe.schedule
    if schedule == "constant" and recipe.warmup_steps:
        schedule = "constant_with_warmup"
    try:
        arguments = TrainingArguments(
            output_dir=folder,
            num_train_epochs=recipe.epochs,
            per_device_train_batch_size=recipe.batch_size,
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
            remove_unused_columns=False,
            label_names=["labels"],
            logging_strategy="no",
            save_strategy="no",
            eval_strategy="no",
            report_to=[],
            disable_tqdm=True,
            # A NaN loss is an error here, not something to filter out of a log.
            logging_nan_inf_filter=False,
        )
    except ValueError as error:
        raise TrainingError(f"cannot train here: {str(error).splitlines()[0]}") from error
    if arguments.device.type != device.type or (device.index or 0) != (arguments.device.index or 0):
        raise TrainingError(
            f"training runs on {arguments.device}, got {device}: choose the device with "
            "CUDA_VISIBLE_DEVICES, or pass device='cpu'"
        )
    # More than one would turn on DataParallel, which changes the batch size.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments
