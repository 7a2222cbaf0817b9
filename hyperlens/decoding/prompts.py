"""Prompts for a causal LM, checked and padded on the left as batches; continuations as text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from ..errors import CorpusError, LoadingError
from ..shells import plain_model


def check_prompts(model: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    """Refuse a model that cannot generate, and prompts that leave no room.

    Raises:
        CorpusError: if a prompt is empty, or longer than the model's context allows.
        LoadingError: if the model cannot generate.
    """
    if not hasattr(plain_model(model), "generate"):
        raise LoadingError(
            f"{type(model).__name__} cannot generate with padding and a mask: give the model as a "
            "folder, hub id, PreTrainedModel or PeftModel"
        )
    if max_new_tokens < 1:
        raise CorpusError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if not prompts or any(len(prompt) == 0 for prompt in prompts):
        raise CorpusError("expected prompts of at least one token each, got an empty one")
    longest = max(len(prompt) for prompt in prompts) + max_new_tokens
    context = getattr(plain_model(model).config, "max_position_embeddings", None)
    if isinstance(context, int) and longest > context:
        raise CorpusError(
            f"a prompt and its continuation may be {longest} tokens long, the model has {context} "
            "positions: use shorter prompts or fewer new tokens"
        )


def eos_ids(model: Any, tokenizer: Any) -> list[int]:
    """What ends a text: the tokenizer's EOS, else the configuration's."""
    found = getattr(tokenizer, "eos_token_id", None)
    if found is None:
        found = getattr(plain_model(model).config, "eos_token_id", None)
    if found is None:
        return []
    return [int(found)] if isinstance(found, int) else [int(token) for token in found]


def batches(prompts: Sequence[Sequence[int]], size: int) -> Iterator[list[int]]:
    """Which prompts go together: those of like length, the longest first."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
    for start in range(0, len(order), size):
        yield order[start : start + size]


def left_padded(
    prompts: Sequence[Sequence[int]], pad: int, device: torch.device
) -> tuple[Int[Tensor, "batch pos"], Int[Tensor, "batch pos"]]:
    """Tokens and their mask, 0 at the pads."""
    width = max(len(prompt) for prompt in prompts)
    tokens = torch.full((len(prompts), width), pad, dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for row, prompt in enumerate(prompts):
        tokens[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    return tokens.to(device), mask.to(device)


def text_after(tokenizer: Any, before: Sequence[int], tokens: Sequence[int]) -> str:
    """Tokens as they read after what stands before them; ids without a tokenizer."""
    if tokenizer is None:
        return " ".join(map(str, tokens))
    start = tokenizer.decode(list(before), skip_special_tokens=True)
    whole = tokenizer.decode([*before, *tokens], skip_special_tokens=True)
    return str(whole[len(start) :])


@contextmanager
def without_dropout(model: Any) -> Iterator[None]:
    """Evaluation mode inside, whatever it was before."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
