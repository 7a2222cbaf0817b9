"""Patched states wait to be unembedded until there are enough of them, and never more than fit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Made = TypeVar("Made")

# What leaves patched models is kept until it takes so many bytes, then compared.
PENDING_BYTES = 256 * 2**20


def pieces(made: Iterable[Made], nbytes: Callable[[Made], int]) -> Iterator[list[Made]]:
    """As many at a time as fit the memory set aside for them, at least one."""
    piece: list[Made] = []
    held = 0
    for one in made:
        piece.append(one)
        held += nbytes(one)
        if held >= PENDING_BYTES:
            yield piece
            piece, held = [], 0
    if piece:
        yield piece
