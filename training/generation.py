"""Greedy continuations, and how much they repeat themselves: token ids in, numbers out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..statistics.distances import winner


def greedy(model: Any, prompts: Int[Tensor, "n prompt"], new_tokens: int) -> Int[Tensor, "n new"]:
    """The most likely next token, over and over, with a key-value cache where there is one.

    Always `new_tokens` of them: an end-of-text token is a token like any other. Both measures of
    repetition depend on length, so continuations that end when they please could not be compared,
    neither with one another nor along the training.

    Args:
        model: a plain Hugging Face causal LM, in evaluation mode, without gradients.
        prompts: token ids of one length, without padding, on the model's device.
        new_tokens: how many to add.
    """
    made: list[Tensor] = []
    given = prompts
    cached: dict[str, Any] = {}
    with last_position_only(model.get_output_embeddings()):
        for _ in range(new_tokens):
            output = model(input_ids=given, use_cache=True, **cached)
            made.append(winner(output.logits[:, -1].float())[:, None])
            cache = getattr(output, "past_key_values", None)
            cached = {} if cache is None else {"past_key_values": cache}
            # Recurrent models keep a state of their own kind: they read everything again.
            given = torch.cat([prompts, *made], dim=1) if cache is None else made[-1]
    return torch.cat(made, dim=1)


@contextmanager
def last_position_only(head: nn.Module) -> Iterator[list[Float[Tensor, "batch pos d_model"]]]:
    """Inside, the unembedding gets the last position only: its output is wide.

    Yields:
        A list that fills with what each forward pass wanted to unembed.
    """
    wanted: list[Tensor] = []

    def cut(module: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        wanted[:] = [given[0]]
        return (given[0][:, -1:], *given[1:])

    handle = head.register_forward_pre_hook(cut)
    try:
        yield wanted
    finally:
        handle.remove()


def type_token_ratio(tokens: Int[Tensor, "n pos"]) -> Float[Tensor, " n"]:
    """Distinct tokens / tokens (TTR) of each row, in (0, 1]; 1 repeats nothing."""
    return _distinct(tokens) / tokens.shape[1]


def bigram_repetition(tokens: Int[Tensor, "n pos"]) -> Float[Tensor, " n"]:
    """1 - distinct bigrams / bigrams of each row of two tokens or more, in [0, 1).

    arXiv 2605.22579 names it without a formula; this is the usual one (seq-rep-2 of Welleck et
    al. 2019, arXiv 1908.04319).
    """
    pairs = tokens[:, :-1] * (tokens.max() + 1) + tokens[:, 1:]
    return 1 - _distinct(pairs) / pairs.shape[1]


def _distinct(values: Int[Tensor, "n m"]) -> Float[Tensor, " n"]:
    """How many different values each row holds."""
    ordered = values.cpu().sort(dim=-1).values
    return 1.0 + (ordered[:, 1:] != ordered[:, :-1]).sum(dim=-1, dtype=torch.float64)
