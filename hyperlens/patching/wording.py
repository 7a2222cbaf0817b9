"""Rows of a finding as words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

# A summary shows no more layers than this, the last ones whole.
MAX_ROWS = 12


NOTHING_CHANGED = "Tuning changed no decision on these texts: there is nothing to bring about."


def changed_share(extras: Mapping[str, Any]) -> str:
    """How many decisions tuning changed, which shares are of."""
    changed, decisions = extras["changed"], extras["decisions"]
    return (
        f"Tuning changed {changed:,} of {decisions:,} decisions "
        f"({changed / decisions:.1%}); shares below are of these."
    )


def shown(rows: Sequence[Any]) -> list[Any]:
    """All rows, or so many of them spread over all, the last two among them."""
    if len(rows) <= MAX_ROWS:
        return list(rows)
    spread = [round(i * (len(rows) - 2) / (MAX_ROWS - 2)) for i in range(MAX_ROWS - 1)]
    return [rows[i] for i in dict.fromkeys(spread)] + [rows[-1]]


def share_of(row: Mapping[str, Any]) -> str:
    """A share with its interval."""
    if not math.isfinite(row["value"]):
        return "n/a"
    if not math.isfinite(row["low"]):
        return f"{row['value']:.1%}"
    return f"{row['value']:.1%} [{row['low']:.1%}, {row['high']:.1%}]"


def signed_share(row: Mapping[str, Any]) -> str:
    """A difference of shares with its interval, in points."""
    if not math.isfinite(row["value"]):
        return "n/a"
    ends = "" if not math.isfinite(row["low"]) else (
        f" [{100 * row['low']:+.1f}, {100 * row['high']:+.1f}]"
    )  # fmt: skip
    return f"{100 * row['value']:+.1f}{ends}"
