"""How texts are read: which chat template writes conversations, and which tokens are counted."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from ..checks import is_list
from ..errors import CorpusError, first_line, shortened

# What writes each token of a conversation; the number of a role is its place here.
ROLES = ("template", "system", "user", "assistant")
TEMPLATE, SYSTEM, USER, ASSISTANT = range(len(ROLES))

# Chat templates that models bring along.
OWN = ("base", "tuned")

Tokens = Callable[..., Any] | Sequence[Any]
"""Which tokens of each text are counted: a function of its ids and positions, both
`Int[Tensor, " pos"]`, that returns one truth value for each; or these values, text by text."""


@dataclass(frozen=True, eq=False)
class Reading:
    """How conversations become tokens, and which tokens statistics are taken over.

    Attributes:
        chat_template: "base" or "tuned" for that model's; or the text of one. None takes the one
            that there is.
        roles: some of `ROLES`; None counts the tokens of all.
        tokens: see `Tokens`; None counts all.
    """

    chat_template: str | None = None
    roles: tuple[str, ...] | None = None
    tokens: Tokens | None = None

    def over(self, other: Reading) -> Reading:
        """This, and what the other one says where this one says nothing."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        said = {name: value for name, value in named.items() if value is not None}
        return replace(other, **said) if said else other

    def __getitem__(self, at: slice) -> Reading:
        """Of some of the texts."""
        rows = self.tokens
        if rows is None or callable(rows):
            return self
        return replace(self, tokens=rows[at])

    def describe(self) -> dict[str, Any]:
        """What decides numbers beside the texts themselves, as JSON values."""
        template = self.chat_template
        if template is not None and template not in OWN:
            template = hashlib.sha256(template.encode()).hexdigest()
        named = {
            "chat_template": template,
            "roles": None if self.roles is None else list(self.roles),
            "tokens": None if self.tokens is None else describe_tokens(self.tokens),
        }
        return {name: value for name, value in named.items() if value is not None}


EVERYTHING = Reading()


def read_as(
    chat_template: str | Path | None = None, roles: Any = None, tokens: Any = None
) -> Reading:
    """A checked `Reading`; of a template's file, its text.

    Raises:
        CorpusError: if there is no such template or role, or tokens are neither mask nor function.
    """
    if tokens is not None and not callable(tokens) and not is_list(tokens):
        raise CorpusError(
            "tokens must be a function of (ids, positions), or one sequence of truth values for "
            f"each text; got {shortened(tokens)}"
        )
    rows = tokens if tokens is None or callable(tokens) else tuple(tokens)
    template = None if chat_template is None else _template(chat_template)
    return Reading(template, checked_roles(roles), rows).over(EVERYTHING)


def _template(choice: str | Path) -> str:
    """ "base", "tuned", or the text of a template that was passed as text or as a file."""
    if isinstance(choice, str) and (choice in OWN or "{{" in choice or "{%" in choice):
        return choice
    try:
        return Path(choice).expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError, RuntimeError) as error:
        raise CorpusError(
            f'chat_template must be "base", "tuned", a template or the file it is in; cannot read '
            f"{shortened(str(choice))} ({first_line(error)})"
        ) from None


def checked_roles(roles: Any) -> tuple[str, ...] | None:
    """Names of roles in the order of `ROLES`; None for None.

    Raises:
        CorpusError: if there are none, or others.

    >>> checked_roles(["user", "assistant"])
    ('user', 'assistant')
    """
    if roles is None:
        return None
    given = list(roles) if is_list(roles) else []
    if not given or not all(role in ROLES for role in given):
        raise CorpusError(f"roles must be some of {ROLES}, as in ['assistant']; got {roles!r}")
    return tuple(role for role in ROLES if role in given)


def describe_tokens(tokens: Tokens) -> str:
    """A function's name and a hash of what it does, or the hash of a mask."""
    if callable(tokens):
        name = str(getattr(tokens, "__qualname__", type(tokens).__name__))
        return f"{name} {hashlib.sha256(_code(tokens)).hexdigest()[:16]}"
    import numpy as np  # not at the top: commands that only read texts answer at once

    digest = hashlib.sha256()
    for row in tokens:
        values = np.asarray(row.cpu() if hasattr(row, "cpu") else row, dtype=bool)
        digest.update(len(values).to_bytes(8, "little") + np.packbits(values).tobytes())
    return f"mask {digest.hexdigest()[:16]}"


def _code(function: Callable[..., Any]) -> bytes:
    """What tells a function from another of its name: its code and what that refers to."""
    code = getattr(function, "__code__", None)
    if code is None:
        return repr(function).encode()
    enclosed = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    named = (code.co_consts, code.co_names, getattr(function, "__defaults__", None), enclosed)
    return bytes(code.co_code) + repr(named).encode()
