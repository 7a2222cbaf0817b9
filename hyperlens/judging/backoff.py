"""How long to wait before asking a server again."""

from __future__ import annotations

import math
import random
import time
from email.utils import parsedate_to_datetime

# A server that wants more time than this is better asked by another run.
LONGEST_WAIT = 300.0


def wait(attempt: int, pause: float, dice: random.Random, retry_after: str | None) -> float:
    """Seconds to wait after a failed attempt.

    `pause` doubled with every attempt, times a random factor from 0.5 to 1.5 so that several
    workers do not come back at once; at least what the server asked for.

    Args:
        attempt: 0 for the first.
        pause: seconds after the first.
        dice: where the factor is drawn from.
        retry_after: the header of this name: seconds, or a date.
    """
    own = min(pause * 2.0**attempt * dice.uniform(0.5, 1.5), LONGEST_WAIT)
    return max(own, _asked_for(retry_after))


def _asked_for(retry_after: str | None) -> float:
    if not retry_after:
        return 0.0
    try:
        seconds = float(retry_after)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(retry_after).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return 0.0
    return max(0.0, seconds) if math.isfinite(seconds) else 0.0
