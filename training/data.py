"""Texts to training sequences, all of one length: no padding, so every token is a real one."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from ..corpus import adds_bos, are_token_ids
from ..errors import TrainingError
from ..texts import read_texts
from .recipes import Recipe

# Texts are tokenised so many at a time: reading stops once there are enough sequences.
CHUNK = 256
# Between joined texts: what stood between the paragraphs of a file.
SEPARATOR = "\n\n"


@dataclass(frozen=True)
class TrainingData:
    """Sequences to train on.

    Attributes:
        tokens: ids, in the order the texts came in.
        manifest: counts, options and a SHA-256 of the ids, as JSON values.
        notes: what a reader of the result should know.
    """

    tokens: Int[Tensor, "sequences pos"]
    manifest: dict[str, Any]
    notes: tuple[str, ...]


def training_data(texts: Any, tokenizer: Any, recipe: Recipe, d_vocab: int) -> TrainingData:
    """The first `n_sequences` distinct sequences of exactly `sequence_length` tokens.

    A text is cut to the length, or left out if it is shorter; with `packed`, consecutive texts
    are joined until there are enough tokens, and each sequence starts at the start of a text.
    BOS is prepended exactly where the tokenizer itself would. Files are read in their own order,
    as in Carlsson et al. 2025.

    Args:
        texts: anything `hyperlens.read_texts` takes, or a list of token id sequences.
        tokenizer: a Hugging Face tokenizer; may be None if token ids are given.
        recipe: says how many sequences, how long, and whether to join texts.
        d_vocab: rows of the model's embedding, to find ids that it does not have.

    Raises:
        TrainingError: if no text is long enough, or the ids do not fit the model.
        CorpusError: if the texts cannot be read.
    """
    given = are_token_ids(texts)
    if not given and tokenizer is None:
        raise TrainingError(
            "no tokenizer was found for this model: pass (model, tokenizer) instead of the model, "
            "or token ids instead of texts"
        )
    start = [] if given or not adds_bos(tokenizer) else [tokenizer.bos_token_id]
    pieces = (
        _token_ids(texts)
        if given
        else _tokenized(read_texts(texts), tokenizer, SEPARATOR if recipe.packed else "")
    )
    counts = {"n_read": 0, "n_short": 0, "n_cut": 0, "n_duplicates": 0, "longest": 0}
    pieces = _counted(pieces, counts)
    room = recipe.sequence_length - len(start)
    whole = _joined(pieces, room) if recipe.packed else pieces
    found: dict[bytes, np.ndarray] = {}
    for ids in whole:
        counts["longest"] = max(counts["longest"], len(start) + len(ids))
        if len(ids) < room:
            counts["n_short"] += 1
            continue
        sequence = np.concatenate([np.array(start, dtype=np.int64), ids[:room]])
        counts["n_cut"] += len(ids) > room
        counts["n_duplicates"] += sequence.tobytes() in found
        found.setdefault(sequence.tobytes(), sequence)
        if len(found) == recipe.n_sequences:
            break
    if not found:
        raise TrainingError(_none_long_enough(recipe, counts))
    tokens = np.stack(list(found.values()))
    _check_ids(tokens, d_vocab)
    return TrainingData(
        tokens=torch.from_numpy(tokens),
        manifest=_manifest(tokens, recipe, counts, bool(start)),
        notes=_notes(len(tokens), recipe, counts),
    )


def _tokenized(texts: Sequence[str], tokenizer: Any, end: str) -> Iterator[np.ndarray]:
    for first in range(0, len(texts), CHUNK):
        chunk = [text + end for text in texts[first : first + CHUNK]]
        encoded = tokenizer(chunk, add_special_tokens=False, verbose=False)["input_ids"]
        for ids in encoded:
            yield np.array(ids, dtype=np.int64)


def _token_ids(texts: Any) -> Iterator[np.ndarray]:
    for i, text in enumerate(texts):
        ids = np.asarray(text.cpu() if isinstance(text, Tensor) else text)
        if ids.ndim != 1 or (ids.size and not np.issubdtype(ids.dtype, np.integer)):
            raise TrainingError(f"text {i}: expected a flat list of integer token ids")
        yield ids.astype(np.int64)


def _counted(pieces: Iterable[np.ndarray], counts: dict[str, int]) -> Iterator[np.ndarray]:
    for ids in pieces:
        counts["n_read"] += 1
        yield ids


def _joined(pieces: Iterable[np.ndarray], length: int) -> Iterator[np.ndarray]:
    """Consecutive pieces, joined as soon as they reach the length; what is left comes last."""
    waiting: list[np.ndarray] = []
    n = 0
    for ids in pieces:
        waiting.append(ids)
        n += len(ids)
        if n >= length:
            yield np.concatenate(waiting)
            waiting, n = [], 0
    if waiting:
        yield np.concatenate(waiting)


def _none_long_enough(recipe: Recipe, counts: dict[str, int]) -> str:
    wanted, n, longest = recipe.sequence_length, counts["n_read"], counts["longest"]
    if recipe.packed:
        return (
            f"the {n} texts have {longest} tokens in all, fewer than one sequence of {wanted}: "
            "give more text or lower sequence_length"
        )
    return (
        f"none of the {n} texts has {wanted} tokens, the longest has {longest}: lower "
        "sequence_length, or set packed=True to join consecutive texts"
    )


def _check_ids(tokens: np.ndarray, d_vocab: int) -> None:
    lowest, highest = int(tokens.min()), int(tokens.max())
    if lowest < 0 or highest >= d_vocab:
        raise TrainingError(
            f"token id {lowest if lowest < 0 else highest} is outside the model's vocabulary of "
            f"{d_vocab}: the tokenizer belongs to another model"
        )


def _manifest(
    tokens: np.ndarray, recipe: Recipe, counts: dict[str, int], bos: bool
) -> dict[str, Any]:
    return counts | {
        "n_sequences": len(tokens),
        "n_tokens": tokens.size,
        "sequence_length": recipe.sequence_length,
        "packed": recipe.packed,
        "bos_prepended": bos,
        "sha256": hashlib.sha256(tokens.astype("<i8").tobytes()).hexdigest(),
    }


def _notes(n: int, recipe: Recipe, counts: dict[str, int]) -> tuple[str, ...]:
    notes = []
    if n < recipe.n_sequences:
        notes.append(
            f"only {n} of the {recipe.n_sequences} sequences asked for were found "
            f"({counts['n_short']} texts too short, {counts['n_duplicates']} duplicates)"
        )
    if counts["n_duplicates"] and n == recipe.n_sequences:
        notes.append(f"{counts['n_duplicates']} duplicate sequences were left out")
    return tuple(notes)
