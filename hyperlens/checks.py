"""Validation of arguments that many functions take: counts, positive numbers, seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from .errors import CorpusError, DecodingError, HyperlensError

# Torch takes 64 bits, and some experiments count on from the seed.
LARGEST_SEED = 2**63 - 1


def check_whole(
    name: str, value: Any, least: int, error: type[HyperlensError] = DecodingError
) -> None:
    """Raise unless a setting is an int of at least `least` (a bool is not).

    >>> check_whole("window", 1, 2)
    Traceback (most recent call last):
    hyperlens.errors.DecodingError: window must be at least 2 (a whole number), got 1

    Raises:
        HyperlensError: `error`, naming the setting.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise error(f"{name} must be at least {least} (a whole number), got {value}")


def check_counts(least: int = 1, /, **counts: Any) -> None:
    """Raise unless every argument is an int of at least `least`.

    Raises:
        CorpusError: naming the argument.
    """
    for name, value in counts.items():
        check_whole(name, value, least, CorpusError)


def check_choice(
    name: str, value: Any, choices: Sequence[str], error: type[HyperlensError] = HyperlensError
) -> None:
    """Raise unless a setting is one of `choices`.

    Raises:
        HyperlensError: `error`, with the setting's name, its choices and the value.
    """
    if value not in choices:
        raise error(f"{name} must be one of {', '.join(choices)}; got {value!r}")


def check_positive(name: str, value: float) -> None:
    """Raise unless a setting is positive and finite.

    Raises:
        DecodingError: naming the setting.
    """
    if not 0 < value < math.inf:
        raise DecodingError(f"{name} must be above 0 and finite, got {value}")


def check_seed(seed: Any) -> None:
    """Raise unless `seed` is an int from 0 to 2^63 - 1.

    Raises:
        CorpusError: with the range of seeds.
    """
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed <= LARGEST_SEED:
        raise CorpusError(f"seed must be a whole number from 0 to {LARGEST_SEED}, got {seed!r}")
