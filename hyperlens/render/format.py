"""How numbers are written, once for terminal, notebook, page and charts.

A `Form` says how numbers of one kind are written and which values are possible; `interval` writes
an estimate with its 95% interval in one form, both ends inside what is possible.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MISSING = "n/a"


def number(x: float, scale: float = 0.0) -> str:
    """Three significant digits, or as many decimals as a number of size `scale` would have.

    >>> number(0.123456), number(1234.5), number(2.0, scale=1234.5), number(float("nan"))
    ('0.123', '1,234', '2', 'n/a')
    """
    if not math.isfinite(x):
        return MISSING
    scale = float(f"{abs(scale or x):.3g}")
    size = math.floor(math.log10(scale)) if scale else 2
    if not -5 < size < 6:
        return f"{x:.1e}"
    decimals = max(0, 2 - size)
    return f"{round(x, decimals) + 0.0:,.{decimals}f}"


def signed(x: float, scale: float = 0.0) -> str:
    """The same with a sign, except for zero.

    >>> signed(3.14159), signed(-0.5), signed(0.0)
    ('+3.14', '-0.500', '0')
    """
    return f"+{number(x, scale)}" if x > 0 else number(x, scale)


def fraction(x: float, scale: float = 0.0) -> str:
    """Three decimals of a number between -1 and 1; what is not quite 0 or 1 never reads as such.

    >>> fraction(0.4567), fraction(0.99996), fraction(1.0), fraction(0.0001), fraction(0.0)
    ('0.457', '>0.999', '1.000', '<0.001', '0.000')
    """
    if not math.isfinite(x):
        return MISSING
    text = f"{round(x, 3) + 0.0:.3f}"
    return {"1.000": ">0.999", "0.000": "<0.001"}.get(text, text) if 0 < x < 1 else text


def signed_fraction(x: float, scale: float = 0.0) -> str:
    """Three decimals with a sign, for differences of fractions.

    >>> signed_fraction(0.25), signed_fraction(-0.0004)
    ('+0.250', '-0.000')
    """
    return f"{x:+.3f}" if math.isfinite(x) else MISSING


def percent(x: float, scale: float = 0.0) -> str:
    """A share as a percentage; what is not quite all or none never reads as such.

    >>> percent(0.249), percent(0.99996), percent(1.0), percent(0.0001), percent(0.0)
    ('24.9%', '>99.9%', '100.0%', '<0.1%', '0.0%')
    """
    text = f"{100 * x:.1f}%" if math.isfinite(x) else MISSING
    return {"100.0%": ">99.9%", "0.0%": "<0.1%"}.get(text, text) if 0 < x < 1 else text


def points(x: float, scale: float = 0.0) -> str:
    """A difference of two shares in percentage points, with a sign.

    >>> points(0.123), POINTS(0.123)
    ('+12.3', '+12.3 points')
    """
    return f"{100 * x:+.1f}" if math.isfinite(x) else MISSING


def decimal(x: float, scale: float = 0.0) -> str:
    """One decimal with a sign: changes of effective dimension beside each other.

    >>> decimal(20.14), decimal(-2.4)
    ('+20.1', '-2.4')
    """
    return f"{x:+.1f}" if math.isfinite(x) else MISSING


@dataclass(frozen=True)
class Form:
    """How numbers of one kind are written.

    Attributes:
        write: (number, scale) to text; `scale` is the size of the numbers beside it.
        lowest, highest: the possible values; the ends of intervals are shown inside them.
        unit: written after the number or its interval.
    """

    write: Callable[[float, float], str]
    lowest: float = -math.inf
    highest: float = math.inf
    unit: str = ""

    def __call__(self, x: float, scale: float = 0.0) -> str:
        """The number with its unit."""
        return f"{self.write(x, scale)} {self.unit}".strip()


NUMBER = Form(number)
NATS = Form(number, lowest=0.0, unit="nats")
SIGNED = Form(signed)
SIGNED_NATS = Form(signed, unit="nats")
DIMENSIONS = Form(decimal)
FRACTION = Form(fraction, 0.0, 1.0)
COSINE = Form(fraction, -1.0, 1.0)
SIGNED_FRACTION = Form(signed_fraction, -1.0, 1.0)
PERCENT = Form(percent, 0.0, 1.0)
POINTS = Form(points, -1.0, 1.0, unit="points")
DISTANCE = Form(number, lowest=0.0)


def interval(row: Mapping[str, Any], form: Form = NUMBER) -> str:
    """`value [low, high]` of a row with these three keys; the value alone without an interval.

    >>> interval({"value": 0.675, "low": 0.643, "high": 1.02}, FRACTION)
    '0.675 [0.643, 1.000]'
    >>> interval({"value": 2.0, "low": float("nan"), "high": float("nan")})
    '2.00'
    """
    value, low, high = (float(row[key]) for key in ("value", "low", "high"))
    if not all(map(math.isfinite, (value, low, high))):
        return form(value)
    low, high = max(low, form.lowest), min(high, form.highest)
    scale = max(map(abs, (value, low, high)))
    text = f"{form.write(value, scale)} [{form.write(low, scale)}, {form.write(high, scale)}]"
    return f"{text} {form.unit}".strip()


def ends(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row's value and interval alone."""
    return {key: row[key] for key in ("value", "low", "high")}


def complement(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The share of all others, with its interval, in the row of a share.

    >>> complement({"value": 0.75, "low": 0.5, "high": 1.0})
    {'value': 0.25, 'low': 0.0, 'high': 0.5}
    """
    return {**row, "value": 1 - row["value"], "low": 1 - row["high"], "high": 1 - row["low"]}


def span(low: float, high: float, form: Form = NUMBER) -> str:
    """A range from its smallest to its largest value.

    >>> span(1.44, 4.61, DIMENSIONS)
    '+1.4 to +4.6'
    """
    scale = max(abs(low), abs(high))
    return f"{form.write(low, scale)} to {form.write(high, scale)} {form.unit}".strip()


def p_value(p: float) -> str:
    """A p value in a table or sentence; nothing where there is no test.

    >>> p_value(0.0123), p_value(0.0001), p_value(float("nan"))
    ('p = 0.012', 'p < 0.001', '')
    """
    if math.isnan(p):
        return ""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def count(n: int, one: str) -> str:
    """A number of things.

    >>> count(1, "prompt"), count(1200, "prompt")
    ('1 prompt', '1,200 prompts')
    """
    return f"{n:,} {one}{'s' * (n != 1)}"


def listed(items: Sequence[str]) -> str:
    """Names in a sentence.

    >>> listed(["a"]), listed(["a", "b", "c"])
    ('a', 'a, b and c')
    """
    *first, last = items
    return f"{', '.join(first)} and {last}" if first else last


def one_line(text: object) -> str:
    r"""Any text on one line, unprintable characters replaced.

    >>> one_line("two\nlines\x00")
    'two lines?'
    """
    return "".join(c if c.isprintable() else "?" for c in " ".join(str(text).split()))


def cell(value: object) -> str:
    """Any value of a table of raw results."""
    return number(value) if isinstance(value, float) else one_line(value)
