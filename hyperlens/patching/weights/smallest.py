"""The fewest last blocks whose weights bring about what another model does."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ..directions import TOWARDS

SUFFIXES = ("suffix", "suffix_and_head")
# Text must lie nearer to the donor's than so much of what tuning changed.
OF_THE_CHANGE = 0.5

Row = Mapping[str, Any]


class Suffix(NamedTuple):
    """The smallest suffix of one direction and kind.

    Attributes:
        direction, kind: as in the table.
        number: its blocks; -1 if no suffix does.
        by_text: whether its text was judged, too; not where none was written, nor where the two
            models' TTR does not differ.
    """

    direction: str
    kind: str
    number: int
    by_text: bool


def smallest_suffixes(
    table: Sequence[Row], contrasts: Sequence[Row], enough: float
) -> Iterator[Suffix]:
    """The smallest suffix of every direction, without and with the head.

    Args:
        table, contrasts: of a `TransplantResult`.
        enough: what the interval of the recovered share must lie above.
    """
    for direction, metric in TOWARDS.items():
        change = next(iter(_ttr(contrasts, direction, "donor", "host")), None)
        by_text = change is not None and (change["low"] > 0 or change["high"] < 0)
        margin = OF_THE_CHANGE * abs(change["value"]) if change is not None else math.nan
        for kind in SUFFIXES:
            gaps = {row["number"]: row for row in _ttr(contrasts, direction, kind, "donor")}
            fit = (
                row["number"]
                for row in table
                if (row["direction"], row["kind"], row["metric"]) == (direction, kind, metric)
                and row["low"] > enough
                and (not by_text or close(gaps[row["number"]], margin))
            )
            yield Suffix(direction, kind, min(fit, default=-1), by_text)


def close(gap: Row, margin: float) -> bool:
    """Whether an interval holds 0 and stays within a margin of it."""
    return bool(-margin <= gap["low"] <= 0 <= gap["high"] <= margin)


def _ttr(contrasts: Sequence[Row], direction: str, kind: str, against: str) -> list[Row]:
    wanted = {"direction": direction, "kind": kind, "against": against, "metric": "ttr"}
    return [row for row in contrasts if all(row[key] == value for key, value in wanted.items())]
