"""Outputs of patched models wait until there are enough of them, in order, and none is lost."""

from hypothesis import given
from hypothesis import strategies as st

from hyperlens.patching import engine
from hyperlens.patching.engine import pieces

ROOM = engine.PENDING_BYTES


@given(st.lists(st.integers(1, 2 * ROOM)))
def test_pieces_are_all_there_is_in_order_and_no_larger_than_needed(sizes):
    found = list(pieces(iter(sizes), lambda size: size))
    assert [size for piece in found for size in piece] == sizes
    assert all(sum(piece) >= ROOM for piece in found[:-1])
    assert all(sum(piece[:-1]) < ROOM for piece in found)
    assert all(found)
