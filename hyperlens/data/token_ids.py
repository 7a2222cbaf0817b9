"""Texts that come as token ids: lists, arrays or tensors, of one model's own tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from ..errors import CorpusError


def are_token_ids(texts: Any) -> bool:
    """Whether texts came tokenized: a list of id sequences, or a tensor of them."""
    if isinstance(texts, Tensor):
        return True
    if isinstance(texts, np.ndarray):
        return texts.dtype.kind not in "OUST" or are_token_ids(list(texts))
    if not isinstance(texts, list | tuple) or not texts:
        return False
    return not isinstance(texts[0], str) and isinstance(texts[0], Sequence | Tensor | np.ndarray)


def read_token_ids(texts: Any, pad_id: int | None) -> list[np.ndarray]:
    """Token id sequences as arrays.

    Raises:
        CorpusError: if one is no flat list of whole numbers, or is padded.
    """
    sequences = []
    for i, given in enumerate(texts):
        try:
            ids = np.asarray(given.cpu() if isinstance(given, Tensor) else given)
        except (TypeError, ValueError):  # ragged, or of a kind that numpy does not know
            ids = np.zeros((1, 1))
        if ids.ndim != 1 or (ids.size and not np.issubdtype(ids.dtype, np.integer)):
            raise CorpusError(
                f"text {i}: expected a flat list of integer token ids, as every text in a list of "
                "token ids must be"
            )
        sequences.append(ids.astype(np.int64))
    _check_unpadded(texts, sequences, pad_id)
    return sequences


def _check_unpadded(texts: Any, sequences: list[np.ndarray], pad_id: int | None) -> None:
    """A rectangle may be padded, and pads would be measured as text."""
    if not isinstance(texts, Tensor | np.ndarray) or pad_id is None:
        return
    for i, ids in enumerate(sequences):
        # One at an end may be meant: many tokenizers pad with EOS.
        if len(ids) > 2 and any((ends == pad_id).all() for ends in (ids[:2], ids[-2:])):
            raise CorpusError(
                f"text {i} is padded (with id {pad_id}): give a list of the token ids without "
                "padding, or the texts themselves"
            )


def check_ids(sequences: list[np.ndarray], d_vocab: int | None) -> None:
    """Refuse ids that the model does not have.

    Raises:
        CorpusError: naming one.
    """
    lowest, highest = min(int(s.min()) for s in sequences), max(int(s.max()) for s in sequences)
    if lowest < 0 or (d_vocab is not None and highest >= d_vocab):
        bad = lowest if lowest < 0 else highest
        raise CorpusError(
            f"token id {bad} is outside the model's vocabulary of {d_vocab}: "
            "give the texts, or the token ids, of this model's own tokenizer"
        )


def pad(
    sequences: Sequence[np.ndarray], *, side: str = "right", width: int | None = None
) -> tuple[Int[Tensor, "text pos"], Int[Tensor, "text pos"]]:
    """Token ids and attention mask of several sequences in one batch; pads have id 0.

    Args:
        sequences: token ids.
        side: where the pads go, "right" or "left".
        width: of the batch; None for that of the longest sequence.

    >>> tokens, mask = pad([np.array([5, 6, 7]), np.array([8])], side="left")
    >>> tokens.tolist(), mask.tolist()
    ([[5, 6, 7], [0, 0, 8]], [[1, 1, 1], [0, 0, 1]])
    """
    width = max(map(len, sequences)) if width is None else width
    tokens = torch.zeros(len(sequences), width, dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for row, ids in enumerate(sequences):
        start = 0 if side == "right" else width - len(ids)
        tokens[row, start : start + len(ids)] = torch.from_numpy(ids)
        mask[row, start : start + len(ids)] = 1
    return tokens, mask
