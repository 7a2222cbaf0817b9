"""Conversations and prompts with completions as token ids, and which of them the loss is on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from ..data.chat import (
    ChatTemplate,
    check_template,
    tag_completion,
    tag_conversation,
    template_text,
)
from ..data.conversations import COMPLETION, MESSAGES, PROMPT, Conversations
from ..data.corpus import adds_bos
from ..data.reading import ASSISTANT, EVERYTHING
from ..errors import TrainingError
from .recipes import LossOn


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
        CorpusError: if the tokenizer has no chat template, or the template does not take a
            conversation, or does not say where the assistant's turns begin and end.
        TrainingError: if the rows say which of their tokens are counted.
    """
    if rows.reading is not EVERYTHING:
        raise TrainingError(
            "the loss is on what loss_on says, in the tokenizer's own chat template: leave roles, "
            "tokens and chat_template out"
        )
    if rows.have_messages:
        yield from _conversations(rows, tokenizer, loss_on)
    else:
        yield from _completions(rows, tokenizer, loss_on)


def _completions(rows: Conversations, tokenizer: Any, loss_on: LossOn) -> Iterator[Example]:
    start = [tokenizer.bos_token_id] if adds_bos(tokenizer) else []
    for row in rows:
        ids, roles, _ = tag_completion(row[PROMPT], row[COMPLETION], tokenizer, start)
        yield Example(ids, (roles == ASSISTANT) | (loss_on == "all"))


def _conversations(rows: Conversations, tokenizer: Any, loss_on: LossOn) -> Iterator[Example]:
    text = template_text(tokenizer)
    check_template(tokenizer, text)
    template = ChatTemplate(tokenizer, str(text), "tuned")
    for number, row in enumerate(rows, 1):
        if loss_on == "all":
            ids = np.array(template.ids(template.render(row[MESSAGES], number)), dtype=np.int64)
            yield Example(ids, np.ones(len(ids), dtype=bool))
        else:
            ids, roles = tag_conversation(row[MESSAGES], template, number, exactly=True)
            yield Example(ids, roles == ASSISTANT)
