"""Read what a model is to answer: prompts with completions, and conversations."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

from ..errors import CorpusError, shortened
from .texts import (
    COLUMN,
    Texts,
    check_limit,
    is_hub_name,
    loaded,
    origin_of,
    read_texts,
    rows_of,
)

MESSAGES, PROMPT, COMPLETION = "messages", "prompt", "completion"


class Conversations(list[dict[str, Any]]):
    """Rows that are either all conversations or all prompts with completions.

    Args:
        rows: each has `messages`, a list of objects with `role` and `content`; or `prompt` and
            `completion`, two strings.
        source: where they came from, as JSON values.
    """

    def __init__(self, rows: Iterable[dict[str, Any]], source: Mapping[str, Any]) -> None:
        super().__init__(rows)
        self.source = source


def read_examples(
    source: Any, *, column: str | None = None, split: str = "train", limit: int | None = None
) -> Texts | Conversations:
    """Conversations, prompts with completions, or else texts as `read_texts` reads them.

    A table, dataset or list of objects holds conversations where it has a column "messages", and
    prompts with completions where it has "prompt" and "completion"; not where it has a column
    "text", or one is named.

    Args:
        source: what `read_texts` takes, or a list of objects.
        column, split, limit: as in `read_texts`.

    Raises:
        CorpusError: as `read_texts`, or if a row is not as the first one is.
    """
    check_limit(limit)
    if isinstance(source, Conversations):
        return source if limit is None else Conversations(source[:limit], source.source)
    # A hub dataset is loaded once, whatever it holds.
    opened = loaded(source, split, limit is not None)
    if column is None and _holds_examples(opened, split):
        rows = rows_of(opened, split, streaming=False) or ()
        found = Conversations(islice(_checked(rows), limit), {})
        found.source = origin_of(source, None, split, limit)
        return found
    texts = read_texts(opened, column=column, split=split, limit=limit)
    if opened is not source:
        texts.source = origin_of(source, column, split, limit)
    return texts


def _holds_examples(source: Any, split: str) -> bool:
    """Whether the first row is a conversation, or a prompt with its completion."""
    if is_hub_name(source):  # one that could not be loaded
        return False
    try:
        first = next(rows_of(source, split, streaming=False) or iter(()), None)
    except Exception:  # what cannot be read is told by whoever reads it next
        return False
    return isinstance(first, Mapping) and _is_example(first)


def _is_example(row: Mapping[str, Any]) -> bool:
    return COLUMN not in row and (MESSAGES in row or {PROMPT, COMPLETION} <= row.keys())


def _checked(rows: Iterable[Any]) -> Iterator[dict[str, Any]]:
    kind = ""
    for number, row in enumerate(rows, 1):
        if not isinstance(row, Mapping) or not _is_example(row):
            raise CorpusError(f"row {number} has neither {MESSAGES} nor {PROMPT} and {COMPLETION}")
        known = MESSAGES if MESSAGES in row else PROMPT
        if kind and known != kind:
            raise CorpusError(
                f"row {number} has {known}, and rows before it {kind}: split the file"
            )
        kind = known
        yield _messages(row, number) if kind == MESSAGES else _prompt(row, number)


def _messages(row: Mapping[str, Any], number: int) -> dict[str, Any]:
    messages = row[MESSAGES]
    # A column of parquet is an array.
    messages = messages.tolist() if hasattr(messages, "tolist") else messages
    if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
        raise CorpusError(
            f"row {number}: expected messages as a list of objects with role and content, got "
            f"{shortened(messages)}"
        )
    return {MESSAGES: [dict(message) for message in messages]}


def _is_message(message: Any) -> bool:
    return (
        isinstance(message, Mapping)
        and isinstance(message.get("role"), str)
        and isinstance(message.get("content"), str)
    )


def _prompt(row: Mapping[str, Any], number: int) -> dict[str, Any]:
    for name in (PROMPT, COMPLETION):
        if not isinstance(row[name], str):
            raise CorpusError(
                f"row {number}: expected a string as {name}, got {shortened(row[name])}"
            )
    return {PROMPT: row[PROMPT], COMPLETION: row[COMPLETION]}
