"""hyperfit: fine-tune a model to near-zero loss on a little text, without touching the caller's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import TrainingError
from ..files import check_new_folder
from ..hooks.loading import parse_device, parse_dtype
from ..models.sources import OpenedModel, open_source
from ..results.fingerprint import versions, weights_sha256
from . import processes
from .data import TrainingData, training_data
from .recipes import Method, Recipe, as_json, changed, preset
from .weights import context_length, own_copy, trainers_randomness
from .working import working_folder

if TYPE_CHECKING:
    from .history import Record


@dataclass(frozen=True)
class HyperfitRun:
    """A trained model and how it was made.

    Attributes:
        model: the trained `PreTrainedModel`, or `PeftModel` for LoRA, in evaluation mode.
        tokenizer: the base model's tokenizer, None if there is none.
        recipe: what was done.
        history: mean training loss of each epoch, in nats per token, as it was seen: each batch
            before the step that learned from it.
        records: loss, ranks and quality every few epochs, the base's own first (epoch 0).
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


def hyperfit(
    model: Any,
    texts: Any,
    method: Method | None = None,
    *,
    recipe: str | Recipe | None = None,
    validation: Any = None,
    out: str | Path | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    prefix_cache: bool = True,
    checkpoint_minutes: float = 10.0,
    report_to: str | Sequence[str] = (),
    progress: bool = True,
    **overrides: Any,
) -> HyperfitRun:
    """Fine-tune a causal LM until it knows a small set of texts by heart ("hyperfitting").

    As in Carlsson et al. 2025 and arXiv 2605.22579: few sequences, many epochs, the loss on every
    token, all dropout of the model off. On a CPU the same seed gives bit-identical weights.

    With `out`, the run works in `<out>.partial` and keeps checkpoints there. Killed at any
    moment, the same call goes on from the last one and ends with the same weights.

    Args:
        model: hub id, local folder, adapter folder, `PreTrainedModel`, `PeftModel` (merged
            first; "full" only), or a pair (model, tokenizer). An object is copied, never changed.
        texts: anything `read_texts` takes, or a list of token id sequences.
        method: "full" for all weights, "lora" for an adapter on all blocks, "late_lora" for one
            on the last `last_k` blocks; None takes the recipe's, "full" in the presets.
        recipe: name of a preset or a `Recipe`; None for "li2026".
        validation: held-out texts for the record; None takes those that follow the training
            sequences.
        out: a new folder for weights or adapter, tokenizer, history.csv and hyperfit.json.
        device: None leaves an object where it is and puts folders on the best device.
        dtype: of the weights; None is float32 for "full", as small steps vanish in bfloat16, and
            the checkpoint's own for LoRA, whose adapter is float32 either way. float16 is for
            LoRA only.
        prefix_cache: where the first blocks are frozen, compute what comes out of them only once
            per sequence; the result is the same.
        checkpoint_minutes: between two checkpoints; 0 for one after every step.
        report_to: loggers of transformers' Trainer, such as "tensorboard" or "wandb".
            TensorBoard's files are saved in `out` as "runs", or where TENSORBOARD_LOGGING_DIR says.
        progress: show a progress bar.
        overrides: other values for fields of `Recipe`, such as `epochs=20`.

    Returns:
        The trained model with its recipe, losses, records and manifest.

    Raises:
        TrainingError: if the recipe, the model or the texts do not allow it, the loss becomes
            NaN or infinite, or an unfinished run with other options is in the way.
        LoadingError: if the model cannot be opened.
        CorpusError: if the texts cannot be read.
        ResourceError: if the prefix cache fits neither in memory nor on the disk.
        ResultsError: if `out` is not a new folder, or cannot be written.
    """
    chosen = _recipe(recipe, method, overrides)
    folder = None if out is None else Path(out).expanduser()
    if folder is not None:
        check_new_folder(folder)
    asked = processes.own_device(parse_device(device))
    opened = _opened(model, chosen, asked, dtype)
    trainee = own_copy(opened, chosen)
    # What was opened may be a copy of its own, cast or moved: it is not held while training.
    opened = replace(opened, model=None)
    data = _data(trainee, texts, validation, opened.tokenizer, chosen)
    where = trainee.get_input_embeddings().weight.device
    processes.join(where)
    manifest: dict[str, Any] = {
        "base": {"name": opened.name, "kind": opened.kind, "sha256": weights_sha256(trainee)},
        "method": chosen.method,
        "data": data.manifest,
        "device": where.type,
        "dtype": str(next(trainee.parameters()).dtype).removeprefix("torch."),
        "notes": [*opened.notes, *data.notes],
    }
    from .fitting import fit
    from .loop import Manner

    manner = Manner(checkpoint_minutes, _names(report_to), progress)
    with working_folder(folder, _identity(chosen, manifest)) as working:
        with trainers_randomness(chosen.seed, where):
            fitted = fit(trainee, opened, data, chosen, where, working, manner, prefix_cache)
        manifest |= fitted.scope
        manifest["notes"] += fitted.notes
        run = HyperfitRun(
            model=fitted.model,
            tokenizer=opened.tokenizer,
            recipe=chosen,
            history=tuple(fitted.progress.losses),
            records=tuple(fitted.progress.records),
            manifest=manifest,
            folder=folder,
        )
        if folder is not None and processes.is_first():
            from .saving import save

            about = (record_of(run), working.history, working.logs)
            save(working.finished, run.model, run.tokenizer, *about)
            working.publish(folder)
    return run


def record_of(run: HyperfitRun) -> dict[str, Any]:
    """What hyperfit.json says of a run, as JSON values."""
    return {
        "recipe": as_json(run.recipe),
        "origins": run.recipe.origins(),
        "seed": run.recipe.seed,
        "manifest": run.manifest,
        "history": list(run.history),
        "records": [record.to_json() for record in run.records],
        "versions": versions(),
    }


def _recipe(
    recipe: str | Recipe | None, method: Method | None, overrides: dict[str, Any]
) -> Recipe:
    if isinstance(recipe, Recipe):
        return changed(recipe, **overrides, **({} if method is None else {"method": method}))
    return preset(recipe or "li2026", method or "full", **overrides)


def _opened(
    model: Any, recipe: Recipe, device: torch.device | None, dtype: str | torch.dtype | None
) -> OpenedModel:
    chosen = parse_dtype(dtype) or (torch.float32 if recipe.method == "full" else None)
    if recipe.method == "full" and chosen == torch.float16:
        raise TrainingError(
            "weights in float16 become NaN when all are trained, as Adam divides by numbers that "
            "are 0 in it: leave dtype out for float32, and set bf16=True for speed"
        )
    return open_source(model, device=device, dtype=chosen)


def _data(model: Any, texts: Any, validation: Any, tokenizer: Any, recipe: Recipe) -> TrainingData:
    limit = context_length(model)
    if limit is not None and recipe.sequence_length > limit:
        raise TrainingError(
            f"sequence_length is {recipe.sequence_length} but the model has positions for {limit} "
            f"tokens: lower it to {limit} or less"
        )
    d_vocab = model.get_input_embeddings().weight.shape[0]
    data = training_data(texts, tokenizer, recipe, d_vocab, validation)
    found = len(data.tokens)
    if recipe.drop_last and found < recipe.batch_size:
        raise TrainingError(
            f"{found} sequences do not fill a batch of {recipe.batch_size}, and drop_last leaves "
            f"it out: lower batch_size to {found} or less, or set drop_last=False"
        )
    _check_shares(found, recipe)
    if recipe.stop_at_plateau and len(data.held_out) == 0:
        raise TrainingError(
            "stop_at_plateau needs held-out texts to measure diversity on, and none are left: "
            "give validation texts, or lower n_sequences"
        )
    return data


def _check_shares(found: int, recipe: Recipe) -> None:
    """Several processes share each batch evenly, so that they train as one would."""
    n, left = processes.count(), found % recipe.batch_size
    if recipe.batch_size % n:
        raise TrainingError(
            f"batch_size is {recipe.batch_size} for {n} processes, which share a batch: choose a "
            f"multiple of {n}"
        )
    if n > 1 and left and not recipe.drop_last:
        raise TrainingError(
            f"{found} sequences leave a last batch of {left}, which {n} processes cannot share: "
            f"set drop_last=True, or let batch_size divide {found}"
        )


def _names(report_to: str | Sequence[str]) -> tuple[str, ...]:
    return (report_to,) if isinstance(report_to, str) else tuple(report_to)


def _identity(recipe: Recipe, manifest: dict[str, Any]) -> dict[str, Any]:
    """Everything that decides the weights, flat, so that a difference can be named."""
    data = manifest["data"]
    return as_json(recipe) | {
        "base": manifest["base"]["sha256"],
        "texts": data["sha256"],
        "validation": data["held_out_sha256"],
        "device": manifest["device"],
        "dtype": manifest["dtype"],
    }
