"""Prompts for a causal LM, checked and padded on the left as batches; continuations as text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from os.path import commonprefix
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from ..errors import CorpusError, LoadingError
from ..models.kinds import plain_model


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
    """What ends a text: the EOS of tokenizer, configuration and generation settings, in that order.

    Chat models end a turn by another token than a text, and not every holder knows both. The first
    is also what prompts are padded with.
    """
    plain = plain_model(model)
    found: list[Any] = []
    for holder in (tokenizer, plain.config, getattr(plain, "generation_config", None)):
        value = getattr(holder, "eos_token_id", None)
        found += value if isinstance(value, list | tuple) else [value]
    return [int(token) for token in dict.fromkeys(found) if token is not None]


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


def as_text(tokenizer: Any, tokens: Sequence[int]) -> str:
    """Tokens as they read alone, special ones left out; ids without a tokenizer."""
    if tokenizer is None:
        return " ".join(map(str, tokens))
    return str(tokenizer.decode(list(tokens), skip_special_tokens=True))


def opening_and_texts(
    tokenizer: Any, prompt: Sequence[int], written: Sequence[Sequence[int]]
) -> tuple[str, list[str]]:
    """A prompt, and what was written after it, such that both together are the whole text.

    A prompt may end inside a character, which reads "\ufffd" until what is written completes it:
    the opening ends before it then, and every text begins with its own character there.

    Args:
        tokenizer: None for ids instead of text.
        prompt: token ids.
        written: for each text the ids after the prompt.
    """
    if tokenizer is None:
        return as_text(None, prompt), [as_text(None, tokens) for tokens in written]
    wholes = [as_text(tokenizer, [*prompt, *tokens]) for tokens in written]
    opening = commonprefix([as_text(tokenizer, prompt), *wholes])  # noqa: RUF071 - by characters
    return opening, [whole[len(opening) :] for whole in wholes]
