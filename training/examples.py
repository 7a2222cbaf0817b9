"""Conversations and prompts with completions as token ids, and which of them the loss is on."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from ..data.conversations import COMPLETION, MESSAGES, PROMPT, Conversations
from ..data.corpus import adds_bos
from ..errors import TrainingError, first_line
from .recipes import LossOn

ASSISTANT = "assistant"
# How a chat template marks what the assistant says.
GENERATION = re.compile(r"{%-?\s*generation\s*-?%}")


class Example(NamedTuple):
    """One text to train on.

    Attributes:
        ids: its tokens, BOS included where the tokenizer or the template puts it.
        counted: whether the loss is on each of them.
    """

    ids: Int[np.ndarray, " pos"]
    counted: Bool[np.ndarray, " pos"]


def examples(rows: Conversations, tokenizer: Any, loss_on: LossOn) -> Iterator[Example]:
    """Every row as token ids, counted where the assistant speaks or the completion stands.

    A conversation has the ids of `apply_chat_template(messages, tokenize=True)`. A completion
    follows its prompt as a model would write it: both are tokenised by themselves, BOS in front
    where the tokenizer itself puts it.

    Args:
        rows: conversations, or prompts with completions.
        tokenizer: a Hugging Face tokenizer.
        loss_on: "all" counts every token.

    Raises:
        TrainingError: if the tokenizer has no chat template, or the template does not take a
            conversation, or does not say where the assistant's turns begin and end.
    """
    if rows and MESSAGES in rows[0]:
        _check_template(tokenizer)
    for number, row in enumerate(rows, 1):
        if MESSAGES in row:
            one = _conversation(row[MESSAGES], tokenizer, number, loss_on)
        else:
            one = _completion(row[PROMPT], row[COMPLETION], tokenizer)
        yield one if loss_on == "completions" else Example(one.ids, np.ones_like(one.counted))


def _completion(prompt: str, completion: str, tokenizer: Any) -> Example:
    start = [tokenizer.bos_token_id] if adds_bos(tokenizer) else []
    before, after = (
        list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        for text in (prompt, completion)
    )
    # A prompt that a chat template has made begins with BOS already.
    before = before if before[:1] == start else [*start, *before]
    ids = np.array([*before, *after], dtype=np.int64)
    return Example(ids, np.arange(len(ids)) >= len(before))


def _check_template(tokenizer: Any) -> None:
    if not getattr(tokenizer, "chat_template", None):
        raise TrainingError(
            "the texts are conversations and the tokenizer has no chat template: set "
            "tokenizer.chat_template, or give prompt and completion columns"
        )
    if not getattr(tokenizer, "is_fast", False):
        raise TrainingError(
            "conversations need a fast tokenizer, which knows where tokens stand in a text: load "
            "it with use_fast=True"
        )


def _conversation(
    messages: Sequence[Mapping[str, str]], tokenizer: Any, number: int, loss_on: LossOn
) -> Example:
    text = _rendered(messages, tokenizer, number)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids = np.array(encoded["input_ids"], dtype=np.int64)
    template = tokenizer.get_chat_template()
    if GENERATION.search(template):
        marked = tokenizer.apply_chat_template(
            list(messages), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        return Example(ids, np.array(marked["assistant_masks"], dtype=bool))
    first = np.array([start for start, _ in encoded["offset_mapping"]])
    last = np.array([end for _, end in encoded["offset_mapping"]])
    counted = np.zeros(len(ids), dtype=bool)
    turns = _turns(messages, text, tokenizer, number) if loss_on == "completions" else ()
    for start, end in turns:
        counted |= (first >= start) & (last <= end) & (last > first)
    return Example(ids, counted)


def _turns(
    messages: Sequence[Mapping[str, str]], text: str, tokenizer: Any, number: int
) -> Iterator[tuple[int, int]]:
    """Where in a rendered conversation the assistant speaks, end-of-turn tokens included.

    From the end of what comes before, with the prompt to answer, to the end of the answer. White
    space after it is the template's.
    """
    for i, message in enumerate(messages):
        if message["role"] != ASSISTANT:
            continue
        before = _rendered(messages[:i], tokenizer, number, add_generation_prompt=True)
        until = _rendered(messages[: i + 1], tokenizer, number).rstrip()
        if not (text.startswith(until) and until.startswith(before)):
            raise TrainingError(
                f"row {number}: the chat template writes the assistant's turns otherwise than it "
                "asks for them, or once others follow, so that they cannot be told from the rest: "
                'mark them in the template with {% generation %}, or set loss_on="all"'
            )
        yield len(before), len(until)


def _rendered(
    messages: Sequence[Mapping[str, str]], tokenizer: Any, number: int, **options: Any
) -> str:
    try:
        text: str = tokenizer.apply_chat_template(list(messages), tokenize=False, **options)
    except Exception as error:  # templates raise what they like, and jinja has errors of its own
        raise TrainingError(
            f"row {number}: the chat template refuses this conversation ({first_line(error)})"
        ) from error
    return text
