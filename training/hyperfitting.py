"""hyperfit: fine-tune a copy of a model to near-zero loss on a small set of texts."""

from __future__ import annotations

import html
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .. import processes
from ..checks import check_types
from ..errors import TrainingError
from ..hooks.loading import load_hooked, parse_device, parse_dtype
from ..models.kinds import Backend, is_peft, plain_model
from ..models.sources import OpenedModel, open_source
from ..models.training_steps import CHECKPOINTS
from ..offloading import check_can_be_fetched, check_is_here
from ..results.fingerprint import versions, weights_sha256
from . import history
from .data import TrainingData, training_data
from .folders import check_out, save, working_folder
from .recipes import HELP, Method, Recipe, changed, nearest, recipe_of
from .starting import Start, without_start
from .weights import context_length, private_copy, trainers_randomness
from .written import check_written

if TYPE_CHECKING:
    from .fitting import RunOptions
    from .history import Record


@dataclass(frozen=True, repr=False)
class HyperfitRun:
    """A trained model and how it was made; `print(run.summary())` says how it went.

    Attributes:
        model: the trained `PreTrainedModel`, or `PeftModel` for LoRA, in evaluation mode.
        tokenizer: the base model's tokenizer, None if there is none.
        recipe: what was done.
        history: mean training loss of each epoch, in nats per token; each batch is measured before
            the step on it.
        records: loss, ranks and quality every few epochs, starting with the base (epoch 0).
        manifest: the base, the trained blocks (0-based) and parameters, the data, the prefix
            cache, the time taken, why it ended; JSON values.
        folder: where it was saved, None if it was not.
    """

    model: Any
    tokenizer: Any
    recipe: Recipe
    history: tuple[float, ...]
    records: tuple[Record, ...]
    manifest: dict[str, Any]
    folder: Path | None

    def summary(self) -> str:
        """A few lines: what was trained, loss, quality beside the base's, notes and folder."""
        about = self.manifest
        blocks = ", ".join(map(str, about["trained_blocks"]))
        lines = [
            *(f"note: {note}" for note in about["notes"]),
            f"{self.recipe.method} on blocks {blocks} (0-based) of {about['n_blocks']}, "
            f"{about['trained_parameters']:,} weights, {_duration(about)}: {about['ending']}",
            f"mean loss {self.history[0]:.3f} in the first epoch, {self.history[-1]:.3f} in the "
            "last",
            *_quality(self.records, about["kept_epoch"]),
            *([] if self.folder is None else [f"weights in {self.folder}"]),
            *self._kept(),
        ]
        return "\n".join(lines)

    def _kept(self) -> list[str]:
        if self.folder is None or not self.recipe.keep_every:
            return []
        return [f"checkpoints in {self.folder / CHECKPOINTS}"]

    def __repr__(self) -> str:
        where = "not saved" if self.folder is None else f"saved in {str(self.folder)!r}"
        return (
            f"HyperfitRun({self.recipe.method}, {len(self.history)} epochs, "
            f"loss {self.history[0]:.3f} -> {self.history[-1]:.3f}, {where})"
        )

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(self.summary())}</pre>"


@check_types
def hyperfit(
    model: Any,
    texts: Any,
    method: Method | None = None,
    *,
    recipe: str | Path | Recipe | None = None,
    validation: Any = None,
    out: str | Path | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    prefix_cache: bool = True,
    checkpoint_minutes: float = 10.0,
    report_to: str | Sequence[str] = (),
    callbacks: Sequence[Any] = (),
    progress: bool = True,
    **overrides: Any,
) -> HyperfitRun:
    """Fine-tune a causal LM until it knows a small set of texts by heart ("hyperfitting").

    As in Carlsson et al. 2025 and arXiv 2605.22579: few sequences, many epochs, the loss on every
    token of a text, all dropout of the model off. On a CPU the same seed gives bit-identical
    weights.

    With `out`, the run keeps checkpoints in `<out>.partial`. If it is killed at any moment, the
    same call continues from the last one and ends with the same weights. SIGTERM ends it with a
    checkpoint and `SystemExit`.

    Args:
        model: hub id, local folder, adapter folder, `PreTrainedModel`, `PeftModel`, or a pair
            (model, tokenizer). An object is copied, never changed. "full" merges an adapter first;
            "lora" and "late_lora" go on from its weights, with a fresh optimiser, if the recipe
            makes one of the same shape: that of its own run does (`recipe=` its folder), save with
            `lora_init` "pissa", which saves a plain adapter of twice `lora_r` and another
            `lora_alpha`.
        texts: anything `read_texts` takes, a list of token id sequences, or a source with
            conversations in a column `messages`, or with columns `prompt` and `completion`. Of
            these the loss is on what the assistant says and on completions only, unless `loss_on`
            is "all".
        method: "full" for all weights, "lora" for an adapter on all blocks, "late_lora" for one
            on the last `last_k` blocks; None takes the recipe's, "full" in the presets.
        recipe: name of a preset, a `Recipe`, or the folder of a run (or its hyperfit.json) for that
            run's; None for "li2026".
        validation: held-out texts for the record; None takes those that follow the training
            sequences.
        out: a new folder for weights or adapter, tokenizer, history.csv and hyperfit.json; with
            `keep_every` also for checkpoints, each a model folder or an adapter folder.
        device: None leaves an object where it is and puts folders on the best device.
        dtype: of the weights; None is float32 for "full", as small steps vanish in bfloat16, and
            the checkpoint's own for LoRA, whose adapter is float32 either way. float16 is for
            LoRA only.
        prefix_cache: where the first blocks are frozen, compute their output only once per
            sequence; the result is bit-identical, save for rounding in mixtures of experts.
        checkpoint_minutes: between two checkpoints; 0 for one after every step.
        report_to: loggers of transformers' Trainer, such as "tensorboard" or "wandb".
            TensorBoard's files are saved in `out` as "runs", or where TENSORBOARD_LOGGING_DIR says.
        callbacks: objects or classes of transformers' `TrainerCallback`, called after hyperfit's
            own. A resumed run does not ask whether they are the same.
        progress: show a progress bar and each record on a terminal or in a notebook, and
            elsewhere a line on stderr for each epoch and each record.
        overrides: other values for fields of `Recipe`, such as `epochs=20`.

    Returns:
        The trained model with its recipe, losses, records and manifest.

    Raises:
        TrainingError: if the recipe, the model or the texts do not fit together, an override has
            no effect with the method, the loss becomes NaN or infinite, or another process or an
            unfinished run with other options is in the way.
        LoadingError: if the model cannot be opened.
        CorpusError: if the texts cannot be read.
        ResourceError: if the prefix cache fits neither in memory nor on the disk, or the disk has
            no room for a checkpoint and the result.
        ResultsError: if `out` is not a new folder, or cannot be written.

    Example::

        run = hyperfit("base", "tales.txt", "late_lora", last_k=5)
        print(run.summary())
    """
    final_recipe = chosen_recipe(recipe, method, overrides)
    check_can_keep(final_recipe, out)
    _check_callbacks(callbacks)
    folder = None if out is None else Path(out).expanduser()
    if folder is not None:
        check_out(folder)
    prepared = prepare(model, texts, final_recipe, validation, device=device, dtype=dtype)
    # Imports transformers' Trainer, which takes seconds: after everything that may be refused.
    from .fitting import RunOptions

    loggers = (report_to,) if isinstance(report_to, str) else tuple(report_to)
    options = RunOptions(checkpoint_minutes, loggers, progress, prefix_cache, tuple(callbacks))
    return train_and_save(prepared, final_recipe, folder, options)


class Prepared(NamedTuple):
    """A model that has been opened, and the texts for it.

    Attributes:
        trainee: a copy of the model to train.
        opened: where it came from.
        data: what to train and measure on.
        manifest: base, data, device, dtype and notes, as JSON values.
        start: the adapter to go on from; None for a fresh one, or none.
    """

    trainee: Any
    opened: OpenedModel
    data: TrainingData
    manifest: dict[str, Any]
    start: Start | None


def prepare(
    model: Any,
    texts: Any,
    recipe: Recipe,
    validation: Any,
    *,
    device: str | torch.device | None,
    dtype: str | torch.dtype | None,
) -> Prepared:
    """Open a model and read the texts for it."""
    _check_whole_models()
    requested_device = processes.default_device(parse_device(device))
    opened = _open(model, recipe, requested_device, dtype)
    start = None
    if is_peft(opened.model) and recipe.method != "full":
        opened, start = without_start(opened)
    trainee = private_copy(opened, recipe)
    # Opening may have made another copy, cast or moved: do not hold it while training.
    opened = replace(opened, model=None)
    data = _data(trainee, texts, validation, opened.tokenizer, recipe)
    train_device = trainee.get_input_embeddings().weight.device
    processes.join(train_device)
    manifest: dict[str, Any] = {
        "base": {"name": opened.name, "kind": opened.kind, "sha256": weights_sha256(trainee)},
        "method": recipe.method,
        "data": data.manifest,
        "device": train_device.type,
        "dtype": str(next(trainee.parameters()).dtype).removeprefix("torch."),
        "notes": [*opened.notes, *data.notes],
    }
    if start is not None:
        manifest["start"] = start.to_json()
    return Prepared(trainee, opened, data, manifest, start)


def train_and_save(
    prepared: Prepared,
    recipe: Recipe,
    folder: Path | None,
    options: RunOptions,
    measure: Callable[[Any], dict[str, Any]] = lambda model: {},
) -> HyperfitRun:
    """Train what `hyperfit` has opened and read, and save it.

    Args:
        prepared: its model is only this run's; frozen weights may be another model's, too.
        recipe: how to train.
        folder: a new one for the result; None saves nothing.
        options: how the run is carried out.
        measure: what else the manifest is to say of the trained model, as JSON values.
    """
    from .fitting import fit

    trainee, opened, data, manifest, start = prepared
    device = trainee.get_input_embeddings().weight.device
    with working_folder(folder, identity_of(recipe, manifest)) as working:
        with trainers_randomness(recipe.seed, device):
            sha256 = manifest["base"]["sha256"]
            fitted = fit(trainee, opened, data, recipe, device, working, options, sha256, start)
        notes = [*manifest["notes"], *fitted.notes]
        run = HyperfitRun(
            model=fitted.model,
            tokenizer=opened.tokenizer,
            recipe=recipe,
            history=tuple(fitted.progress.losses),
            records=tuple(fitted.progress.records),
            manifest=manifest | fitted.scope | {"notes": notes} | measure(fitted.model),
            folder=folder,
        )
        if folder is not None and processes.is_first():
            if run.records:
                history.write(working.history, run.records)
            tables = (working.history, working.logs)
            record, check = run_to_json(run), check_written(run.model)
            save(
                *(working.finished, run.model, run.tokenizer, record, *tables),
                check=check,
                kept=working.kept,
            )
            working.publish(folder)
    return run


@check_types
def to_hooked(run: HyperfitRun, backend: Backend = "bridge") -> Any:
    """The trained model as a hooked model, checked against the plain one.

    Args:
        run: what `hyperfit` returned.
        backend: as in `hyperlens.load_hooked`.

    Raises:
        LoadingError: if the backend is not available for this model.
        ParityError: if the hooked model does not reproduce the trained one.
    """
    return load_hooked((run.model, run.tokenizer), backend=backend)


def run_to_json(run: HyperfitRun) -> dict[str, Any]:
    """The content of hyperfit.json, as JSON values."""
    return {
        "recipe": run.recipe.to_json(),
        "origins": run.recipe.origins(),
        "seed": run.recipe.seed,
        "manifest": run.manifest,
        "history": list(run.history),
        "records": [record.to_json() for record in run.records],
        "versions": versions(),
    }


def chosen_recipe(
    recipe: str | Path | Recipe | None, method: Method | None, overrides: dict[str, Any]
) -> Recipe:
    """The recipe that arguments of `hyperfit` name."""
    # A mistyped argument of `hyperfit` itself comes here, too.
    own = [name for name in inspect.signature(hyperfit).parameters if name != "overrides"]
    for name in overrides:
        meant = nearest(name, [*HELP, *own])
        if name not in HELP and meant in own:
            raise TrainingError(f"hyperfit has no argument {name!r}: did you mean {meant}?")
    if isinstance(recipe, Recipe):
        return changed(recipe, **overrides, **({} if method is None else {"method": method}))
    return recipe_of(recipe or "li2026", method, **overrides)


def check_can_keep(recipe: Recipe, out: str | Path | None) -> None:
    """Raise if checkpoints are to be kept, and there is no folder to keep them in.

    Raises:
        TrainingError: in one line.
    """
    if recipe.keep_every and out is None:
        raise TrainingError(
            "keep_every keeps checkpoints in the folder of the result, and there is none: give out"
        )


def _check_callbacks(callbacks: Sequence[Any]) -> None:
    if not callbacks:
        return
    from transformers import TrainerCallback

    for callback in callbacks:
        kind = callback if isinstance(callback, type) else type(callback)
        if not issubclass(kind, TrainerCallback):
            raise TrainingError(
                f"callbacks must be TrainerCallback objects of transformers, got {kind.__name__}"
            )


def _duration(about: dict[str, Any]) -> str:
    """Seconds of training, and how much of the run its records took besides."""
    training, recording = about["seconds"], about["recording_seconds"]
    if not recording:
        return f"{training:.0f} s"
    share = recording / (training + recording)
    return f"{training:.0f} s and {recording:.0f} s for the record ({share:.0%} of the run)"


def _quality(records: Sequence[Record], kept_epoch: int) -> list[str]:
    """Quality at the record of the weights that were kept, beside the base's: the first record."""
    if len(records) < 2:
        return []
    base, final = records[0], next(r for r in records if r.epoch == kept_epoch)
    return [
        f"held-out text after epoch {final.epoch} (the base): "
        f"TTR {final.ttr:.3f} ({base.ttr:.3f}), "
        f"bigram repetition {final.bigram_repetition:.3f} ({base.bigram_repetition:.3f}), "
        f"perplexity {final.perplexity:,.1f} ({base.perplexity:,.1f})"
    ]


def _open(
    model: Any, recipe: Recipe, device: torch.device | None, dtype: str | torch.dtype | None
) -> OpenedModel:
    weights_dtype = parse_dtype(dtype) or (torch.float32 if recipe.method == "full" else None)
    if recipe.method == "full" and weights_dtype == torch.float16:
        raise TrainingError(
            "float16 weights become NaN in training, as Adam's small divisors round to 0: leave "
            "dtype out for float32, and set bf16=True for speed"
        )
    plain = model[0] if isinstance(model, tuple) and model else model
    if isinstance(plain, torch.nn.Module):
        check_can_be_fetched(plain_model(plain))
        check_is_here(plain_model(plain), "training it")
    if dtype is None and getattr(plain, "is_quantized", False):
        weights_dtype = None  # cannot be cast; whether it can be trained is told by `private_copy`
    opened = open_source(model, device=device, dtype=weights_dtype)
    folder = Path(opened.name).expanduser()
    # The name is saved with the result, which others open from elsewhere.
    return replace(opened, name=str(folder.absolute())) if folder.is_dir() else opened


def _data(model: Any, texts: Any, validation: Any, tokenizer: Any, recipe: Recipe) -> TrainingData:
    limit = context_length(model)
    if limit is not None and recipe.sequence_length > limit:
        raise TrainingError(
            f"sequence_length is {recipe.sequence_length} but the model has positions for {limit} "
            f"tokens: lower it to {limit} or less"
        )
    d_vocab = model.get_input_embeddings().weight.shape[0]
    data = training_data(texts, tokenizer, recipe, d_vocab, validation)
    n = len(data.tokens)
    if recipe.drop_last and n < recipe.batch_size:
        raise TrainingError(
            f"{n} sequences do not fill a batch of {recipe.batch_size}, and drop_last leaves "
            f"it out: lower batch_size to {n} or less, or set drop_last=False"
        )
    _check_shares(n, recipe)
    if recipe.stop_at_plateau and len(data.held_out) == 0:
        raise TrainingError(
            "stop_at_plateau needs held-out texts to measure diversity on, and none are left: "
            "give validation texts, or lower n_sequences"
        )
    return data


def _check_whole_models() -> None:
    """Check that every process is to hold all weights, which records and checkpoints are made of.

    On CPUs accelerate ignores a configuration for FSDP and trains whole models without a word.
    """
    kind = processes.sharded_by()
    if kind is not None:
        raise TrainingError(
            f"accelerate's configuration divides the weights by {kind}, and hyperfit needs them "
            "whole in each process: launch with torchrun, or accelerate's MULTI_GPU; to save "
            "memory train an adapter (late_lora) on bfloat16 weights, with gradient_checkpointing"
        )


def _check_shares(n_sequences: int, recipe: Recipe) -> None:
    """Check that several processes can share each batch evenly, so that they train as one would."""
    n, remainder = processes.count(), n_sequences % recipe.batch_size
    if recipe.batch_size % n:
        raise TrainingError(
            f"batch_size is {recipe.batch_size} for {n} processes, which share a batch: choose a "
            f"multiple of {n}"
        )
    if n > 1 and remainder and not recipe.drop_last:
        raise TrainingError(
            f"{n_sequences} sequences leave a last batch of {remainder}, which {n} processes "
            f"cannot share: set drop_last=True, or let batch_size divide {n_sequences}"
        )


def identity_of(recipe: Recipe, manifest: dict[str, Any]) -> dict[str, Any]:
    """Everything that decides the weights, as a flat dict, so that a difference can be named."""
    data = manifest["data"]
    fields = recipe.to_json()
    for name in ("keep_every", "pad_short"):
        if not fields[name]:  # runs begun before there was such a field go on
            del fields[name]
    start = {"start": manifest["start"]["sha256"]} if "start" in manifest else {}
    return (
        start
        | fields
        | {
            "base": manifest["base"]["sha256"],
            "texts": data["sha256"],
            "validation": data["held_out_sha256"],
            "device": manifest["device"],
            "dtype": manifest["dtype"],
        }
    )
