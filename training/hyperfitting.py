"""hyperfit: fine-tune a model to near-zero loss on a little text, without touching the caller's."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import TrainingError
from ..files import check_new_folder
from ..fingerprint import versions, weights_sha256
from ..loading import parse_device, parse_dtype
from ..sources import Opened, open_source
from .data import TrainingData, training_data
from .recipes import Method, Recipe, as_json, changed, preset
from .weights import (
    context_length,
    kept_use_cache,
    own_copy,
    own_randomness,
    recomputing,
    without_dropout,
)


@dataclass(frozen=True)
class HyperfitRun:
    """A trained model and how it was made.

    Attributes:
        model: the trained `PreTrainedModel`, or `PeftModel` for LoRA, in evaluation mode.
        tokenizer: the base model's tokenizer, None if there is none.
        recipe: what was done.
        history: mean training loss of each epoch, in nats per token, as it was seen: each batch
            before the step that learned from it.
        manifest: the base, the trained blocks (0-based) and parameters, the data, the time taken;
            JSON values.
        folder: where it was saved, None if it was not.
    """

    model: Any
    tokenizer: Any
    recipe: Recipe
    history: tuple[float, ...]
    manifest: dict[str, Any]
    folder: Path | None


def hyperfit(
    model: Any,
    texts: Any,
    method: Method | None = None,
    *,
    recipe: str | Recipe | None = None,
    out: str | Path | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    progress: bool = True,
    **overrides: Any,
) -> HyperfitRun:
    """Fine-tune a causal LM until it knows a small set of texts by heart ("hyperfitting").

    As in Carlsson et al. 2025 and arXiv 2605.22579: few sequences, many epochs, the loss on every
    token, all dropout of the model off. On a CPU the same seed gives bit-identical weights.

    Args:
        model: hub id, local folder, adapter folder, `PreTrainedModel`, `PeftModel` (merged
            first; "full" only), or a pair (model, tokenizer). An object is copied, never changed.
        texts: anything `read_texts` takes, or a list of token id sequences.
        method: "full" for all weights, "lora" for an adapter on all blocks, "late_lora" for one
            on the last `last_k` blocks; None takes the recipe's, "full" in the presets.
        recipe: name of a preset or a `Recipe`; None for "li2026".
        out: a new folder for weights or adapter, tokenizer and hyperfit.json.
        device: None leaves an object where it is and puts folders on the best device.
        dtype: of the weights; None is float32 for "full", as small steps vanish in bfloat16, and
            the checkpoint's own for LoRA, whose adapter is float32 either way.
        progress: show a progress bar.
        overrides: other values for fields of `Recipe`, such as `epochs=20`.

    Returns:
        The trained model with its recipe, loss history and manifest.

    Raises:
        TrainingError: if the recipe, the model or the texts do not allow it, or the loss becomes
            NaN or infinite.
        LoadingError: if the model cannot be opened.
        CorpusError: if the texts cannot be read.
        ResultsError: if `out` is not a new folder, or cannot be written.
    """
    chosen = _recipe(recipe, method, overrides)
    folder = None if out is None else Path(out).expanduser()
    if folder is not None:
        check_new_folder(folder)
    opened = _opened(model, chosen, device, dtype)
    trainee = own_copy(opened, chosen)
    data = _data(trainee, texts, opened.tokenizer, chosen)
    where = trainee.get_input_embeddings().weight.device
    base = {"name": opened.name, "kind": opened.kind, "sha256": weights_sha256(trainee)}
    started = time.perf_counter()
    with own_randomness(chosen.seed, where):
        trained, scope, history = _fit(trainee, opened, data, chosen, where, progress)
    manifest: dict[str, Any] = {
        "base": base,
        "method": chosen.method,
        **scope,
        "data": data.manifest,
        "device": where.type,
        "dtype": str(next(trainee.parameters()).dtype).removeprefix("torch."),
        "seconds": round(time.perf_counter() - started, 3),
        "notes": [*opened.notes, *data.notes],
    }
    if folder is not None:
        from .saving import save

        save(folder, trained, opened.tokenizer, _record(chosen, manifest, history))
    return HyperfitRun(trained, opened.tokenizer, chosen, history, manifest, folder)


def _recipe(
    recipe: str | Recipe | None, method: Method | None, overrides: dict[str, Any]
) -> Recipe:
    if isinstance(recipe, Recipe):
        return changed(recipe, **overrides, **({} if method is None else {"method": method}))
    return preset(recipe or "li2026", method or "full", **overrides)


def _opened(
    model: Any, recipe: Recipe, device: str | torch.device | None, dtype: str | torch.dtype | None
) -> Opened:
    chosen = parse_dtype(dtype) or (torch.float32 if recipe.method == "full" else None)
    return open_source(model, device=parse_device(device), dtype=chosen)


def _data(model: Any, texts: Any, tokenizer: Any, recipe: Recipe) -> TrainingData:
    limit = context_length(model)
    if limit is not None and recipe.sequence_length > limit:
        raise TrainingError(
            f"sequence_length is {recipe.sequence_length} but the model has positions for {limit} "
            f"tokens: lower it to {limit} or less"
        )
    data = training_data(texts, tokenizer, recipe, model.get_input_embeddings().weight.shape[0])
    found = len(data.tokens)
    if recipe.drop_last and found < recipe.batch_size:
        raise TrainingError(
            f"{found} sequences do not fill a batch of {recipe.batch_size}, and drop_last leaves "
            f"it out: lower batch_size to {found} or less, or set drop_last=False"
        )
    return data


def _fit(
    model: Any,
    opened: Opened,
    data: TrainingData,
    recipe: Recipe,
    device: torch.device,
    progress: bool,
) -> tuple[Any, dict[str, Any], tuple[float, ...]]:
    """The trained model, what was trained, and the loss of each epoch."""
    from .adapters import find_stack, projections, trained_blocks, with_adapter
    from .loop import train

    stack = find_stack(model)
    blocks = trained_blocks(len(stack.blocks), recipe)
    scope: dict[str, Any] = {"n_blocks": len(stack.blocks), "trained_blocks": list(blocks)}
    with kept_use_cache(model), without_dropout(model):
        if recipe.method == "full":
            for parameter in model.parameters():
                parameter.requires_grad_(True)
            trained = model
        else:
            targets = projections(stack, recipe)
            # An object made in memory has no name that its base could be found under.
            named = opened.kind != "object" or bool(getattr(model.config, "_name_or_path", ""))
            name = opened.name if named else None
            trained = with_adapter(model, name, stack, blocks, targets, recipe)
            scope["target_modules"] = list(targets)
        sizes = [(p.numel(), p.requires_grad) for p in trained.parameters()]
        scope["trained_parameters"] = sum(n for n, requires_grad in sizes if requires_grad)
        scope["parameters"] = sum(n for n, _ in sizes)
        with recomputing(model, recipe.gradient_checkpointing):
            history = train(trained, data.tokens, recipe, device, progress)
    return trained, scope, history


def _record(recipe: Recipe, manifest: dict[str, Any], history: tuple[float, ...]) -> dict[str, Any]:
    return {
        "recipe": as_json(recipe),
        "origins": recipe.origins(),
        "seed": recipe.seed,
        "manifest": manifest,
        "history": list(history),
        "versions": versions(),
    }
