"""Find the tokenizer that belongs to a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import LoadingError
from ..hub import first_line

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
