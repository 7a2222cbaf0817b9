"""Conversations as token ids, who speaks each of them, and where the assistant's last turn begins.

A chat template says nothing of who wrote what. It is asked with a mark in place of every content:
what stands between the marks is the template's, and what it puts around an answer, such as the
token that ends a turn, is found by asking it for the conversation up to that turn.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from ..errors import CorpusError, first_line
from .conversations import COMPLETION, MESSAGES, PROMPT
from .reading import ASSISTANT, SYSTEM, TEMPLATE, USER

Messages = Sequence[Mapping[str, Any]]

# How a chat template itself marks what the assistant says.
GENERATION = re.compile(r"{%-?\s*generation\s*-?%}")
# In place of a content: letters and digits, so that no template changes it.
MARK = "hyperlens{}mark"
MARKED = re.compile(r"hyperlens(\d+)mark")
NOWHERE = (-1, -1)
# All others, such as results of tools, are what the model is given to read, as the user's.
SPEAKERS = {"system": SYSTEM, "developer": SYSTEM, "assistant": ASSISTANT}
USERS = ("user", "tool", "function", "ipython")


class Turn(NamedTuple):
    """The assistant's last turn, to be generated anew.

    Attributes:
        prompt: the conversation before it, the template's generation prompt included.
        answer: the turn itself; empty where it is still to come, or the template writes another
            beginning before it.
    """

    prompt: Int[np.ndarray, " before"]
    answer: Int[np.ndarray, " after"]


class Tagged(NamedTuple):
    """A conversation as tokens.

    Attributes:
        ids: its tokens.
        roles: for each its place in `ROLES`.
        turn: where text is generated; None where nothing stands before the assistant's last turn.
    """

    ids: Int[np.ndarray, " pos"]
    roles: Int[np.ndarray, " pos"]
    turn: Turn | None


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template and the tokenizer that reads what it writes.

    Attributes:
        tokenizer: a fast Hugging Face tokenizer.
        text: the template.
        origin: "base" or "tuned" for the model's whose it is, "both" where they are the same,
            "given" for one that was passed.
    """

    tokenizer: Any
    text: str
    origin: str
    _skeletons: dict[tuple[str, ...], _Skeleton] = field(default_factory=dict, repr=False)

    @property
    def sha256(self) -> str:
        """Hash of the template."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    def render(self, messages: Messages, number: int, **options: Any) -> str:
        """A conversation as text.

        Raises:
            CorpusError: if the template refuses it.
        """
        try:
            text: str = self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, chat_template=self.text, **options
            )
        except Exception as error:  # templates raise what they like, jinja has errors of its own
            raise CorpusError(
                f"row {number}: the chat template refuses this conversation ({first_line(error)})"
            ) from error
        return text

    def ids(self, text: str) -> list[int]:
        """What the template has written as token ids: it writes BOS itself, or there is none."""
        encoded = self.tokenizer(text, add_special_tokens=False, verbose=False)
        return list(encoded["input_ids"])

    def skeleton(self, messages: Messages, number: int) -> _Skeleton:
        """What the template writes around contents; the same for the same roles in turn."""
        key = tuple(message["role"] for message in messages)
        if any(message.keys() - {"role", "content"} for message in messages):
            return _skeleton(self, messages, number)
        if key not in self._skeletons:
            self._skeletons[key] = _skeleton(self, messages, number)
        return self._skeletons[key]


def check_template(tokenizer: Any, text: Any, whose: str = "the") -> None:
    """Raise unless there is a template, and the tokenizer knows where tokens stand in a text.

    Args:
        tokenizer: of a model.
        text: the template.
        whose: "the base model's", where there are several.

    Raises:
        CorpusError: saying what is missing.
    """
    if tokenizer is None:
        raise CorpusError(
            "no tokenizer was found for either model: pass (model, tokenizer) instead of the model"
        )
    if not text or not str(text).strip():
        raise CorpusError(
            f"the texts are conversations and {whose} tokenizer has no chat template: set "
            "tokenizer.chat_template, or give prompt and completion columns"
        )
    if not getattr(tokenizer, "is_fast", False):
        raise CorpusError(
            f"conversations need a fast tokenizer, which knows where tokens stand in a text: load "
            f"{whose} tokenizer with use_fast=True"
        )


def template_text(tokenizer: Any) -> str | None:
    """A tokenizer's own chat template, the default one of several; None where it has none."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    try:
        text: str = tokenizer.get_chat_template()
    except Exception:  # of several none is the default
        return None
    return text


def tag_rows(
    rows: Sequence[Mapping[str, Any]],
    tokenizer: Any,
    template: ChatTemplate | None,
    start: list[int],
) -> list[Tagged]:
    """Every row of `Conversations` as tokens with their roles.

    Args:
        rows: conversations, or prompts with completions.
        tokenizer: reads prompts and completions.
        template: what writes conversations; None for prompts with completions.
        start: what stands in front of a prompt, BOS or nothing.

    Raises:
        CorpusError: if the template refuses a conversation, or hides where contents are.
    """
    if template is None:
        return [tag_completion(row[PROMPT], row[COMPLETION], tokenizer, start) for row in rows]
    found = []
    for number, row in enumerate(rows, 1):
        messages = row[MESSAGES]
        ids, roles = tag_conversation(messages, template, number)
        found.append(Tagged(ids, roles, _last_turn(messages, template, number, ids)))
    if all(bool((one.roles == TEMPLATE).all()) for one in found):
        raise CorpusError(
            "the chat template writes nothing of what is said in any conversation: give another "
            "one (chat_template)"
        )
    return found


def speaker_notes(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Says what speakers are taken for the user who may be none."""
    roles = {message["role"] for row in rows for message in row.get(MESSAGES, ())}
    others = sorted(roles - SPEAKERS.keys() - set(USERS))
    if not others:
        return []
    return [
        f"what {', '.join(map(repr, others))} say counts as the user's: known roles are system, "
        "user, assistant and tool"
    ]


def tag_completion(prompt: str, completion: str, tokenizer: Any, start: list[int]) -> Tagged:
    """A prompt, the user's, and its completion, the assistant's, tokenised by themselves."""
    before, after = (
        list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        for text in (prompt, completion)
    )
    # A prompt that a chat template has made begins with BOS already.
    before = before if before[:1] == start else [*start, *before]
    ids = np.array([*before, *after], dtype=np.int64)
    roles = np.full(len(ids), ASSISTANT, dtype=np.int8)
    roles[: len(before)] = USER
    roles[: len(start)] = TEMPLATE
    return Tagged(ids, roles, Turn(ids[: len(before)], ids[len(before) :]) if before else None)


def tag_conversation(
    messages: Messages, template: ChatTemplate, number: int, *, exactly: bool = False
) -> tuple[Int[np.ndarray, " pos"], Int[np.ndarray, " pos"]]:
    """The ids of `apply_chat_template(messages, tokenize=True)`, and the role of each.

    A token is the system's or the user's where it has some of a content of theirs and nothing else
    but white space around it. It is the assistant's where all of it stands in what the assistant
    has to write, the token that ends the turn included. All others are the template's.

    Args:
        messages: objects with role and content.
        template: what writes them.
        number: of the row, for errors.
        exactly: raise where it cannot be told what the assistant has to write. Otherwise its
            contents alone are its own there.

    Raises:
        CorpusError: if the template refuses the conversation, or contents are not found in it.
    """
    text = template.render(messages, number)
    encoded = template.tokenizer(
        text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
    )
    ids = np.array(encoded["input_ids"], dtype=np.int64)
    offsets = np.array(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2)
    roles = np.full(len(ids), TEMPLATE, dtype=np.int8)
    is_marked = GENERATION.search(template.text) is not None
    for span in _spans(messages, template, number, text, exactly and not is_marked):
        if not (is_marked and span.role == ASSISTANT):
            roles[_inside(span, text, offsets)] = span.role
    if is_marked:
        marked = template.tokenizer.apply_chat_template(
            list(messages),
            chat_template=template.text,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        roles[np.array(marked["assistant_masks"], dtype=bool)] = ASSISTANT
    return ids, roles


class Span(NamedTuple):
    """What one message has in a rendered conversation, from a character to another."""

    role: int
    start: int
    end: int


def _inside(span: Span, text: str, offsets: Int[np.ndarray, "pos 2"]) -> Bool[np.ndarray, " pos"]:
    """Which tokens belong to a span."""
    first, last = offsets[:, 0], offsets[:, 1]
    start, end = span.start, span.end
    if span.role != ASSISTANT:  # " hi" after "[INST]" is the user's
        while start and text[start - 1].isspace():
            start -= 1
        end += len(text[end:]) - len(text[end:].lstrip())
    overlaps = (first < span.end) & (last > span.start)
    return overlaps & (first >= start) & (last <= end) & (last > first)


def _spans(
    messages: Messages, template: ChatTemplate, number: int, text: str, exactly: bool
) -> Iterator[Span]:
    """Where each message stands in a text; nothing of those that the template leaves out."""
    skeleton = template.skeleton(messages, number)
    places = _places(skeleton, messages, text)
    if places is None:
        raise CorpusError(
            f"row {number}: the chat template changes what is said, so that its tokens have no "
            "roles: give another one (chat_template)"
        )
    if exactly and not (skeleton.is_exact and _are_whole(places, messages, text)):
        raise CorpusError(
            f"row {number}: the chat template writes the assistant's turns otherwise than it "
            "asks for them, or once others follow, so that they cannot be told from the rest: "
            'mark them in the template with {% generation %}, or set loss_on="all"'
        )
    for (message, (start, end)), (before, after) in zip(places, skeleton.around, strict=True):
        role = SPEAKERS.get(messages[message]["role"], USER)
        yield Span(role, start - before, end + after)


def _are_whole(
    places: Sequence[tuple[int, tuple[int, int]]], messages: Messages, text: str
) -> bool:
    """Whether all that the assistant said is in the text, but for white space at its ends."""
    return all(
        text[start:end].strip() == messages[message]["content"].strip()
        for message, (start, end) in places
        if messages[message]["role"] == "assistant"
    )


def _places(
    skeleton: _Skeleton, messages: Messages, text: str
) -> list[tuple[int, tuple[int, int]]] | None:
    """Number of each message that is in the text, and where its content begins and ends.

    What the template writes around contents is known, and so are contents, but for white space at
    their ends or what else it may leave out.
    """
    if not text.startswith(skeleton.literals[0]):
        return None
    at, places = len(skeleton.literals[0]), []
    for i, message in enumerate(skeleton.order):
        literal, is_last = skeleton.literals[i + 1], i == len(skeleton.order) - 1
        end = _content_end(messages[message]["content"], text, at, literal, is_last)
        if end is None:
            return None
        places.append((message, (at, end)))
        at = end + len(literal)
    return places if at == len(text) else None


def _content_end(content: str, text: str, at: int, literal: str, is_last: bool) -> int | None:
    for written in dict.fromkeys((content, content.strip(), content.rstrip(), content.lstrip())):
        end = at + len(written)
        follows = text.startswith(literal, end) and not (is_last and end + len(literal) < len(text))
        if text.startswith(written, at) and follows:
            return end
    if is_last:
        end = len(text) - len(literal)
        return end if end >= at and text.endswith(literal) else None
    end = text.find(literal, at) if literal else -1
    return end if end >= 0 else None


class _Skeleton(NamedTuple):
    """What a template writes around contents.

    Attributes:
        literals: before the first content, between two, and after the last.
        order: number of the message of each content, in the order in which they are written.
        around: for each content how many characters before and after it are of the same speaker.
        is_exact: whether all that the assistant has to write could be told.
    """

    literals: tuple[str, ...]
    order: tuple[int, ...]
    around: tuple[tuple[int, int], ...]
    is_exact: bool


def _skeleton(template: ChatTemplate, messages: Messages, number: int) -> _Skeleton:
    marked = [{**m, "content": MARK.format(i)} for i, m in enumerate(messages)]
    text = template.render(marked, number)
    pieces = MARKED.split(text)
    order = tuple(map(int, pieces[1::2]))
    ends = [0, *(end for one in MARKED.finditer(text) for end in one.span()), len(text)]
    around, is_exact = [], True
    for i, message in enumerate(order):
        is_assistant = messages[message]["role"] == "assistant"
        start, end = ends[2 * i + 1 : 2 * i + 3]
        turn = _turn(template, marked, message, number, text) if is_assistant else (start, end)
        # It reaches into what the template writes before and after this very content, no further.
        near = ends[2 * i] <= turn[0] <= start and end <= turn[1] <= ends[2 * i + 3]
        if not near:
            turn, is_exact = (start, end), False
        around.append((start - turn[0], turn[1] - end))
    spoken = {i for i, message in enumerate(messages) if message["role"] == "assistant"}
    return _Skeleton(tuple(pieces[::2]), order, tuple(around), is_exact and spoken <= set(order))


def _turn(
    template: ChatTemplate, marked: Messages, message: int, number: int, text: str
) -> tuple[int, int]:
    """What the assistant has to write: after the generation prompt, to the end of its turn.

    White space after it is the template's. Nowhere (-1, -1) where it cannot be told.
    """
    try:
        before = template.render(marked[:message], number, add_generation_prompt=True)
        until = template.render(marked[: message + 1], number).rstrip()
    except CorpusError:  # some take no conversation that begins with the assistant, or ends so
        return NOWHERE
    if not (text.startswith(until) and until.startswith(before)):
        return NOWHERE
    return len(before), len(until)


def _last_turn(
    messages: Messages, template: ChatTemplate, number: int, ids: Int[np.ndarray, " pos"]
) -> Turn | None:
    """The assistant's turn at the end, or one that is still to come."""
    is_there = messages[-1]["role"] == "assistant"
    before = messages[:-1] if is_there else messages
    if not before:
        return None
    text = template.render(before, number, add_generation_prompt=True)
    prompt = np.array(template.ids(text), dtype=np.int64)
    follows = is_there and np.array_equal(ids[: len(prompt)], prompt)
    return Turn(prompt, ids[len(prompt) :] if follows else ids[:0]) if len(prompt) else None
