"""One exception family: every error a user can cause is a `HyperlensError`.

A message is one line and names what was expected, what came, and what to do.
"""

from __future__ import annotations


class HyperlensError(Exception):
    """Base of every error raised on purpose by hyperlens.

    A message is shown on one line whatever other library's words it quotes.
    """

    def __str__(self) -> str:
        lines = (line.strip() for line in super().__str__().splitlines())
        return " ".join(line for line in lines if line)


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


class ResourceError(HyperlensError):
    """The work would not fit in memory or on disk; said before it starts."""


class TrainingError(HyperlensError):
    """Training cannot start or cannot go on."""


class PatchError(HyperlensError):
    """Activations or weights cannot be put where they were asked to go."""


class DecodingError(HyperlensError):
    """Text cannot be written with these settings."""


class JudgeError(HyperlensError):
    """A judge cannot be asked, or does not answer."""
