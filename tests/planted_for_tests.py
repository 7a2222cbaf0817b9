"""Tuned models whose only change is known: what the last block puts out is changed."""

import copy

import torch
from torch import nn

from hyperlens.models.structure import find_structure
from hyperlens.pair import open_inputs
from hyperlens.patching.engine import second_half


class Adding(nn.Module):
    """A block to whose output a function of it is added."""

    def __init__(self, block, function):
        super().__init__()
        self.block, self.function = block, function

    def __getattr__(self, name):
        # Models ask their blocks for attributes of their own.
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("block"), name)

    def forward(self, *args, **kwargs):
        made = self.block(*args, **kwargs)
        first = made if isinstance(made, torch.Tensor) else made[0]
        new = first + self.function(first)
        return new if isinstance(made, torch.Tensor) else (new, *made[1:])


class Affine(nn.Module):
    """What mean + matrix (x - mean) adds to x."""

    def __init__(self, mean, matrix):
        super().__init__()
        self.register_buffer("mean", mean.float())
        self.register_buffer("change", (matrix - torch.eye(len(mean))).float())

    def forward(self, x):
        return (x - self.mean) @ self.change.mT


class Cosines(nn.Module):
    """Cosines of the coordinates along `axes`, written along `into`: no affine map of x."""

    def __init__(self, mean, axes, phase, offset, into):
        super().__init__()
        for name, value in {"mean": mean, "axes": axes, "phase": phase, "offset": offset,
                            "into": into}.items():  # fmt: skip
            self.register_buffer(name, value.float())

    def features(self, x):
        return torch.cos((x - self.mean) @ self.axes + self.phase)

    def forward(self, x):
        return (self.features(x) - self.offset) @ self.into


def adding(model, function):
    """A copy of a model with a function of its last block's output added to it."""
    tuned = copy.deepcopy(model)
    blocks = find_structure(tuned).blocks
    (stack,) = (m for m in tuned.modules() if isinstance(m, nn.ModuleList)
                and len(m) == len(blocks) and m[-1] is blocks[-1])  # fmt: skip
    stack[-1] = Adding(blocks[-1], function)
    return tuned


def mapped(model, mean, matrix):
    """A copy of a model with its last block's output moved to mean + matrix (output - mean)."""
    return adding(model, Affine(mean, matrix))


def last_outputs(model, texts, seed=0):
    """What the last block puts out on the first half of the texts, without BOS, and on the other.

    One text per forward pass, plain transformers: no code of the experiment but the choice of
    the half.
    """
    opened = open_inputs(model, model, texts, max_length=256)
    is_read = second_half(opened.corpus, seed)
    kept = []
    handle = (
        find_structure(model)
        .blocks[-1]
        .register_forward_hook(
            lambda m, a, out: kept.append(out if isinstance(out, torch.Tensor) else out[0])
        )
    )
    parts = ([], [])
    with torch.no_grad():
        for sequence, read in zip(opened.corpus.sequences, is_read.tolist(), strict=True):
            kept.clear()
            ids = torch.from_numpy(sequence)
            model(ids[None])
            parts[int(read)].append(kept[0][0][ids != 1].double())
    handle.remove()
    return torch.cat(parts[0]), torch.cat(parts[1])


def spread(x):
    """Mean, eigenvalues (largest first) and eigenvectors, by numpy."""
    import numpy as np

    x = x.numpy()
    values, vectors = np.linalg.eigh(np.cov(x.T, bias=True))
    return (
        torch.from_numpy(x.mean(0)),
        torch.from_numpy(values[::-1].copy()),
        torch.from_numpy(vectors[:, ::-1].copy()),
    )
