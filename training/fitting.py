"""From an opened model to trained weights: choose what is trained, build the Trainer, run it."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int
from safetensors import SafetensorError
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PrinterCallback, TrainerCallback

from .. import processes
from ..errors import ResourceError, ResultsError, TrainingError, first_line
from ..models.sources import OpenedModel
from ..results.fingerprint import versions
from . import pissa
from .adapters import (
    BlockList,
    find_block_list,
    notes_on_unadapted,
    projections,
    train_only,
    trained_blocks,
    with_adapter,
)
from .callbacks import (
    Begun,
    Checkpoints,
    EpochLosses,
    Interrupts,
    Keeping,
    Progress,
    Pruning,
    Recording,
    Starting,
    progress_display,
)
from .data import TrainingData
from .folders import PROGRESS, WorkingFolder, is_ended
from .memory import forget_peak, peak_memory
from .prefix import PrefixCache, SharedPrefixes, is_exact, plan
from .recipes import Recipe
from .record import Recorder
from .reporting import Figure
from .starting import Start
from .token_loss import TokenLoss
from .trainer import Sequences, TokenTrainer, arguments
from .weights import (
    WEIGHTS,
    gradient_checkpointing,
    load_trained_weights,
    restored_forward,
    restored_use_cache,
    save_trained_weights,
    training_mode,
    without_dropout,
)

# Room for what a checkpoint holds besides weights, in bytes: of its own, and of each weight.
ROOM, ROOM_PER_WEIGHT = 2**16, 2**11
# Devices on which AdamW has a fused step.
FUSED = ("cpu", "cuda")
# Up to this share of the trained weights may be too coarse for a step of the learning rate.
LARGEST_STUCK_SHARE = 0.5


@dataclass(frozen=True)
class RunOptions:
    """How a run is carried out. The result is bit-identical whatever they are, callbacks aside.

    Attributes:
        checkpoint_minutes: between two checkpoints.
        report_to: loggers of the Trainer ("tensorboard", "wandb", ...).
        progress: show a bar or lines with epoch, loss and remaining time.
        prefix_cache: compute what the frozen first blocks return only once per sequence.
        callbacks: of the Trainer, the caller's own.
        shared: what runs on one base and the same sequences hand on to each other.
    """

    checkpoint_minutes: float
    report_to: tuple[str, ...]
    progress: bool
    prefix_cache: bool
    callbacks: tuple[Any, ...]
    shared: SharedPrefixes | None = None


@dataclass(frozen=True)
class Fitted:
    """A trained model and what happened on the way.

    Attributes:
        model: plain model or PeftModel.
        progress: losses and records.
        scope: trained blocks and parameters, prefix cache, seconds, ending; JSON values.
        notes: what a reader of the result should know.
    """

    model: Any
    progress: Progress
    scope: dict[str, Any]
    notes: tuple[str, ...]


class Ending(NamedTuple):
    """How a run ended.

    Attributes:
        reason: in words.
        kept_epoch: the epoch whose weights the model has now.
    """

    reason: str
    kept_epoch: int


def fit(
    model: Any,
    opened: OpenedModel,
    data: TrainingData,
    recipe: Recipe,
    device: torch.device,
    working: WorkingFolder,
    options: RunOptions,
    base_sha256: str,
    start: Start | None = None,
) -> Fitted:
    """Train `model` in place, or an adapter on it.

    Args:
        model: a private copy of the base.
        opened: where it came from.
        data: what to train and measure on.
        recipe: how to train.
        device: the device to train on.
        working: where checkpoints and records are kept.
        options: how the run is carried out.
        base_sha256: of the base's weights.
        start: an adapter to go on from.

    Raises:
        TrainingError: if the recipe does not fit the model, or the loss becomes NaN or infinite.
        ResourceError: if the prefix cache does not fit.
        ResultsError: if a checkpoint cannot be written.
    """
    block_list = find_block_list(model)
    blocks = trained_blocks(len(block_list.blocks), recipe)
    scope: dict[str, Any] = {"n_blocks": len(block_list.blocks), "trained_blocks": list(blocks)}
    notes: list[str] = []
    with restored_use_cache(model), without_dropout(model):
        trained = _make_trainable(model, opened, block_list, blocks, recipe, scope, notes)
        if start is not None:
            start.check(trained)
        _check_steps_are_not_rounded_away(trained, recipe)
        if working.can_resume and working.checkpoint is None and processes.is_first():
            working.reserve(_bytes_to_save(trained, recipe))
        with gradient_checkpointing(model, recipe.gradient_checkpointing):
            prefix = None
            if options.prefix_cache and _prefix_is_frozen(trained, block_list, blocks[0]):
                prefix = _prefix_cache(
                    *(trained, data, recipe, blocks[0], working, notes, options.shared)
                )
            recorder = None
            if len(data.held_out) and recipe.record_every:
                frozen = blocks[0] if prefix else 0
                last = options.shared.held_out if options.shared else None
                recorder = Recorder(
                    *(trained, data.held_out, recipe, frozen, last),
                    *(data.held_out_counted, data.held_out_lengths),
                )
            scope["prefix_cache"] = str(prefix.plan) if prefix else None
            if options.progress and processes.is_first():
                _announce(scope, (*data.notes, *notes))
            identity = {"base": base_sha256, "texts": data.manifest["sha256"], "first": blocks[0]}
            forget_peak(device)
            try:
                progress, ending = train(
                    *(trained, data.tokens, recipe, device, working, options),
                    *(recorder, prefix, identity, notes, start, data.counted),
                    opened.tokenizer,
                )
            finally:
                if prefix is not None:
                    prefix.close()
            scope["peak_memory"] = peak_memory(device)
        if recipe.method != "full":
            pissa.join(trained)
    scope["seconds"] = round(progress.seconds, 3)
    scope["recording_seconds"] = round(progress.recording_seconds, 3)
    scope |= {"ending": ending.reason, "kept_epoch": ending.kept_epoch}
    return Fitted(trained, progress, scope, tuple(notes))


def _make_trainable(
    model: Any,
    opened: OpenedModel,
    block_list: BlockList,
    blocks: tuple[int, ...],
    recipe: Recipe,
    scope: dict[str, Any],
    notes: list[str],
) -> Any:
    """The model with exactly the weights of the method requiring gradients."""
    trained = model
    if recipe.method != "full":
        targets = projections(block_list, recipe)
        # An object made in memory has no name by which its base could be found again.
        has_name = opened.kind != "object" or bool(getattr(model.config, "_name_or_path", ""))
        name = opened.name if has_name else None
        trained = with_adapter(model, name, block_list, blocks, targets, recipe)
        config = trained.peft_config["default"]
        scope["target_modules"] = list(targets)
        if config.target_parameters is not None:  # PEFT took some names to mean experts
            scope["target_modules"] = [name for name in targets if name in config.target_modules]
            scope["target_parameters"] = sorted(config.target_parameters)
        adapted = [block_list.blocks[i] for i in blocks]
        notes += notes_on_unadapted(adapted, targets, recipe.target_modules is None)
    elif recipe.blocks is not None:
        train_only(model, block_list, blocks)
    else:
        for parameter in model.parameters():
            parameter.requires_grad_(True)
    sizes = [(p.numel(), p.requires_grad) for p in trained.parameters()]
    scope["trained_parameters"] = sum(n for n, requires_grad in sizes if requires_grad)
    scope["parameters"] = sum(n for n, _ in sizes)
    return trained


def _check_steps_are_not_rounded_away(model: nn.Module, recipe: Recipe) -> None:
    """Check that most weights can change by a step of Adam, which is about the learning rate.

    A number with a spacing of 2 ** (k - 7) to the next, as bfloat16's from 2 ** k on, only changes
    if at least half of that is added.

    Raises:
        TrainingError: if most of the trained weights would stay as they are.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    stuck = 0
    for p in trained:
        # From this power of two on, half of the spacing is more than a step.
        steps = 2 * recipe.learning_rate / torch.finfo(p.dtype).eps
        bound = 2.0 ** (math.floor(math.log2(steps)) + 1)
        stuck += int((p.detach().abs() >= bound).sum())
    share = stuck / sum(p.numel() for p in trained)
    if share > LARGEST_STUCK_SHARE:
        dtype = str(trained[0].dtype).removeprefix("torch.")
        if trained[0].dtype == torch.float32:
            raise TrainingError(
                f"a step of learning_rate {recipe.learning_rate:g} is too small to change "
                f"{share:.0%} of the float32 weights: raise learning_rate"
            )
        raise TrainingError(
            f"{share:.0%} of the {dtype} weights are too coarse to change by a step of "
            f"learning_rate {recipe.learning_rate:g}: leave dtype out, for float32 weights "
            "(bf16=True makes them fast, too), or raise learning_rate"
        )


def _bytes_to_save(model: nn.Module, recipe: Recipe) -> int:
    """What a first checkpoint takes, or the last one beside the result, whichever is more.

    And all those that are kept, which the result shares.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    saved = trained if recipe.method != "full" else list(model.parameters())
    weights, result = (sum(p.numel() * p.element_size() for p in ps) for ps in (trained, saved))
    n_kept = math.ceil(recipe.epochs / recipe.keep_every) if recipe.keep_every else 0
    whole = max(3 * weights, weights + result) + n_kept * result
    return whole + (1 + n_kept) * (ROOM + ROOM_PER_WEIGHT * len(saved))


def _prefix_is_frozen(model: nn.Module, block_list: BlockList, first: int) -> bool:
    """Whether there are blocks before the first trained one, and nothing before it is trained."""
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    before = [embedding, *block_list.blocks[:first]]
    return first > 0 and not any(p.requires_grad for part in before for p in part.parameters())


def _prefix_cache(
    model: nn.Module,
    data: TrainingData,
    recipe: Recipe,
    first: int,
    working: WorkingFolder,
    notes: list[str],
    shared: SharedPrefixes | None,
) -> PrefixCache | None:
    """An empty cache that was checked to leave the logits unchanged, or None."""
    embedding = model.get_input_embeddings().weight  # type: ignore[operator]
    shape = (*data.tokens.shape, embedding.shape[1])
    folder, keep = _cache_folder(working)
    place = plan(shape, embedding.dtype, folder, keep=keep)
    cache = PrefixCache(model, first, place, shared.training if shared else None)
    tokens = data.tokens[: _rows(recipe)]
    if is_exact(model, cache, tokens.to(embedding.device)):
        return cache
    notes.append(
        "the frozen blocks of this architecture pass on more than the residual stream, or draw "
        "random numbers: the prefix cache was not used"
    )
    return None


def _cache_folder(working: WorkingFolder) -> tuple[Path, bool]:
    """Where all processes of this machine find a file, and whether a resumed run would, too."""
    # Other machines than the first may not see its folder.
    is_here = working.folder.is_dir()
    folder = working.folder if is_here else Path(tempfile.gettempdir())
    place: tuple[Path, bool] = processes.from_first_here((folder, is_here and working.can_resume))
    return place


def _rows(recipe: Recipe) -> int:
    """Sequences per forward pass in this process."""
    return recipe.batch_size // processes.count()


def _fill(
    prefix: PrefixCache,
    trainer: TokenTrainer,
    tokens: Int[Tensor, "sequences pos"],
    recipe: Recipe,
    identity: dict[str, Any],
) -> None:
    """Compute what the frozen blocks return, as training would."""
    identity = identity | {"bf16": recipe.bf16, "device": trainer.args.device.type}
    with training_mode(trainer.model), trainer.accelerator.autocast():
        prefix.fill(trainer.model, tokens, _rows(recipe), identity | {"versions": versions()})


def _announce(scope: dict[str, Any], notes: Sequence[str]) -> None:
    """What will be trained, and what its user may want to change before it takes its time."""
    blocks = ", ".join(map(str, scope["trained_blocks"]))
    tqdm.write(f"training blocks {blocks} (0-based) of {scope['n_blocks']}", file=sys.stderr)
    if scope["prefix_cache"]:
        tqdm.write(f"prefix cache: {scope['prefix_cache']}", file=sys.stderr)
    for note in notes:
        tqdm.write(f"note: {note}", file=sys.stderr)


def train(
    model: nn.Module,
    tokens: Int[Tensor, "sequences pos"],
    recipe: Recipe,
    device: torch.device,
    working: WorkingFolder,
    options: RunOptions,
    recorder: Recorder | None,
    prefix: PrefixCache | None,
    identity: dict[str, Any],
    notes: list[str],
    start: Start | None = None,
    counted: Bool[Tensor, "sequences pos"] | None = None,
    tokenizer: Any = None,
) -> tuple[Progress, Ending]:
    """Train the weights that require gradients, in place, from the checkpoint if there is one.

    Args:
        model: plain model or PeftModel on `device`; left in evaluation mode.
        tokens: sequences of equal length; padding, if any, at their ends.
        recipe: how to train.
        device: the device to train on.
        working: where checkpoints and records are kept.
        options: how the run is carried out.
        recorder: measures loss, ranks and quality; None for no records.
        prefix: replaces the frozen blocks; None runs them every time.
        identity: the base, the texts and the first trained block, for the file of `prefix`.
        notes: what a reader of the result should know is added to them.
        start: an adapter whose weights are put in place once the base has been recorded.
        counted: which tokens the loss is on; None for all.
        tokenizer: saved with the checkpoints that are kept, unless None.

    Returns:
        Losses, records and seconds; and how it ended.

    Raises:
        TrainingError: if the loss or the weights become NaN or infinite.
        ResultsError: if a checkpoint cannot be written.
    """
    progress = Progress()
    trainer_arguments = arguments(recipe, device, working.scratch, list(options.report_to))
    recording = Recording(recorder, recipe, progress, working) if recorder else None
    display = progress_display(progress) if options.progress and processes.is_first() else None
    checkpoints = interrupts = None
    if working.can_resume:
        interrupts = Interrupts()
        checkpoints = Checkpoints(working, progress, options.checkpoint_minutes, interrupts)
    begun = Begun()
    every = recipe.keep_every
    keeping = Keeping(model, tokenizer, every, progress, working) if every else None
    # The order matters: see `callbacks`.
    parts: Sequence[TrainerCallback | None] = (
        EpochLosses(progress),
        recording,
        Starting(start) if start else None,
        keeping,
        checkpoints,
        Pruning(recording) if recording and checkpoints else None,
        interrupts,
        display,
        begun,
    )
    callbacks = [*(part for part in parts if part is not None), *options.callbacks]
    sequences = Sequences(tokens, counted)
    trainer = _trainer(
        model, sequences, recipe, trainer_arguments, progress, working, prefix, callbacks
    )
    figure = Figure(progress)
    if recording is not None and options.report_to:
        recording.log = trainer.log_record
        figure.join(trainer)
    checkpoint = working.checkpoint if working.can_resume else None
    try:
        if checkpoint is not None:
            saved = json.loads((checkpoint / PROGRESS).read_text(encoding="utf-8"))
            progress.restore(saved)
            if is_ended(checkpoint):
                load_trained_weights(model, checkpoint / WEIGHTS)
                model.eval()
                return progress, Ending(**saved["ending"])
        if prefix is not None:
            progress.start_clock()
            _fill(prefix, trainer, tokens, recipe, identity)
            progress.stop_clock()
        with restored_forward(model), interrupts or contextlib.nullcontext():
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            f"out of memory on {device}: lower batch_size (now {recipe.batch_size}), set "
            "gradient_checkpointing=True, or train an adapter with 'late_lora'"
        ) from error
    except ResourceError:  # there is no room for the prefix cache
        raise
    except Exception as error:
        if checkpoint is None or begun.has_begun:
            raise
        raise TrainingError(
            f"the checkpoint {checkpoint} is damaged ({type(error).__name__}: "
            f"{first_line(error)}): remove {working.folder}, and the run starts anew"
        ) from error
    finally:
        if display is not None:
            display.close()
        model.zero_grad(set_to_none=True)
        model.eval()
    progress.stop_clock()
    notes += figure.notes
    if not all(bool(torch.isfinite(p).all()) for p in model.parameters() if p.requires_grad):
        raise TrainingError(
            f"a weight became NaN or infinite by step {trainer.state.global_step}, the last: "
            f"lower learning_rate (now {recipe.learning_rate:g})"
        )
    ending = _end(model, recipe, recording, working, len(progress.losses))
    if working.can_resume and processes.is_first():
        _keep(model, progress, ending, working)
    return progress, ending


def _keep(model: nn.Module, progress: Progress, ending: Ending, working: WorkingFolder) -> None:
    """Make the trained weights the last checkpoint, so that saving them can be tried again."""
    working.release()
    written = working.scratch / "checkpoint-ended"
    try:
        written.mkdir(parents=True)
        save_trained_weights(model, written / WEIGHTS)
        working.set_checkpoint(written, progress.to_json() | {"ending": ending._asdict()})
    except (OSError, SafetensorError, ResultsError):
        # The result may still fit, and otherwise the checkpoint before this one is there.
        shutil.rmtree(written, ignore_errors=True)


def _trainer(
    model: nn.Module,
    sequences: Sequences,
    recipe: Recipe,
    trainer_arguments: Any,
    progress: Progress,
    working: WorkingFolder,
    prefix: PrefixCache | None,
    callbacks: list[Any],
) -> TokenTrainer:
    trained = [p for p in model.parameters() if p.requires_grad]
    # One parameter group: as in PyTorch's default, decay applies to every weight, norms and biases
    # included, which the Trainer's own optimiser would leave out. Fused, a step of float32 weights
    # is the same to the last digit or two and several times faster; narrower ones round otherwise.
    fused = all(p.dtype == torch.float32 and p.device.type in FUSED for p in trained)
    optimizer = torch.optim.AdamW(
        trained, lr=recipe.learning_rate, weight_decay=recipe.weight_decay, fused=fused or None
    )
    try:
        trainer = TokenTrainer(
            progress=progress,
            working=working,
            prefix=prefix,
            token_loss=TokenLoss(model),
            model=model,
            args=trainer_arguments,
            train_dataset=sequences,
            callbacks=callbacks,
            optimizers=(optimizer, None),
        )
    except (ValueError, ImportError, RuntimeError) as error:
        raise TrainingError(f"cannot train here: {first_line(error)}") from error
    trainer.remove_callback(PrinterCallback)
    return trainer


def _end(
    model: nn.Module,
    recipe: Recipe,
    recording: Recording | None,
    working: WorkingFolder,
    last_epoch: int,
) -> Ending:
    """Put the best weights back, if the recipe stops at a plateau, and say how the run ended."""
    if recording is None or not recipe.stop_at_plateau:
        if last_epoch < recipe.epochs:
            return Ending(f"a callback ended it in epoch {last_epoch}", last_epoch)
        return Ending(f"all {recipe.epochs} epochs were run", last_epoch)
    best, reason = recording.best_epoch, recording.decision.reason
    if best is None:
        return Ending(reason, last_epoch)
    load_trained_weights(model, working.best(best))
    return Ending(f"{reason}; the weights are those of epoch {best}", best)
