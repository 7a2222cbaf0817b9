"""From an opened model to trained weights: what is trained, what is cached, then the loop."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ..models.sources import OpenedModel
from . import pissa, processes
from .adapters import Stack, find_stack, projections, train_only, trained_blocks, with_adapter
from .data import TrainingData
from .left_out import left_out
from .loop import Manner, train
from .prefix import PrefixCache, is_exact, plan
from .progress import Progress
from .recipes import Recipe
from .record import Recorder
from .weights import kept_use_cache, recomputing, without_dropout
from .working import Working


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


def fit(
    model: Any,
    opened: OpenedModel,
    data: TrainingData,
    recipe: Recipe,
    device: torch.device,
    working: Working,
    manner: Manner,
    prefix_cache: bool,
) -> Fitted:
    """Train `model` in place, or an adapter on it.

    Raises:
        TrainingError: if the recipe does not fit the model, or the loss becomes NaN or infinite.
        ResourceError: if the prefix cache does not fit.
        ResultsError: if a checkpoint cannot be written.
    """
    stack = find_stack(model)
    blocks = trained_blocks(len(stack.blocks), recipe)
    scope: dict[str, Any] = {"n_blocks": len(stack.blocks), "trained_blocks": list(blocks)}
    notes: list[str] = []
    say = _speaker(manner)
    say(f"training blocks {', '.join(map(str, blocks))} (0-based) of {len(stack.blocks)}")
    with kept_use_cache(model), without_dropout(model):
        trained = _trainable(model, opened, stack, blocks, recipe, scope, notes)
        recorder = None
        if len(data.held_out) and recipe.record_every:
            recorder = Recorder(trained, data.held_out, recipe)
        with recomputing(model, recipe.gradient_checkpointing):
            prefix = None
            if prefix_cache and _prefix_is_frozen(trained, stack, blocks[0]):
                prefix = _cache(trained, data, recipe, stack, blocks[0], working, notes)
                if prefix is not None:
                    say(f"prefix cache: {prefix.plan}")
            scope["prefix_cache"] = str(prefix.plan) if prefix else None
            try:
                progress, ending = train(
                    trained, data.tokens, recipe, device, working, manner, recorder, prefix
                )
            finally:
                if prefix is not None:
                    prefix.close()
        if recipe.method != "full":
            pissa.join(trained)
    scope |= {"seconds": round(progress.seconds, 3)}
    scope |= {"ending": ending.reason, "kept_epoch": ending.kept_epoch}
    return Fitted(trained, progress, scope, tuple(notes))


def _trainable(
    model: Any,
    opened: OpenedModel,
    stack: Stack,
    blocks: tuple[int, ...],
    recipe: Recipe,
    scope: dict[str, Any],
    notes: list[str],
) -> Any:
    """The model with exactly the weights of the method requiring gradients."""
    trained = model
    if recipe.method != "full":
        targets = projections(stack, recipe)
        # An object made in memory has no name that its base could be found under.
        named = opened.kind != "object" or bool(getattr(model.config, "_name_or_path", ""))
        trained = with_adapter(
            model, opened.name if named else None, stack, blocks, targets, recipe
        )
        config = trained.peft_config["default"]
        scope["target_modules"] = list(targets)
        if config.target_parameters is not None:  # PEFT has taken some names for experts
            scope["target_modules"] = [name for name in targets if name in config.target_modules]
            scope["target_parameters"] = sorted(config.target_parameters)
        chosen = [stack.blocks[i] for i in blocks]
        notes += left_out(chosen, targets, recipe.target_modules is None)
    elif recipe.blocks is not None:
        train_only(model, stack, blocks)
    else:
        for parameter in model.parameters():
            parameter.requires_grad_(True)
    sizes = [(p.numel(), p.requires_grad) for p in trained.parameters()]
    scope["trained_parameters"] = sum(n for n, requires_grad in sizes if requires_grad)
    scope["parameters"] = sum(n for n, _ in sizes)
    return trained


def _prefix_is_frozen(model: nn.Module, stack: Stack, first: int) -> bool:
    """Whether there are blocks before the first trained one, and nothing before it is trained."""
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    before = [embedding, *stack.blocks[:first]]
    return first > 0 and not any(p.requires_grad for part in before for p in part.parameters())


def _cache(
    model: nn.Module,
    data: TrainingData,
    recipe: Recipe,
    stack: Stack,
    first: int,
    working: Working,
    notes: list[str],
) -> PrefixCache | None:
    """A cache that has been seen to change nothing, or None."""
    embedding = model.get_input_embeddings().weight  # type: ignore[operator]
    shape = (*data.tokens.shape, embedding.shape[1])
    cache = PrefixCache(
        stack.blocks, first, len(data.tokens), plan(shape, embedding.dtype, working.folder)
    )
    rows = min(len(data.tokens), recipe.batch_size // processes.count())
    if is_exact(model, cache, data.tokens[:rows].to(embedding.device)):
        return cache
    cache.close()
    notes.append(
        "the frozen blocks of this architecture pass on more than the residual stream: the prefix "
        "cache was not used"
    )
    return None


def _speaker(manner: Manner) -> Any:
    def say(text: str) -> None:
        if manner.progress and processes.is_first():
            tqdm.write(text, file=sys.stderr)

    return say
