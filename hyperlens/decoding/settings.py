"""Settings of decoding that mean nothing are refused by name."""

from __future__ import annotations

import math
from typing import Any

from ..errors import DecodingError


def check_whole(name: str, value: Any, least: int) -> None:
    """Refuse what is no whole number of at least so much.

    Raises:
        DecodingError: naming the setting.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise DecodingError(f"{name} must be at least {least} (a whole number), got {value}")


def check_positive(name: str, value: float) -> None:
    """Refuse 0, what is below, infinity and NaN.

    Raises:
        DecodingError: naming the setting.
    """
    if not 0 < value < math.inf:
        raise DecodingError(f"{name} must be above 0 and finite, got {value}")


def check_sampling(*, temperature: float, top_p: float, min_p: float | None) -> None:
    """Refuse settings of sampling out of their range.

    Raises:
        DecodingError: naming the setting and its range.
    """
    check_positive("temperature", temperature)
    for name, share in (("top_p", top_p), ("min_p", min_p)):
        if share is not None and not 0 < share <= 1:
            raise DecodingError(f"{name} must be above 0 and at most 1, got {share}")
