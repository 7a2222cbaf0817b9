"""Numbers and notes of a finding as words of its summary."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping
from typing import Any

WIDTH = 98


def p_number(p: float) -> str:
    """A p value as a column has it; a dash where there is no test."""
    if math.isnan(p):
        return "-"
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def p_in_words(p: float) -> str:
    """A p value in a sentence; nothing where there is no test."""
    if math.isnan(p):
        return ""
    return f"p {p_number(p)}" if p < 0.001 else f"p = {p_number(p)}"


def plus_minus(row: Mapping[str, Any]) -> str:
    """A mean and its standard error, if it has one."""
    if math.isnan(row["se"]):
        return f"{row['value']:.3f}"
    return f"{row['value']:.3f} ± {row['se']:.3f}"


def wrapped(text: str) -> list[str]:
    """Lines of a summary."""
    return textwrap.wrap(text, WIDTH)


def noted(meta: Mapping[str, Any]) -> list[str]:
    """The notes for the reader, as lines."""
    return [line for note in meta["notes"] for line in wrapped(f"note: {note}")]
