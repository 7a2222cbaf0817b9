"""Find the tokenizer that belongs to a model, and show its tokens as text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import LoadingError, first_line
from .kinds import plain_model

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


def read_tokenizer(name: str, *, local: bool) -> Any:
    """The tokenizer of a folder (`local`) or hub id; None for a folder that has none.

    Raises:
        LoadingError: if there is one and it cannot be read.
    """
    from transformers import AutoTokenizer

    if local and not any((Path(name) / file).exists() for file in TOKENIZER_FILES):
        return None
    try:
        return AutoTokenizer.from_pretrained(name, local_files_only=local, trust_remote_code=False)
    except Exception as error:
        raise LoadingError(
            f"cannot read the tokenizer of {name} ({first_line(error)}): save it there again, or "
            "pass (model, tokenizer)"
        ) from error


def tokenizer_of_object(name: str) -> Any:
    """The tokenizer of a model object's name: from a folder or the local cache, else None."""
    if not name:
        return None
    if Path(name).is_dir():
        return read_tokenizer(name, local=True)
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, local_files_only=True, trust_remote_code=False)
    except Exception:
        return None


def special_ids(model: Any, tokenizer: Any, d_vocab: int) -> set[int]:
    """Ids that are no words: the tokenizer's special tokens, and those of the configuration.

    Args:
        model: a Hugging Face or PEFT model.
        tokenizer: None for none.
        d_vocab: number of logits. Ids below it that the tokenizer lacks pad the vocabulary to a
            round number, and stand for no token.
    """
    special: set[int] = set()
    for holder in (plain_model(model).config, getattr(model, "generation_config", None)):
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(holder, name, None)
            special |= set(value if isinstance(value, list | tuple) else [value]) - {None}
    if tokenizer is not None:
        special |= set(tokenizer.all_special_ids)
        special |= set(range(d_vocab)) - set(tokenizer.get_vocab().values())
    return special


def token_names(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Tokens as text, for tables and figures.

    A token that is only part of a character is shown by the tokenizer's own name for it. Without a
    tokenizer the ids are shown.

    >>> token_names(None, [3, 14])
    ['3', '14']
    """
    if tokenizer is None:
        return [str(i) for i in ids]
    return [piece if "\ufffd" in text else text for text, piece in _decoded(tokenizer, ids)]


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Tokens as text, for telling words apart: part of a character is "\ufffd" here.

    The tokenizer's own name of such a token may look like a word.
    """
    if tokenizer is None:
        return [str(i) for i in ids]
    return [text for text, _ in _decoded(tokenizer, ids)]


def _decoded(tokenizer: Any, ids: Sequence[int]) -> Iterator[tuple[str, str]]:
    """Each token's text, and the tokenizer's own name for it."""
    pieces = [str(piece) for piece in tokenizer.convert_ids_to_tokens(list(ids))]
    for i, piece in zip(ids, pieces, strict=True):
        text = str(tokenizer.decode([i]))
        # Decoded alone, a SentencePiece token loses the space that begins its word.
        lost = piece.startswith("▁") and not text.startswith(" ")
        yield (f" {text}" if lost else text), piece
