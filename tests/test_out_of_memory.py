"""A GPU that is full is an error of one line that says what to lower, wherever it happens."""

import pytest
import torch
from conftest import make_tiny, perturbed, token_texts

from hyperlens import compare_models
from hyperlens.decoding.generate import continuations
from hyperlens.errors import ResourceError
from hyperlens.patching import patch_blocks, patch_positions, patch_weights
from hyperlens.probes import ResidualDrift

TEXTS = token_texts(6)


def full(*args: object, **options: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20 GiB")


@pytest.fixture
def pair():
    base = make_tiny("llama")
    return base, perturbed(base)


@pytest.mark.parametrize("step", ["open", "update", "compute"])
def test_while_comparing(pair, step, monkeypatch):
    monkeypatch.setattr(ResidualDrift, step, full)
    with pytest.raises(ResourceError, match="batch_size=3: lower it, or measure fewer views") as e:
        compare_models(*pair, TEXTS, batch_size=3, progress=False)
    assert "\n" not in str(e.value)


def test_while_writing(pair, monkeypatch):
    monkeypatch.setattr(pair[0], "generate", full)
    with pytest.raises(ResourceError, match="batch_size=5: lower it, or max_new_tokens"):
        continuations(pair[0], None, [[1, 4]], max_new_tokens=2, batch_size=5, progress=False)


@pytest.mark.parametrize(
    ("experiment", "step"),
    [
        (patch_blocks, "engine.measure"),
        (patch_positions, "position_cells.winner"),
        (patch_weights, "engine.measure"),
    ],
)
def test_while_patching(pair, experiment, step, monkeypatch):
    monkeypatch.setattr(f"hyperlens.patching.{step}", full)
    options = {} if experiment is patch_positions else {"max_new_tokens": 0}
    with pytest.raises(ResourceError, match="batch_size=4: lower it, or max_length"):
        experiment(*pair, TEXTS, batch_size=4, progress=False, **options)
