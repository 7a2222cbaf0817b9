"""Tuned models whose only change is known, made from any base model without training.

Nothing here is shared with the experiments but the choice of the half of the texts: what is planted
must not depend on what is tested.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..models.structure import find_structure
from ..pair import open_inputs
from ..patching.engine import second_half
from ..randomness import own_randomness

BOS = 1
"""What texts of the planted pairs begin with; it takes part in no covariance."""


# Noise in parts of a model


def with_noise(model: Any, scale: float, seed: int) -> Any:
    """A copy with independent Gaussian noise on every weight."""
    tuned = copy.deepcopy(model)
    add_noise(tuned.parameters(), scale, seed)
    return tuned


def with_noise_in_blocks(model: Any, blocks: Iterable[int], scale: float, seed: int) -> Any:
    """A copy that differs in these blocks alone."""
    tuned = copy.deepcopy(model)
    stack = find_structure(tuned).blocks
    add_noise((p for block in blocks for p in stack[block].parameters()), scale, seed)
    return tuned


def with_noise_in_norm(model: Any, scale: float, seed: int) -> Any:
    """A copy that differs in its final norm alone."""
    tuned = copy.deepcopy(model)
    add_noise(find_structure(tuned).final_norm.parameters(), scale, seed)
    return tuned


def with_noise_in_unembedding(model: Any, scale: float, seed: int) -> Any:
    """A copy that differs in its unembedding alone (which must not be tied to the embedding)."""
    tuned = copy.deepcopy(model)
    add_noise(find_structure(tuned).head.parameters(), scale, seed)
    return tuned


def with_noise_in_attention_head(model: Any, block: int, head: int, scale: float, seed: int) -> Any:
    """A copy of a Llama in which one attention head of one block writes something else."""
    tuned = copy.deepcopy(model)
    projection = tuned.model.layers[block].self_attn.o_proj.weight
    size = projection.shape[1] // tuned.config.num_attention_heads
    columns = slice(head * size, (head + 1) * size)
    with torch.no_grad(), own_randomness(seed, projection.device):
        projection[:, columns] += scale * torch.randn_like(projection[:, columns])
    return tuned


def add_noise(parameters: Iterable[Tensor], scale: float, seed: int) -> None:
    """Add Gaussian noise to weights, in place; the caller's random state stays."""
    with torch.no_grad(), own_randomness(seed, torch.device("cpu")):
        for parameter in parameters:
            parameter += scale * torch.randn_like(parameter)


# Logits


def at_temperature(model: Any, temperature: float) -> Any:
    """A copy whose logits are divided by a temperature (without a soft cap, and untied)."""
    tuned = copy.deepcopy(model)
    head = tuned.get_output_embeddings()
    with torch.no_grad():
        head.weight /= temperature
        if head.bias is not None:
            head.bias /= temperature
    return tuned


def with_head_bias(model: Any) -> Any:
    """A copy whose unembedding has a bias, of zeros."""
    changed = copy.deepcopy(model)
    old = changed.get_output_embeddings()
    with own_randomness(0, old.weight.device):
        head = nn.Linear(old.in_features, old.out_features)
    with torch.no_grad():
        head.weight.copy_(old.weight)
        head.bias.zero_()
    changed.set_output_embeddings(head)
    return changed


def with_bias(model: Any, bias: Float[Tensor, " d_vocab"]) -> Any:
    """A copy with a constant added to every row of its logits; its unembedding has a bias."""
    tuned = copy.deepcopy(model)
    with torch.no_grad():
        tuned.get_output_embeddings().bias += bias
    return tuned


# Tokens and positions


def relabelled(model: Any, seed: int, first: int = 3) -> Any:
    """A copy with its tokens from `first` on exchanged among each other, read and written alike.

    On random texts it is another draw of the same model: whatever is measured of it alone has the
    base's law, though each single prediction is another.
    """
    tuned = copy.deepcopy(model)
    tables = (tuned.get_input_embeddings().weight, tuned.get_output_embeddings().weight)
    n = tables[0].shape[0]
    order = torch.arange(n)
    generator = torch.Generator().manual_seed(seed)
    order[first:] = first + torch.randperm(n - first, generator=generator)
    with torch.no_grad():
        for table in tables:
            table.copy_(table[order])
    return tuned


def with_position(model: Any, position: int, scale: float, seed: int) -> Any:
    """A copy of a GPT-2 that differs in what it adds to one position."""
    tuned = copy.deepcopy(model)
    row = tuned.transformer.wpe.weight[position]
    with torch.no_grad(), own_randomness(seed, row.device):
        row += scale * torch.randn(len(row))
    return tuned


def with_cancelling_blocks(model: Any, scale: float, seed: int) -> tuple[Any, Any]:
    """Two Llamas: a base, and a copy with a vector added in one block and taken away in the next.

    The two blocks are the last; the very last does not react to what it takes away.
    """
    pair = (copy.deepcopy(model), copy.deepcopy(model))
    for one, by in zip(pair, (0.0, scale), strict=True):
        layers = one.model.layers
        with torch.no_grad():
            for name in ("self_attn.o_proj", "mlp.down_proj"):
                layers[-1].get_submodule(name).weight.zero_()
        weight = layers[-1].mlp.down_proj.weight
        with own_randomness(seed, weight.device):
            vector = by * torch.randn(len(weight), dtype=weight.dtype)
        for layer, sign in ((layers[-2], 1.0), (layers[-1], -1.0)):
            layer.mlp.down_proj.register_parameter("bias", nn.Parameter(sign * vector))
    return pair


# The last block's outputs


class Adding(nn.Module):
    """A block to whose output a function of it is added."""

    def __init__(self, block: nn.Module, function: nn.Module) -> None:
        super().__init__()
        self.block, self.function = block, function

    def __getattr__(self, name: str) -> Any:
        """Models ask their blocks for attributes of their own."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("block"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The block's output and what is added to it."""
        output = self.block(*args, **kwargs)
        first = output if isinstance(output, Tensor) else output[0]
        new = first + self.function(first)
        return new if isinstance(output, Tensor) else (new, *output[1:])


class Affine(nn.Module):
    """What mean + matrix (x - mean) adds to x."""

    mean: Tensor
    change: Tensor

    def __init__(
        self, mean: Float[Tensor, " d_model"], matrix: Float[Tensor, "d_model d_model"]
    ) -> None:
        super().__init__()
        self.register_buffer("mean", mean.float())
        self.register_buffer("change", (matrix - torch.eye(len(mean))).float())

    def forward(self, x: Tensor) -> Tensor:
        """What is added."""
        return (x - self.mean) @ self.change.mT


class Cosines(nn.Module):
    """Cosines of the coordinates along `axes`, written along `into`: no affine map of x."""

    mean: Tensor
    axes: Tensor
    phase: Tensor
    offset: Tensor
    into: Tensor

    def __init__(
        self,
        mean: Float[Tensor, " d_model"],
        axes: Float[Tensor, "d_model features"],
        phase: Float[Tensor, " features"],
        offset: Float[Tensor, " features"],
        into: Float[Tensor, "features d_model"],
    ) -> None:
        super().__init__()
        buffers = {"mean": mean, "axes": axes, "phase": phase, "offset": offset, "into": into}
        for name, value in buffers.items():
            self.register_buffer(name, value.float())

    def features(self, x: Tensor) -> Tensor:
        """The cosines."""
        return torch.cos((x - self.mean) @ self.axes + self.phase)

    def forward(self, x: Tensor) -> Tensor:
        """What is added."""
        return (self.features(x) - self.offset) @ self.into


def adding(model: Any, function: nn.Module) -> Any:
    """A copy of a model with a function of its last block's output added to it."""
    tuned = copy.deepcopy(model)
    blocks = find_structure(tuned).blocks
    (stack,) = (
        module
        for module in tuned.modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == len(blocks)
        and module[-1] is blocks[-1]
    )
    stack[-1] = Adding(blocks[-1], function)
    return tuned


def mapped(
    model: Any, mean: Float[Tensor, " d_model"], matrix: Float[Tensor, "d_model d_model"]
) -> Any:
    """A copy of a model with its last block's output moved to mean + matrix (output - mean)."""
    return adding(model, Affine(mean, matrix))


def same_form(model: Any) -> Any:
    """A copy of a model, built as `mapped` builds it, that is left as it is.

    Weights move only between models that are built alike.
    """
    width = model.config.hidden_size
    return mapped(model, torch.zeros(width), torch.eye(width))


Texts = Sequence[Sequence[int]]


def last_outputs(
    model: Any, texts: Texts, seed: int = 0
) -> tuple[Float[Tensor, "first d_model"], Float[Tensor, "second d_model"]]:
    """What the last block puts out on the first half of the texts, without BOS, and on the other.

    One text per forward pass, plain transformers: no code of the experiment but the choice of
    the half.
    """
    opened = open_inputs(model, model, texts, max_length=256)
    is_read = second_half(opened.corpus, seed)
    outputs: list[Tensor] = []
    parts: tuple[list[Tensor], list[Tensor]] = ([], [])

    def keep(module: nn.Module, given: Any, output: Any) -> None:
        outputs.append(output if isinstance(output, Tensor) else output[0])

    handle = find_structure(model).blocks[-1].register_forward_hook(keep)
    try:
        with torch.no_grad():
            for sequence, read in zip(opened.corpus.sequences, is_read.tolist(), strict=True):
                outputs.clear()
                ids = torch.from_numpy(sequence)
                model(ids[None])
                parts[int(read)].append(outputs[0][0][ids != BOS].double())
    finally:
        handle.remove()
    return torch.cat(parts[0]), torch.cat(parts[1])


class Spread(NamedTuple):
    """Mean, eigenvalues (largest first) and eigenvectors (columns) of a cloud of vectors."""

    mean: Float[Tensor, " d_model"]
    values: Float[Tensor, " d_model"]
    vectors: Float[Tensor, "d_model d_model"]


def spread(x: Float[Tensor, "n d_model"]) -> Spread:
    """How vectors spread, by numpy."""
    array = x.numpy()
    values, vectors = np.linalg.eigh(np.cov(array.T, bias=True))
    return Spread(
        torch.from_numpy(array.mean(0)),
        torch.from_numpy(values[::-1].copy()),
        torch.from_numpy(vectors[:, ::-1].copy()),
    )


# Expansions, and changes that are none


def stretched(model: Any, texts: Texts, power: float) -> Any:
    """Directions' standard deviations drawn together: an expansion, and the only change."""
    mean, values, vectors = spread(last_outputs(model, texts)[0])
    gain = (values[0] / values.clamp_min(1e-9 * values[0])) ** power
    return mapped(model, mean, (vectors * gain) @ vectors.mT)


def rotated(model: Any, texts: Texts, seed: int) -> Any:
    """Directions turned at random about the mean; the spectrum stays."""
    mean, values, _ = spread(last_outputs(model, texts)[0])
    generator = torch.Generator().manual_seed(seed)
    square = torch.randn(len(values), len(values), generator=generator).double()
    return mapped(model, mean, torch.linalg.qr(square).Q)


def unread(model: Any, texts: Texts, n: int, left: float) -> tuple[Any, Spread]:
    """A Llama with its final norm's weight in the unembedding, which hardly reads some directions.

    Args:
        model: untied.
        texts: what directions are found on.
        n: along how many of its smallest directions the unembedding is shrunk.
        left: what is left of it there.
    """
    model = copy.deepcopy(model)
    found = spread(last_outputs(model, texts)[0])
    with torch.no_grad():
        weight = model.lm_head.weight.double() * model.model.norm.weight.double()
        small = found.vectors[:, len(found.values) - n :]
        model.lm_head.weight.copy_(weight - (1 - left) * (weight @ small) @ small.mT)
        model.model.norm.weight.fill_(1.0)
    return model, found


def with_unread_expansion(
    model: Any, texts: Texts, level: float, expands: bool = True, left: float = 0.0
) -> tuple[Any, Any]:
    """A Llama and its copy with one direction amplified, which decides, and others that spread.

    The 24 smallest directions, which the unembedding hardly reads, are raised to the largest.

    Args:
        model: of 64 directions, untied.
        texts: what directions are found on.
        level: variance of the amplified direction, as a multiple of the largest.
        expands: False leaves the 24 smallest as they are: decisions are the same.
        left: how much of those the unembedding reads.
    """
    base, (mean, values, vectors) = unread(model, texts, 24, left)
    gain = torch.ones(len(values)).double()
    gain[30] = (level * values[0] / values[30]).sqrt()
    if expands:
        gain[40:] = (values[0] / values[40:]).sqrt()
    return same_form(base), mapped(base, mean, (vectors * gain) @ vectors.mT)


def with_new_features(model: Any, texts: Texts, level: float, seed: int = 3) -> tuple[Any, Any]:
    """A Llama and its copy with new features in the half of its directions that is hardly used.

    An expansion and the only change, and no affine map of the base's outputs.

    Args:
        model: untied.
        texts: what directions are found on.
        level: the features' variance, as a share of the mean of the base's largest directions.
        seed: of the features.
    """
    plain, (mean, values, vectors) = unread(model, texts, 0, 0.0)
    half = len(values) // 2
    small = torch.ones(len(values)).double()
    small[half:] = 0.1
    base = mapped(plain, mean, (vectors * small) @ vectors.mT)
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(half, half, generator=generator).double() * 4 / half**0.5
    phase = 2 * np.pi * torch.rand(half, generator=generator).double()
    axes = (vectors[:, :half] / values[:half].sqrt()) @ mixed
    nowhere = torch.zeros(half, len(values)).double()
    cosines = Cosines(mean, axes, phase, torch.zeros(half), nowhere)
    offset, variance, turn = spread(cosines.features(last_outputs(base, texts)[0].float()))
    size = (level * values[:8].mean()).sqrt()
    into = (turn / variance.sqrt()).double() @ (vectors[:, half:] * size).mT
    none = adding(base, Cosines(mean, axes, phase, offset, torch.zeros_like(into)))
    return none, adding(base, Cosines(mean, axes, phase, offset, into))
