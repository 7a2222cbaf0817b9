"""Planted artefacts: a terminal jump that is only how layers are read, and one that is there.

The oracle is the script that people write: Hugging Face's `hidden_states` of every token, text by
text, numpy's covariance, its eigenvalues.
"""

import copy

import numpy as np
import pytest
import torch
from conftest import make_tiny, token_texts

from hyperlens.compare import compare_models
from hyperlens.compare.audit import audit
from hyperlens.validation.constructions import last_outputs, mapped, spread

TEXTS = token_texts(24, shortest=8, longest=20)
BOS, MARK = 1, 60
# The second token of every text is the same, and is no BOS.
MARKED = [[BOS, MARK, *(token for token in text[1:] if token != MARK)] for text in TEXTS]


def few_dimensions(seed=0):
    """A small Llama whose tokens share a few directions for the most part; its blocks do little."""
    model = make_tiny("llama", seed=seed)
    d_model = model.config.hidden_size
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        tokens = torch.randn(model.config.vocab_size, d_model, generator=generator)
        basis = torch.linalg.qr(torch.randn(d_model, d_model, generator=generator))[0]
        model.model.embed_tokens.weight.copy_((tokens * 0.8 ** torch.arange(d_model)) @ basis)
        for block in model.model.layers:
            block.self_attn.o_proj.weight.mul_(0.02)
            block.mlp.down_proj.weight.mul_(0.02)
    return model


def with_outlier(model, token):
    """A copy in which a token's vector is so long that raw streams have one direction in effect."""
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.model.embed_tokens.weight[token, 3] = 300.0
    return changed


def expanded_from_the_start(base, keep):
    """A copy whose embedding has all directions; the blocks are the base's."""
    tuned = copy.deepcopy(base)
    embedding = tuned.model.embed_tokens.weight
    with torch.no_grad():
        kept = embedding[keep].clone()
        embedding.copy_(torch.randn(embedding.shape, generator=torch.Generator().manual_seed(9)))
        embedding[keep] = kept
    return tuned


def script_reads(model, texts):
    """The participation ratio at every layer."""
    states = []
    for text in texts:
        with torch.no_grad():
            found = model(torch.tensor([text]), output_hidden_states=True).hidden_states
        states.append(torch.stack(found)[:, 0].double().numpy())
    layers = np.concatenate(states, axis=1)
    spectra = [np.linalg.eigvalsh(np.cov(x.T)) for x in layers]
    return np.array([values.sum() ** 2 / (values**2).sum() for values in spectra])


def dimensions(base, tuned, texts):
    """The comparison, and the audit of its dimensions, held against the script's numbers."""
    comparison = compare_models(base, tuned, texts, progress=False)
    one = audit(comparison)[0]
    expected = script_reads(tuned, texts) - script_reads(base, texts)
    assert one.quantity == "participation_ratio"
    assert [at.layer for at in one.layers] == list(range(len(expected)))
    np.testing.assert_allclose([at.as_read for at in one.layers], expected, rtol=1e-5, atol=1e-4)
    return comparison, one


@pytest.mark.parametrize(
    ("outlier", "texts", "part"), [(BOS, TEXTS, "BOS"), (MARK, MARKED, "attention sinks")]
)
def test_a_jump_that_an_outlier_makes_is_found(outlier, texts, part):
    base = with_outlier(few_dimensions(), outlier)
    tuned = expanded_from_the_start(base, keep=outlier)
    comparison, one = dimensions(base, tuned, texts)
    # The truth: all of the expansion is there from the embedding on, and no block adds to it.
    assert min(at.blocks for at in one.layers) > 8
    assert abs(one.jump.blocks) < 1
    # The script: nothing below the last layer, and a "terminal expansion" at it.
    assert max(abs(at.as_read) for at in one.layers[:-1]) < 0.1
    assert one.jump.as_read > 8
    assert one.jump.reading[part] > 0.8 * one.jump.as_read
    *_, real = comparison.conclusions()
    assert "Most of the jump that scripts show is made by the reading" in real
    assert f"The largest part, {part}, is -" in real
    assert real in " ".join(comparison.summary().split())


def test_an_expansion_of_the_last_block_is_one_in_both_readings():
    base = few_dimensions()
    before, _ = last_outputs(base, TEXTS)
    mean, values, directions = spread(before)
    # The same variance along every direction, but for those that have next to none.
    gains = ((values + 0.01 * values.mean()) / values.mean()) ** -0.5
    widening = directions @ torch.diag(gains) @ directions.T
    tuned = mapped(base, mean, widening)
    comparison, one = dimensions(base, tuned, TEXTS)
    assert max(abs(at.blocks) for at in one.layers[:-1]) == 0
    assert one.jump.blocks > 8
    assert abs(one.jump.as_read - one.jump.blocks) < one.jump.blocks / 4
    *_, real = comparison.conclusions()
    assert "Both readings agree about the last block" in real
