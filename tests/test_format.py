"""How numbers are written: what a reader sees in terminal, notebook and page alike."""

import doctest
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hyperlens.render import blocks, format, terminal
from hyperlens.render.format import (
    COSINE,
    DIMENSIONS,
    FRACTION,
    NATS,
    NUMBER,
    PERCENT,
    SIGNED,
    Form,
    interval,
    p_value,
)

NAN = math.nan


@pytest.mark.parametrize("module", [blocks, format, terminal])
def test_examples_in_docstrings(module) -> None:
    assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize(
    ("form", "value", "expected"),
    [
        (NUMBER, 0.0, "0"),
        (NUMBER, 655.34, "655"),
        (NUMBER, 80.84, "80.8"),
        (NUMBER, 9.996, "10.0"),
        (NUMBER, 0.012345, "0.0123"),
        (NUMBER, 25612.0, "25,612"),
        (NUMBER, 1.5e9, "1.5e+09"),
        (NUMBER, -2e-9, "-2.0e-09"),
        (NUMBER, NAN, "n/a"),
        (NUMBER, math.inf, "n/a"),
        (SIGNED, 3.14159, "+3.14"),
        (SIGNED, -3.14159, "-3.14"),
        (COSINE, 0.99996, ">0.999"),
        (COSINE, 1.0, "1.000"),
        (COSINE, -0.00001, "0.000"),
        (FRACTION, 0.00001, "<0.001"),
        (PERCENT, 1.0, "100.0%"),
        (PERCENT, 0.9999, ">99.9%"),
        (PERCENT, 0.0001, "<0.1%"),
        (PERCENT, 0.0, "0.0%"),
        (NATS, 1.25, "1.25 nats"),
        (DIMENSIONS, 0.23, "+0.2"),
    ],
)
def test_numbers_read_well(form: Form, value: float, expected: str) -> None:
    assert form(value) == expected


@pytest.mark.parametrize(
    ("value", "low", "high", "expected"),
    [
        (0.5, 0.25, 0.75, "50.0% [25.0%, 75.0%]"),
        (0.01, -0.02, 0.04, "1.0% [0.0%, 4.0%]"),
        (0.99, 0.96, 1.02, "99.0% [96.0%, 100.0%]"),
        (0.5, NAN, NAN, "50.0%"),
        (NAN, NAN, NAN, "n/a"),
    ],
)
def test_shares_read_well(value: float, low: float, high: float, expected: str) -> None:
    assert interval({"value": value, "low": low, "high": high}, PERCENT) == expected


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_no_interval_leaves_the_possible_range(value: float, below: float, above: float) -> None:
    row = {"value": value, "low": value - below, "high": value + above}
    ends = re.findall(r"-?[\d.]+", interval(row, FRACTION))
    assert all(0.0 <= float(end) <= 1.0 for end in ends)


def test_interval_ends_have_the_decimals_of_the_largest() -> None:
    row = {"value": 0.2349, "low": 0.0498, "high": 12.673}
    assert interval(row, SIGNED) == "+0.2 [+0.0, +12.7]"
    assert interval({**row, "low": NAN, "high": NAN}, SIGNED) == "+0.235"


def test_p_values_read_well() -> None:
    assert [p_value(p) for p in (NAN, 0.0, 0.0009, 0.001, 0.25, 1.0)] == [
        *("", "p < 0.001", "p < 0.001"),
        *("p = 0.001", "p = 0.250", "p = 1.000"),
    ]
