"""The unembedding in pieces: the product of torch's linear, and only where nobody listens."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from hyperlens.hooks import residual
from hyperlens.hooks.residual import FEWEST_ROWS, ScaledUnembed, linear_in_pieces
from hyperlens.passes.streams import logit_chunk_bytes, logit_chunk_rows

CPU = torch.device("cpu")


@pytest.fixture
def in_pieces(monkeypatch):
    """Counts the products taken in pieces."""
    taken = []

    def counted(*given):
        taken.append(len(given[0]))
        return linear_in_pieces(*given)

    monkeypatch.setattr(residual, "linear_in_pieces", counted)
    return taken


@given(st.integers(1, 40), st.integers(1, 1200), st.integers(1, 30), st.booleans())
def test_pieces_make_the_product(n, d_vocab, d_model, has_bias):
    x, weight = torch.randn(n, d_model), torch.randn(d_vocab, d_model)
    bias = torch.randn(d_vocab) if has_bias else None
    made = linear_in_pieces(x, weight, bias)
    expected = functional.linear(
        x.double(), weight.double(), None if bias is None else bias.double()
    )
    torch.testing.assert_close(made.double(), expected, rtol=1e-5, atol=1e-5)


def test_any_shape_of_rows_and_the_scale(in_pieces):
    head = nn.Linear(8, 700)
    x = torch.randn(3, FEWEST_ROWS, 8)
    with torch.no_grad():
        made = ScaledUnembed(head, 0.5)(x)
        torch.testing.assert_close(made, 0.5 * head(x))
    assert in_pieces == [3 * FEWEST_ROWS]


class Shouting(nn.Linear):
    """What an adapter or a quantised layer may be: a Linear of its own kind."""

    def forward(self, x):
        return super().forward(x) + 1000


def test_whoever_listens_or_differs_is_heard(in_pieces):
    plain, rows = nn.Linear(8, 700), torch.randn(FEWEST_ROWS, 8)
    hooked, replaced, shouting = nn.Linear(8, 700), nn.Linear(8, 700), Shouting(8, 700)
    hooked.register_forward_hook(lambda module, given, made: made + 1000)
    replaced.forward = Shouting(8, 700).forward
    with torch.no_grad():
        for head in (hooked, replaced, shouting):
            assert (ScaledUnembed(head, 1.0)(rows) > 900).all()
        ScaledUnembed(plain, 1.0)(rows[:-1])
        ScaledUnembed(plain.bfloat16(), 1.0)(rows.bfloat16())
    assert in_pieces == []


def test_gradients_flow_where_they_are_wanted(in_pieces):
    head, rows = nn.Linear(8, 700), torch.randn(FEWEST_ROWS, 8)
    ScaledUnembed(head, 1.0)(rows).sum().backward()
    assert head.weight.grad is not None
    assert in_pieces == []


@pytest.mark.parametrize("d_vocab", [512, 8192, 32_000, 151_936, 1_000_000, 20_000_000])
def test_wide_vocabularies_get_enough_rows_and_no_more_memory_than_said(d_vocab):
    rows = logit_chunk_rows(d_vocab, CPU)
    assert logit_chunk_bytes(d_vocab, CPU) == 4 * rows * d_vocab
    assert rows >= 16
    assert rows >= 100 or d_vocab > 152_000
    assert rows == 16 or logit_chunk_bytes(d_vocab, CPU) <= 64 * 2**20
