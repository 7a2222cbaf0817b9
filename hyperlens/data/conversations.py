"""Read what a model is to answer: prompts with completions, and conversations."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from ..checks import check_types
from ..errors import CorpusError, shortened
from .reading import EVERYTHING, Reading, read_as
from .texts import (
    COLUMN,
    Texts,
    check_limit,
    encodable,
    grouped,
    is_hub_name,
    loaded,
    origin_of,
    read_texts,
    rows_of,
)

MESSAGES, PROMPT, COMPLETION = "messages", "prompt", "completion"
# As in ShareGPT, and what its speakers are called elsewhere.
SHAREGPT, FROM, VALUE = "conversations", "from", "value"
SPEAKERS = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "ai": "assistant",
}


class Conversations(list[dict[str, Any]]):
    """Rows that are either all conversations or all prompts with completions.

    Args:
        rows: each has `messages`, a list of objects with `role` and `content`; or `prompt` and
            `completion`, two strings.
        source: where they came from, as JSON values.
        groups: as those of `Texts`.
        reading: how they are written as text, and which of their tokens are counted.
    """

    def __init__(
        self,
        rows: Iterable[dict[str, Any]],
        source: Mapping[str, Any],
        groups: Sequence[Hashable] | None = None,
        reading: Reading = EVERYTHING,
    ) -> None:
        super().__init__(rows)
        self.source = source
        self.groups = None if groups is None else tuple(groups)
        self.reading = reading

    @property
    def have_messages(self) -> bool:
        """Whether they are conversations, which a chat template writes."""
        return bool(self) and MESSAGES in self[0]

    def __getitem__(self, at: Any) -> Any:
        """One row, or a slice of them that keeps what belongs to them."""
        rows = super().__getitem__(at)
        if not isinstance(at, slice):
            return rows
        groups = None if self.groups is None else self.groups[at]
        return Conversations(rows, self.source, groups, self.reading[at])

    def strings(self, n: int) -> list[str]:
        """What is said in the first n rows."""
        return [
            text
            for row in self[:n]
            for text in (
                [message["content"] for message in row[MESSAGES]]
                if MESSAGES in row
                else [row[PROMPT], row[COMPLETION]]
            )
        ]


@check_types
def read_examples(
    source: Any,
    *,
    column: str | None = None,
    split: str = "train",
    limit: int | None = None,
    groups: str | int | Sequence[Hashable] | None = None,
    chat_template: str | Path | None = None,
    roles: Sequence[str] | None = None,
    tokens: Any = None,
) -> Texts | Conversations:
    """Conversations, prompts with completions, or else texts as `read_texts` reads them.

    A table, dataset or list of objects holds conversations where it has a column "messages" or
    "conversations", and prompts with completions where it has "prompt" and "completion"; not where
    it has a column "text", or one is named. Messages are objects with `role` and `content`, or with
    `from` and `value` (human, gpt, system), as in ShareGPT.

    Args:
        source: what `read_texts` takes, or a list of objects.
        column, split, limit, groups: as in `read_texts`.
        chat_template: what writes conversations as text, for both models: "base" or "tuned" for
            that model's; or a template, or the file it is in. None takes the one that the two
            have, and raises an error where they have two.
        roles: take statistics over the tokens of these alone: some of "system", "user",
            "assistant" and "template". None takes all.
        tokens: take statistics over these alone: a function of a text's token ids and positions
            (two tensors) that returns a truth value for each; or these values, one sequence per
            text.

    Raises:
        CorpusError: as `read_texts`, if a row is not as the first one is, or there are no such
            roles.

    >>> talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    >>> rows = read_examples([{"messages": talk}], roles=["assistant"])
    >>> len(rows), rows.reading.roles
    (1, ('assistant',))
    """
    check_limit(limit)
    asked = read_as(chat_template, roles, tokens)
    if isinstance(source, Conversations):
        return _read_again(source, limit, groups, split, asked)
    # A hub dataset is loaded once, whatever it holds.
    opened = loaded(source, split, limit is not None)
    if column is None and _holds_examples(opened, split):
        rows = rows_of(opened, split, streaming=False) or ()
        found = Conversations(islice(_checked(rows), limit), {}, reading=asked)
        found.source = origin_of(source, None, split, limit)
        return grouped(found, opened, groups, split, limit)
    texts = read_texts(opened, column=column, split=split, limit=limit, groups=groups)
    if opened is not source:
        texts.source = origin_of(source, column, split, limit)
    texts.reading = asked.over(texts.reading)
    return texts


def read_whole(source: Any) -> Texts | Conversations:
    """What `read_examples` reads, with the tokens of all roles, chosen or not."""
    found = read_examples(source)
    if found.reading is EVERYTHING:
        return found
    whole: Texts | Conversations = found[:]
    whole.reading = replace(found.reading, roles=None, tokens=None).over(EVERYTHING)
    return whole


def _read_again(
    source: Conversations,
    limit: int | None,
    groups: str | int | Sequence[Hashable] | None,
    split: str,
    asked: Reading,
) -> Conversations:
    """Conversations that were read before, with what is asked for now."""
    reading = asked.over(source.reading)
    if limit is groups is None and reading is source.reading:
        return source
    found: Conversations = source[:limit]
    found.reading = reading[:limit]
    return found if groups is None else grouped(found, source, groups, split, limit)


def _holds_examples(source: Any, split: str) -> bool:
    """Whether the first row is a conversation, or a prompt with its completion."""
    if is_hub_name(source):  # one that could not be loaded
        return False
    try:
        first = next(rows_of(source, split, streaming=False) or iter(()), None)
    except Exception:  # what cannot be read is told by whoever reads it next
        return False
    return isinstance(first, Mapping) and _kind(first) is not None


def _kind(row: Mapping[str, Any]) -> str | None:
    """The column that a row is read from; None for one that is no example."""
    if COLUMN in row:
        return None
    for name in (MESSAGES, SHAREGPT):
        if name in row:
            return name
    return PROMPT if {PROMPT, COMPLETION} <= row.keys() else None


def _checked(rows: Iterable[Any]) -> Iterator[dict[str, Any]]:
    before = ""
    for number, row in enumerate(rows, 1):
        kind = _kind(row) if isinstance(row, Mapping) else None
        if kind is None:
            raise CorpusError(f"row {number} has neither {MESSAGES} nor {PROMPT} and {COMPLETION}")
        if before and kind != before:
            raise CorpusError(
                f"row {number} has {kind}, and rows before it {before}: split the file"
            )
        before = kind
        yield _prompt(row, number) if kind == PROMPT else _messages(row[kind], number)


def _messages(messages: Any, number: int) -> dict[str, Any]:
    # A column of parquet is an array.
    messages = messages.tolist() if hasattr(messages, "tolist") else messages
    read = [_message(one) for one in messages] if isinstance(messages, list) else []
    if not read or not all(map(_is_message, read)):
        raise CorpusError(
            f"row {number}: expected messages as a list of objects with role and content, got "
            f"{shortened(messages)}"
        )
    for message in read:
        encodable(message["content"], f"row {number}")
    return {MESSAGES: read}


def _message(message: Any) -> Any:
    """A message with role and content, also where it has `from` and `value`."""
    if not isinstance(message, Mapping):
        return message
    if FROM not in message or VALUE not in message:
        return dict(message)
    others = {name: value for name, value in message.items() if name not in (FROM, VALUE)}
    speaker = message[FROM]
    role = SPEAKERS.get(speaker, speaker) if isinstance(speaker, str) else speaker
    return {"role": role, "content": message[VALUE], **others}


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
        encodable(row[name], f"row {number}")
    return {PROMPT: row[PROMPT], COMPLETION: row[COMPLETION]}
