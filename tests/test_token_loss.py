"""The loss in chunks against the plain one: same value, same gradients."""

import pytest
import torch
from conftest import ARCHITECTURES, D_VOCAB, make_tiny
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from hyperlens.training import token_loss
from hyperlens.training.token_loss import TokenLoss, loss_and_gradient_

LAST = {"gpt2": "h.2.", "gpt_neox": "layers.2."}


def plain_loss(model, tokens):
    logits = model(tokens).logits[:, :-1].flatten(0, 1)
    return functional.cross_entropy(logits, tokens[:, 1:].flatten(), reduction="sum")


def with_last_block_trained(name):
    model = make_tiny(name)
    for path, parameter in model.named_parameters():
        parameter.requires_grad_(LAST.get(name, "layers.2.") in path)
    return model


def gradients(model):
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("chunk", [1, 2**22])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_value_and_gradients_are_the_plain_ones(name, chunk, monkeypatch):
    monkeypatch.setattr(token_loss, "CHUNK_BYTES", chunk)
    model = with_last_block_trained(name)
    tokens = torch.randint(3, D_VOCAB, (5, 12))
    loss = TokenLoss(model)
    assert loss.head_is_frozen
    found = loss(model, tokens)
    (0.5 * found).backward()
    by_chunks = gradients(model)
    expected = plain_loss(model, tokens)
    (0.5 * expected).backward()
    plainly = gradients(model)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    assert by_chunks.keys() == plainly.keys() != set()
    for path, gradient in plainly.items():
        torch.testing.assert_close(by_chunks[path], gradient, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_a_trained_head_gets_its_gradient(name):
    """Qwen2's head here is its embedding, trained with it."""
    model = make_tiny(name)
    tokens = torch.randint(3, D_VOCAB, (2, 12))
    loss = TokenLoss(model)
    assert not loss.head_is_frozen
    loss(model, tokens).backward()
    head = model.get_output_embeddings().weight.grad.clone()
    model.zero_grad()
    plain_loss(model, tokens).backward()
    torch.testing.assert_close(head, model.get_output_embeddings().weight.grad)


def test_the_logits_of_a_batch_never_exist(monkeypatch):
    model = with_last_block_trained("llama")
    rows = []
    head = model.lm_head.forward
    model.lm_head.forward = lambda x: rows.append(x.shape[:-1].numel()) or head(x)
    monkeypatch.setattr(token_loss, "CHUNK_BYTES", 1)
    monkeypatch.setattr(token_loss, "CHUNK_ROWS", 16)
    loss = TokenLoss(model)
    rows.clear()
    loss(model, torch.randint(3, D_VOCAB, (8, 20)))
    assert max(rows) == 16
    assert sum(rows) == 8 + 8 * 19  # the model itself unembeds one position of each sequence


@given(st.integers(0, 2**31), st.floats(0.01, 30))
def test_loss_and_gradient_against_float64(seed, scale):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn((6, 40), generator=generator)
    targets = torch.randint(40, (6,), generator=generator)
    exact = logits.double().requires_grad_()
    expected = functional.cross_entropy(exact, targets, reduction="sum")
    expected.backward()
    loss, towards = loss_and_gradient_(logits.clone(), targets)
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(towards.double(), exact.grad, rtol=1e-4, atol=1e-6)
