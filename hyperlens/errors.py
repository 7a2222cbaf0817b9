"""One exception family: every error a user can cause is a `HyperlensError`.

A message is one line and names what was expected, what came, and what to do.
"""

from __future__ import annotations

import reprlib
from typing import Any


class HyperlensError(Exception):
    """Base of every error raised on purpose by hyperlens.

    `str` of it is one line, also where it quotes a longer message of another library.
    """

    def __str__(self) -> str:
        lines = (line.strip() for line in super().__str__().splitlines())
        joined = " ".join(line for line in lines if line)
        # Half a character, as in a name that is none, could not be printed.
        return joined.encode("utf-8", "backslashreplace").decode("utf-8")


class ArgumentError(HyperlensError, TypeError):
    """An argument is of another type than the function takes."""


class LoadingError(HyperlensError):
    """A model source cannot be opened: missing, incomplete, unsafe, or of the wrong kind."""


class ParityError(HyperlensError):
    """A hooked model does not reproduce the plain model it was made from."""


class PairError(HyperlensError):
    """Two models cannot be compared: different depth, width, vocabulary, tokenizer or kind."""


class CorpusError(HyperlensError):
    """Texts cannot be read or leave nothing to measure."""


class ActivationError(HyperlensError):
    """A model produced NaN or infinite activations."""


class ProbeError(HyperlensError):
    """A probe failed, or was asked for something it cannot do."""


class ResultsError(HyperlensError):
    """A result folder cannot be written or read."""


class ExpectationError(HyperlensError):
    """Bounds for a comparison cannot be read, or name what does not exist or was not measured."""


class ResourceError(HyperlensError):
    """The work does not fit in memory or on disk; raised before it starts where that is known."""


class TrainingError(HyperlensError):
    """Training cannot start or cannot go on."""


class PatchError(HyperlensError):
    """Activations or weights cannot be put where they were asked to go."""


class DecodingError(HyperlensError):
    """Text cannot be generated with these settings."""


class JudgeError(HyperlensError):
    """A judge cannot be asked, or does not answer."""


def first_line(error: BaseException) -> str:
    """The first line of another library's message, or the error's class where it says nothing.

    >>> first_line(ValueError("no such file\\nTraceback ..."))
    'no such file'
    >>> first_line(KeyError())
    'KeyError'
    """
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].strip()[:300]


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 60


def shortened(value: Any) -> str:
    """A value as it stands in a message: what is long is cut, what has no text is its type.

    >>> len(shortened("once " * 100))
    60
    >>> shortened(10**5000)
    'an object of int'
    """
    try:
        return _SHORT.repr(value)
    except Exception:  # such as that of an int of more than 4,300 digits
        return f"an object of {type(value).__name__}"
