"""Texts to training sequences, all of one length, so that no padding is needed."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from ..data.conversations import Conversations, read_examples
from ..data.corpus import adds_bos, are_token_ids
from ..data.texts import Texts
from ..errors import TrainingError
from .examples import examples
from .recipes import Recipe

# Texts per call of the tokenizer. Reading stops once there are enough sequences.
CHUNK = 256
# Between joined texts where the tokenizer has no EOS: the blank line between a file's paragraphs.
SEPARATOR = "\n\n"


@dataclass(frozen=True)
class TrainingData:
    """Sequences to train on, and held-out ones to measure on.

    Attributes:
        tokens: ids, in the order of the texts, or in random order.
        held_out: ids of sequences that are not trained on; none if there is no record.
        manifest: counts, options, source of the texts and SHA-256s, as JSON values.
        notes: what a reader of the result should know.
        counted: which tokens of each sequence the loss is on; None for all. Conversations and
            completions are padded at their ends, which no causal model sees from before.
        held_out_counted: the same of the held-out sequences.
        held_out_lengths: tokens of each held-out sequence without padding; None without any.
    """

    tokens: Int[Tensor, "sequences pos"]
    held_out: Int[Tensor, "held_out pos"]
    manifest: dict[str, Any]
    notes: tuple[str, ...]
    counted: Bool[Tensor, "sequences pos"] | None = None
    held_out_counted: Bool[Tensor, "held_out pos"] | None = None
    held_out_lengths: Int[Tensor, " held_out"] | None = None


def training_data(
    texts: Any, tokenizer: Any, recipe: Recipe, d_vocab: int, validation: Any = None
) -> TrainingData:
    """`n_sequences` distinct sequences of exactly `sequence_length` tokens, and held-out ones.

    A text is cut to the length, or left out if it is shorter; with `pad_short` it is padded, and
    pads never count. With `packed`, all texts are joined, EOS after each, and cut into sequences,
    so that only what is left at the end is unused. A token then sees those of the text before it
    in its sequence, as in pretraining.
    BOS is prepended exactly where the tokenizer itself would. Files are read in their own order,
    as in Carlsson et al. 2025. Conversations, and prompts with completions, are cut to the length,
    too; shorter ones are padded, and the loss is on what the assistant says and on completions,
    unless `loss_on` says otherwise. Held-out sequences are the next `n_validation`, as there, or
    come from texts of their own by the same rules. No held-out sequence is also trained on.

    Args:
        texts: what `read_examples` takes, or a list of token id sequences.
        tokenizer: a Hugging Face tokenizer; may be None if token ids are given.
        recipe: how many sequences, how long, which, and whether to join texts.
        d_vocab: rows of the model's embedding, to find ids that it does not have.
        validation: texts to hold out; None takes those after the training sequences.

    Raises:
        TrainingError: if no text is long enough, or the ids do not fit the model.
        CorpusError: if the texts cannot be read.
    """
    n_train = recipe.n_sequences
    n_held_out = recipe.n_validation if recipe.record_every else 0
    if validation is not None and not n_held_out:
        raise TrainingError(
            "validation texts are for the record, and record_every is 0: set it to 1 or more, or "
            "leave them out"
        )
    is_shared = validation is None
    from_texts = _distinct(texts, tokenizer, recipe, n_train + (n_held_out if is_shared else 0))
    if not from_texts.sequences:
        raise TrainingError(_none_long_enough(recipe, from_texts.counts))
    train = from_texts.sequences[:n_train]
    if is_shared:
        held_out_rows, validation_manifest = from_texts.sequences[n_train:], None
    else:
        trained = {one.ids.tobytes() for one in train}
        others = _distinct(validation, tokenizer, recipe, n_held_out, trained)
        if not others.sequences:
            raise TrainingError(f"validation: {_none_left(recipe, others.counts)}")
        held_out_rows = others.sequences
        validation_manifest = others.counts | {"source": others.source}
    length = max(len(one.ids) for one in (*train, *held_out_rows))
    pad_id = _pad_id(tokenizer)
    tokens, held_out = (_stacked(rows, length, d_vocab, pad_id) for rows in (train, held_out_rows))
    counted, held_out_counted = (_masks(rows, length) for rows in (train, held_out_rows))
    if counted is not None:
        from_texts.counts["n_counted"] = int(counted[:, 1:].sum())
    manifest = from_texts.counts | {
        "n_sequences": len(tokens),
        "n_tokens": sum(len(one.ids) for one in train),
        "sequence_length": recipe.sequence_length,
        "packed": recipe.packed,
        "selection": recipe.selection,
        "bos_prepended": from_texts.bos,
        "sha256": _sha256(tokens, counted),
        "source": from_texts.source,
        "n_held_out": len(held_out),
        "held_out_sha256": _sha256(held_out, held_out_counted),
        "validation": validation_manifest,
    }
    return TrainingData(
        tokens=torch.from_numpy(tokens),
        held_out=torch.from_numpy(held_out),
        manifest=manifest,
        notes=_notes(manifest, recipe, n_held_out, has_eos=tokenizer is not None),
        counted=counted,
        held_out_counted=held_out_counted,
        held_out_lengths=None
        if held_out_counted is None
        else torch.tensor([len(one.ids) for one in held_out_rows], dtype=torch.long),
    )


class Row(NamedTuple):
    """One sequence: its ids, and which of them the loss is on; None for all."""

    ids: np.ndarray
    counted: np.ndarray | None


@dataclass(frozen=True)
class _Distinct:
    """Different sequences of the recipe's length, in the order in which they are used."""

    sequences: list[Row]
    counts: dict[str, int]
    bos: bool
    source: dict[str, Any]


def _distinct(
    texts: Any, tokenizer: Any, recipe: Recipe, limit: int, trained: Collection[bytes] = ()
) -> _Distinct:
    """Up to `limit` sequences that differ from each other and from those trained on.

    A random selection reads all texts and takes the first of them in random order.
    """
    is_ids = are_token_ids(texts)
    if not is_ids and tokenizer is None:
        raise TrainingError(
            "no tokenizer was found for this model: pass (model, tokenizer) instead of the model, "
            "or token ids instead of texts"
        )
    read = Texts([], {"kind": "token ids"}) if is_ids else read_examples(texts)
    start = [] if is_ids or not adds_bos(tokenizer) else [tokenizer.bos_token_id]
    counts = {"n_read": 0, "n_short": 0, "n_cut": 0, "n_duplicates": 0, "longest": 0}
    if recipe.packed:
        counts["n_left_over"] = 0
    if trained:
        counts["n_trained_on"] = 0
    sequences: dict[bytes, Row] = {}
    if isinstance(read, Conversations):
        rows = _of_examples(read, tokenizer, recipe, counts)
    else:
        pieces = _token_ids(texts) if is_ids else _tokenized(read, tokenizer)
        rows = (
            Row(ids, None if len(ids) == recipe.sequence_length else np.ones(len(ids), dtype=bool))
            for ids in _of_texts(pieces, start, tokenizer, recipe, counts)
        )
    for sequence in rows:
        key = sequence.ids.tobytes()
        if key in trained:
            counts["n_trained_on"] += 1
        elif key in sequences:
            counts["n_duplicates"] += 1
        else:
            sequences[key] = sequence
        if recipe.selection == "first" and len(sequences) == limit:
            break
    ordered = list(sequences.values())
    if recipe.selection == "random":
        ordered = [ordered[i] for i in random_order(len(ordered), recipe.seed)]
    return _Distinct(ordered[:limit], counts, bool(start), dict(read.source))


def random_order(n: int, seed: int) -> Int[np.ndarray, " n"]:
    """The numbers from 0 to n - 1 in an order that is the same on every machine.

    numpy may change its methods between versions, but promises that a bit generator's raw stream
    stays the same.

    >>> random_order(5, seed=0).tolist()
    [3, 2, 1, 0, 4]
    """
    return np.argsort(np.random.PCG64(seed).random_raw(n), kind="stable")


def _of_texts(
    pieces: Iterable[np.ndarray],
    start: list[int],
    tokenizer: Any,
    recipe: Recipe,
    counts: dict[str, int],
) -> Iterator[np.ndarray]:
    """Sequences of the recipe's length from tokenised texts."""
    pieces = _counted(pieces, counts)
    if recipe.packed:
        return _packed(pieces, start, _between(tokenizer), recipe.sequence_length, counts)
    if recipe.add_eos:
        eos = _eos(tokenizer)
        pieces = (ids if ids[-1:] == [eos] else np.append(ids, eos) for ids in pieces)
    return _cut(pieces, start, recipe, counts)


def _of_examples(
    read: Conversations, tokenizer: Any, recipe: Recipe, counts: dict[str, int]
) -> Iterator[Row]:
    """The beginning of every conversation or completion in which a token counts."""
    if recipe.packed:
        raise TrainingError(
            "packed joins texts, and conversations and completions stay apart: leave packed out"
        )
    length, counts["n_without_completion"] = recipe.sequence_length, 0
    for ids, counted in examples(read, tokenizer, recipe.loss_on):
        counts["n_read"] += 1
        counts["longest"] = max(counts["longest"], len(ids))
        counts["n_cut"] += len(ids) > length
        if recipe.add_eos and (eos := _eos(tokenizer)) not in ids[-1:]:
            ids, counted = np.append(ids, eos), np.append(counted, True)
        # The first token is never predicted.
        if counted[1:length].any():
            yield Row(ids[:length], counted[:length])
        else:
            counts["n_without_completion"] += 1


def _eos(tokenizer: Any) -> int:
    eos = getattr(tokenizer, "eos_token_id", None)
    if eos is None:
        raise TrainingError("add_eos needs a tokenizer with an EOS token: leave add_eos out")
    return int(eos)


def _cut(
    pieces: Iterable[np.ndarray], start: list[int], recipe: Recipe, counts: dict[str, int]
) -> Iterator[np.ndarray]:
    """The beginning of every text that is long enough: with `pad_short`, to predict a token of."""
    room = recipe.sequence_length - len(start)
    least = max(1, 2 - len(start)) if recipe.pad_short else room
    first = np.array(start, dtype=np.int64)
    for ids in pieces:
        counts["longest"] = max(counts["longest"], len(start) + len(ids))
        counts["n_short"] += len(ids) < room
        if len(ids) < least:
            continue
        counts["n_cut"] += len(ids) > room
        yield np.concatenate([first, ids[:room]])


def _packed(
    pieces: Iterable[np.ndarray],
    start: list[int],
    between: np.ndarray,
    length: int,
    counts: dict[str, int],
) -> Iterator[np.ndarray]:
    """All texts, one after another, in sequences of one length."""
    room = length - len(start)
    first = np.array(start, dtype=np.int64)
    waiting: list[np.ndarray] = []
    counts["n_left_over"] = 0
    for ids in pieces:
        waiting += [ids, between]
        counts["n_left_over"] += len(ids) + len(between)
        counts["longest"] += len(ids)
        if counts["n_left_over"] < room:
            continue
        joined = np.concatenate(waiting)
        whole = len(joined) // room * room
        waiting, counts["n_left_over"] = [joined[whole:]], len(joined) - whole
        for at in range(0, whole, room):
            yield np.concatenate([first, joined[at : at + room]])


def _between(tokenizer: Any) -> np.ndarray:
    """What stands after each of several joined texts: EOS, or a blank line where there is none."""
    if tokenizer is None:
        return np.empty(0, dtype=np.int64)
    if getattr(tokenizer, "eos_token_id", None) is not None:
        return np.array([tokenizer.eos_token_id], dtype=np.int64)
    return next(_tokenized([SEPARATOR], tokenizer))


def _tokenized(texts: Sequence[str], tokenizer: Any) -> Iterator[np.ndarray]:
    for first in range(0, len(texts), CHUNK):
        chunk = list(texts[first : first + CHUNK])
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


def _pad_id(tokenizer: Any) -> int:
    """Any id that the model has: pads are never seen."""
    known = (getattr(tokenizer, name, None) for name in ("pad_token_id", "eos_token_id"))
    return int(next((found for found in known if found is not None), 0))


def _masks(rows: Sequence[Row], length: int) -> Bool[Tensor, "n pos"] | None:
    """Which tokens count, pads never; None where all do."""
    if not any(one.counted is not None for one in rows):
        return None
    counted = np.zeros((len(rows), length), dtype=bool)
    for row, one in zip(counted, rows, strict=True):
        row[: len(one.ids)] = True if one.counted is None else one.counted
    return torch.from_numpy(counted)


def _stacked(
    rows: Sequence[Row], length: int, d_vocab: int, pad_id: int
) -> Int[np.ndarray, "n pos"]:
    if not rows:
        return np.empty((0, length), dtype=np.int64)
    tokens = np.full((len(rows), length), pad_id, dtype=np.int64)
    for row, one in zip(tokens, rows, strict=True):
        row[: len(one.ids)] = one.ids
    lowest, highest = int(tokens.min()), int(tokens.max())
    if lowest < 0 or highest >= d_vocab:
        raise TrainingError(
            f"token id {lowest if lowest < 0 else highest} is outside the model's vocabulary of "
            f"{d_vocab}: the tokenizer belongs to another model"
        )
    return tokens


def _sha256(tokens: Int[np.ndarray, "n pos"], counted: Bool[Tensor, "n pos"] | None = None) -> str:
    digest = hashlib.sha256(tokens.astype("<i8").tobytes())
    if counted is not None:
        digest.update(counted.numpy().tobytes())
    return digest.hexdigest()


def _none_left(recipe: Recipe, counts: dict[str, int]) -> str:
    if counts["n_trained_on"]:
        return (
            f"all {counts['n_trained_on']} sequences are also trained on: give texts that are not"
        )
    return _none_long_enough(recipe, counts)


def _none_long_enough(recipe: Recipe, counts: dict[str, int]) -> str:
    length, n, longest = recipe.sequence_length, counts["n_read"], counts["longest"]
    if "n_without_completion" in counts:
        return (
            f"in none of the {n} texts a completion, or what an assistant says, begins within "
            f"{length} tokens, the longest has {longest}: raise sequence_length, or set "
            'loss_on="all"'
        )
    if recipe.packed:
        return (
            f"the {n} texts have {longest} tokens in all, fewer than one sequence of {length}: "
            "give more text or lower sequence_length"
        )
    return (
        f"none of the {n} texts has {length} tokens, the longest has {longest}: lower "
        "sequence_length, or set packed=True to join consecutive texts, or pad_short=True"
    )


def _notes(
    manifest: dict[str, Any], recipe: Recipe, n_held_out: int, has_eos: bool
) -> tuple[str, ...]:
    """What was left out or is missing, in words."""
    notes = []
    n, held_out = manifest["n_sequences"], manifest["n_held_out"]
    if n < recipe.n_sequences:
        notes.append(f"only {n} of the {recipe.n_sequences} sequences asked for were found")
    validation = manifest["validation"]
    for of, counts in (("", manifest), ("validation: ", validation or {})):
        if counts.get("n_short"):
            done = "padded" if recipe.pad_short else "left out"
            notes.append(
                f"{of}{counts['n_short']:,} of {counts['n_read']:,} texts have fewer than "
                f"{recipe.sequence_length} tokens and were {done}"
            )
        if counts.get("n_without_completion"):
            notes.append(
                f"{of}in {counts['n_without_completion']:,} of {counts['n_read']:,} texts the loss "
                f"is on none of the first {recipe.sequence_length} tokens: they were left out"
            )
        if counts.get("n_duplicates"):
            notes.append(f"{of}{counts['n_duplicates']:,} duplicate sequences were left out")
        if counts.get("n_trained_on"):
            notes.append(
                f"{of}{counts['n_trained_on']:,} sequences are also trained on and were left out"
            )
    if recipe.packed and manifest["source"].get("kind") == "token ids" and not has_eos:
        notes.append("there is no tokenizer, so no EOS stands between the packed texts")
    if n_held_out and not held_out:
        notes.append(
            "no sequences are left to hold out, so there is no record of loss, ranks and quality: "
            "give validation texts or more text, or lower n_sequences"
        )
    elif held_out < n_held_out:
        notes.append(f"only {held_out} of {n_held_out} held-out sequences were found")
    return tuple(notes)
