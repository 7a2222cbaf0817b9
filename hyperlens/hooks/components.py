"""What a logit difference is the sum of: embedding, heads, MLPs, biases, read at some tokens.

Final norms (and norms after a branch) are frozen: at every token they are the linear map that they
are there, their scale taken as a constant. Then what each component adds to the residual stream
adds its own part to every difference of logits, and the parts sum to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ..errors import PairError, PatchError
from ..models.structure import ROUNDINGS, first_tensor, misfit
from .attach import on_input, on_output
from .loading import LoadedModel
from .patterns import attention_patterns
from .surface import evaluating, final_norm, input_device

# How far a norm may be from a scale times its weight, relative to its largest output.
NORM_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-6}
HALF_PRECISION_TOLERANCE = 3e-2

HEADS, BRANCHES = SPLITS = ("heads", "branches")
"""Attention split into heads, or whole."""


class Component(NamedTuple):
    """A part of the logits.

    Attributes:
        kind: "embedding", "position", "head", "attention" (of a block, not split), "attention_bias"
            (what it adds besides its heads), "mlp", "norm_bias", "unembedding_bias" or "soft_cap".
        block: 0-based; -1 for what is in no block.
        head: 0-based; -1 for all but heads.
    """

    kind: str
    block: int = -1
    head: int = -1


@dataclass(frozen=True)
class FrozenNorm:
    """A norm as x -> scale(x) · weight ⊙ (x - mean(x)) + bias.

    Attributes:
        weight: up to a factor, which is in the scale.
        bias: 0 for most norms.
        centres: whether the mean is subtracted, as LayerNorm does and RMSNorm does not.
    """

    weight: Float[Tensor, " d_model"]
    bias: Float[Tensor, " d_model"]
    centres: bool

    def centred(self, x: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_model"]:
        """x, without its mean if the norm subtracts it."""
        return x - x.mean(-1, keepdim=True) if self.centres else x

    def scale(
        self, x: Float[Tensor, "n d_model"], normed: Float[Tensor, "n d_model"]
    ) -> Float[Tensor, "n 1"]:
        """By how much the norm scaled these vectors, from what it made of them."""
        direction = self.weight * self.centred(x.double())
        squares = direction.square().sum(-1, keepdim=True).clamp_min(1e-300)
        return ((normed.double() - self.bias) * direction).sum(-1, keepdim=True) / squares

    def pulled(
        self,
        readout: Float[Tensor, "*r n d_model"],
        x: Float[Tensor, "n d_model"],
        normed: Float[Tensor, "n d_model"],
    ) -> Float[Tensor, "*r n d_model"]:
        """A readout of the norm's output as one of its input, the scale frozen.

        The transpose of the linear map; what the bias gives is to be added.
        """
        return self.centred(self.scale(x, normed) * self.weight * readout)


def frozen_norm(
    norm: nn.Module, d_model: int, dtype: torch.dtype, device: torch.device
) -> FrozenNorm | None:
    """A norm's weight and bias read off what it makes of two vectors; None if it is no such norm.

    Asked rather than looked up: some norms add 1 to their weight, some have none.
    """

    def apply(x: Tensor) -> Tensor:
        made: Tensor = norm(x.to(device, dtype)[None, None])[0, 0].double()
        return made

    signs = 1.0 - 2.0 * (torch.arange(d_model) % 2)
    other = torch.randn(d_model, generator=torch.Generator().manual_seed(0)) + 0.5
    with evaluating(norm):
        plus, minus, made = apply(signs), apply(-signs), apply(other)
    bias = (plus + minus) / 2
    for centres in (False, True):
        found = FrozenNorm(torch.ones_like(bias), bias, centres)
        weight = (plus - bias) / found.centred(signs.to(bias))
        found = FrozenNorm(weight, bias, centres)
        x = other.to(device, dtype).double()[None]
        expected = found.scale(x, made[None]) * weight * found.centred(x) + bias
        allowed = NORM_TOLERANCE.get(dtype, HALF_PRECISION_TOLERANCE) * made.abs().max()
        if bool(((expected[0] - made).abs() <= allowed).all()):
            return found
    return None


@dataclass(frozen=True)
class Heads:
    """How the heads of a block's attention reach the stream.

    Attributes:
        projection: the linear map of all heads' outputs, side by side, to the stream.
        norm_module, norm: what stands between it and the stream, if anything.
        n: how many heads.
    """

    projection: nn.Module
    norm_module: nn.Module | None
    norm: FrozenNorm | None
    n: int

    def offset(self, z: Float[Tensor, "*rows d_heads"]) -> Float[Tensor, " d_model"]:
        """What the projection adds without any head: its bias."""
        made: Tensor = self.projection(z.new_zeros(1, 1, z.shape[-1]))[0, 0]
        return made

    def alone(
        self, z: Float[Tensor, "batch pos d_heads"], head: int
    ) -> Float[Tensor, "batch pos d_model"]:
        """What one head writes, before the norm if there is one."""
        width = z.shape[-1] // self.n
        only = torch.zeros_like(z)
        own = slice(head * width, (head + 1) * width)
        only[..., own] = z[..., own]
        made: Tensor = self.projection(only) - self.offset(z)
        return made

    def normed(self, y: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """What enters the stream, from the projection's output."""
        if self.norm_module is None:
            return y
        made: Tensor = self.norm_module(y)
        return made


@dataclass(frozen=True)
class ComponentMap:
    """Where the components of a model are.

    Attributes:
        loaded: the model.
        components: all of them, in the order of every array of contributions.
        final: its final norm.
        heads: of every block; none where attention is not split.
        token_table, position_table: the modules whose outputs are the first block's input, where
            there are two; else None.
    """

    loaded: LoadedModel
    components: tuple[Component, ...]
    final: FrozenNorm
    heads: tuple[Heads, ...]
    token_table: nn.Module | None
    position_table: nn.Module | None

    @property
    def structure(self) -> Any:
        """Where the model's modules are."""
        return self.loaded.hooked.structure


def find_components(loaded: LoadedModel, by: str) -> ComponentMap:
    """Find what a model's logits are the sum of.

    Args:
        loaded: the model, a `ResidualModel`.
        by: "heads", or "branches" for attention as a whole.

    Raises:
        PatchError: naming what the architecture does not allow.
        PairError: of a model that is hooked otherwise.
    """
    name, hooked = type(loaded.model).__name__, loaded.hooked
    if not hasattr(hooked, "structure"):
        raise PairError(
            f"components are read with backend='residual', and this pair has {loaded.backend!r}: "
            "open it without a backend"
        )
    structure, cfg = hooked.structure, hooked.cfg
    if structure.branches is None:
        raise PatchError(
            f"what two modules of {name}'s blocks return, attention and an MLP, is not just what "
            "is added to the stream (it is scaled, added inside those modules, or not all): its "
            "logits cannot be split into components. patch_blocks shows which blocks matter"
        )
    device = input_device(hooked)
    final = frozen_norm(structure.final_norm, cfg.d_model, cfg.dtype, device)
    if final is None:
        raise PatchError(
            f"the final norm of {name} is no scale times a weight: its logits cannot be split into "
            "components"
        )
    calls = _trace(loaded)
    heads = tuple(_heads(loaded, calls)) if by == HEADS else ()
    tables = _tables(loaded, calls)
    components = [Component("embedding"), *([Component("position")] if tables[1] else [])]
    for block in range(cfg.n_layers):
        if not heads:
            components.append(Component("attention", block))
        else:
            components += [Component("head", block, head) for head in range(heads[block].n)]
            components.append(Component("attention_bias", block))
        components.append(Component("mlp", block))
    components += [Component(kind) for kind in ("norm_bias", "unembedding_bias", "soft_cap")]
    return ComponentMap(loaded, tuple(components), final, heads, *tables)


class _Call(NamedTuple):
    module: nn.Module
    given: Tensor | None
    returned: Tensor


def _trace(loaded: LoadedModel) -> list[_Call]:
    """What every module of the model is given and returns on a few tokens."""
    calls: list[_Call] = []

    def record(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        given = first_tensor(args) if args else first_tensor(kwargs.get("hidden_states"))
        returned = first_tensor(output)
        if returned is not None:
            calls.append(_Call(module, given, returned))

    with ExitStack() as hooks:
        for module in loaded.model.modules():
            hooks.enter_context(module.register_forward_hook(record, with_kwargs=True))
        _run(loaded, *_few_tokens(loaded))
    return calls


def _few_tokens(loaded: LoadedModel) -> tuple[Int[Tensor, "1 pos"], Int[Tensor, "1 pos"]]:
    device = input_device(loaded.hooked)
    tokens = torch.arange(5, device=device)[None] % loaded.hooked.cfg.d_vocab
    return tokens, torch.ones_like(tokens)


def _run(loaded: LoadedModel, tokens: Tensor, mask: Tensor) -> None:
    with evaluating(loaded.hooked):
        loaded.hooked.run_with_hooks(tokens, attention_mask=mask, return_type=None, fwd_hooks=[])


def _heads(loaded: LoadedModel, calls: Sequence[_Call]) -> Iterator[Heads]:
    """The heads of every block.

    Raises:
        PatchError: naming the first block whose attention cannot be split.
    """
    structure, name = loaded.hooked.structure, type(loaded.model).__name__
    patterns = attention_patterns(loaded, *_few_tokens(loaded))
    returned = {id(call.module): call.returned for call in calls}
    for block, (module, pattern) in enumerate(zip(structure.blocks, patterns, strict=True)):
        inside = {id(part) for part in module.modules()} - {id(module)}
        of_block = [call for call in calls if id(call.module) in inside]
        attention = structure.branches[block][0]
        found = None
        if pattern is not None:
            found = _projection(loaded, of_block, returned[id(attention)], pattern.shape[1])
        if found is None:
            why = "returns no attention pattern" if pattern is None else "has no output projection"
            raise PatchError(
                f"block {block} of {name} {why} that tells its heads apart: pass by='branches'"
            )
        yield found


def _projection(
    loaded: LoadedModel, calls: Sequence[_Call], added: Tensor, n_heads: int
) -> Heads | None:
    """From what attention adds to the stream back to the linear map of its heads' outputs."""
    norm_module, norm = None, None
    for _ in range(2):  # at most one norm stands in between
        for call in calls:
            given, returned = call.given, call.returned
            if given is None or not _same(returned, added) or _same(given, returned):
                continue
            whole = any(True for _ in call.module.children())
            if whole and not hasattr(call.module, "base_layer"):
                continue
            if given.shape[-1] % n_heads == 0 and _is_affine(call.module, given):
                return Heads(call.module, norm_module, norm, n_heads)
            if norm is None and given.shape == returned.shape:
                d_model = returned.shape[-1]
                norm = frozen_norm(call.module, d_model, returned.dtype, returned.device)
                if norm is not None:
                    norm_module, added = call.module, given
                    break
    return None


def _same(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.shape == b.shape and bool(torch.equal(a, b)))


def _is_affine(module: nn.Module, x: Tensor) -> bool:
    """Whether f(2x) - f(0) is twice f(x) - f(0), but for rounding."""
    with evaluating(module):
        one, two, none = (module(factor * x).double() for factor in (1.0, 2.0, 0.0))
    allowed = NORM_TOLERANCE.get(x.dtype, HALF_PRECISION_TOLERANCE)
    gap = (two - none - 2 * (one - none)).abs().max()
    return bool(gap <= allowed * two.abs().max().clamp_min(1e-30))


def _tables(
    loaded: LoadedModel, calls: Sequence[_Call]
) -> tuple[nn.Module, nn.Module] | tuple[None, None]:
    """The tables of tokens and of positions, if the first block is given just their sum."""
    tokens = loaded.model.get_input_embeddings()
    first = next(call for call in calls if call.module is loaded.hooked.structure.blocks[0])
    own = next((call.returned for call in calls if call.module is tokens), None)
    if first.given is None or own is None or own.shape != first.given.shape:
        return None, None
    for call in calls:
        is_table = isinstance(call.module, nn.Embedding) and call.module is not tokens
        if is_table and call.returned.shape[-2:] == own.shape[-2:]:
            added = call.returned.expand_as(own)
            if misfit(own, added, torch.zeros_like(own), first.given) <= ROUNDINGS:
                return tokens, call.module
    return None, None


# What they write at some tokens


@dataclass(frozen=True)
class Written:
    """What the components of a model write at n tokens.

    Attributes:
        embedding: what enters the first block, without positions if they are apart.
        position: the positions' part; None if it is not apart.
        attention, mlp: of every block, what is added to the stream.
        z: of every block, the heads' outputs side by side; empty if attention is not split.
        before_norm: of every block with a norm between its heads and the stream, that norm's input.
        last: the stream after the last block.
    """

    embedding: Float[Tensor, "n d_model"]
    position: Float[Tensor, "n d_model"] | None
    attention: Sequence[Float[Tensor, "n d_model"]]
    mlp: Sequence[Float[Tensor, "n d_model"]]
    z: Sequence[Float[Tensor, "n d_heads"]]
    before_norm: Mapping[int, Float[Tensor, "n d_model"]]
    last: Float[Tensor, "n d_model"]


def read_written(
    of: ComponentMap,
    tokens: Int[Tensor, "batch pos"],
    mask: Int[Tensor, "batch pos"],
    where: Bool[Tensor, "batch pos"],
) -> Written:
    """One forward pass; nothing is kept but what is written at chosen tokens."""
    kept: dict[Any, Tensor] = {}

    def keep(key: Any) -> Any:
        def change(value: Tensor) -> None:
            value = value.detach()
            kept[key] = value.expand(len(where), *value.shape[1:])[where.to(value.device)]

        return change

    structure = of.structure
    n_blocks = len(structure.blocks)
    with ExitStack() as hooks:
        hooks.enter_context(on_input(structure.blocks[0], keep("stream")))
        if of.position_table is not None:
            hooks.enter_context(on_output(of.position_table, keep("position")))
        for block, (attention, mlp) in enumerate(structure.branches):
            hooks.enter_context(on_output(attention, keep(("attention", block))))
            hooks.enter_context(on_output(mlp, keep(("mlp", block))))
            if of.heads:
                one = of.heads[block]
                hooks.enter_context(on_input(one.projection, keep(("z", block))))
                if one.norm_module is not None:
                    hooks.enter_context(on_input(one.norm_module, keep(("before", block))))
        hooks.enter_context(on_output(structure.blocks[-1], keep("last")))
        _run(of.loaded, tokens, mask)
    position = kept.get("position")
    stream = kept["stream"]
    return Written(
        stream if position is None else stream - position,
        position,
        [kept["attention", block] for block in range(n_blocks)],
        [kept["mlp", block] for block in range(n_blocks)],
        [kept["z", block] for block in range(n_blocks)] if of.heads else [],
        {block: kept["before", block] for block in range(n_blocks) if ("before", block) in kept},
        kept["last"],
    )


# How it is read


class Readout(NamedTuple):
    """How a model reads its stream for the difference of two logits, its final norm frozen.

    Attributes:
        vector: the difference is its product with the stream, plus the rest below.
        norm_bias, unembedding_bias: what the two biases give.
        soft_cap: what the soft cap of the logits adds to their difference; 0 without one.
        difference: the difference itself.
    """

    vector: Float[Tensor, "n d_model"]
    norm_bias: Float[Tensor, " n"]
    unembedding_bias: Float[Tensor, " n"]
    soft_cap: Float[Tensor, " n"]
    difference: Float[Tensor, " n"]


def read_out(
    of: ComponentMap,
    last: Float[Tensor, "n d_model"],
    plus: Int[Tensor, " n"],
    minus: Int[Tensor, " n"],
) -> Readout:
    """The readout of logit[plus] - logit[minus], float64; as many rows of logits exist as tokens.

    Args:
        of: the model.
        last: the stream after the last block.
        plus, minus: the two tokens of each row.
    """
    hooked = of.loaded.hooked
    row = torch.arange(len(last), device=last.device)
    with evaluating(hooked):
        normed = final_norm(hooked, last)
        nothing = hooked.unembed(torch.zeros_like(normed[:1, None]))[0, 0].double()
        with torch.enable_grad():
            leaf = normed.detach().requires_grad_()
            logits = hooked.unembed(leaf[:, None])[:, 0]
            pulled = logits[row, plus] - logits[row, minus]
            (gradient,) = torch.autograd.grad(pulled.sum(), leaf)
    two = torch.stack([logits.detach()[row, plus], logits.detach()[row, minus]]).double()
    cap = of.structure.soft_cap
    capped = cap * torch.tanh(two / cap) if cap else two
    uncapped, difference = two[0] - two[1], capped[0] - capped[1]
    gradient = gradient.double()
    return Readout(
        of.final.pulled(gradient, last, normed),
        gradient @ of.final.bias,
        nothing[plus] - nothing[minus],
        difference - uncapped,
        difference,
    )


def contributions(
    of: ComponentMap, written: Written, readouts: Float[Tensor, "r n d_model"]
) -> Float[Tensor, "r n component"]:
    """What each component adds to the difference of logits under some readouts, float64.

    The last three components belong to the readout, not to the stream, and are 0 here.
    """

    def product(x: Tensor) -> Tensor:
        return torch.einsum("rnd,nd->rn", readouts, x.double())

    parts = [product(written.embedding)]
    if written.position is not None:
        parts.append(product(written.position))
    for block, (attention, mlp) in enumerate(zip(written.attention, written.mlp, strict=True)):
        if not of.heads:
            parts.append(product(attention))
        else:
            parts += _of_heads(of.heads[block], written, block, readouts).unbind(-1)
        parts.append(product(mlp))
    found = torch.stack(parts, -1)
    return nn.functional.pad(found, (0, 3))


def _of_heads(
    heads: Heads, written: Written, block: int, readouts: Float[Tensor, "r n d_model"]
) -> Float[Tensor, "r n part"]:
    """Every head's contribution, and the biases'.

    The projection is asked for its transpose by a gradient: so adapters, fused and quantised layers
    are read as they are.
    """
    z, bias = written.z[block], torch.zeros(readouts.shape[:2], dtype=torch.float64)
    bias = bias.to(readouts.device)
    if heads.norm is not None:
        bias = bias + readouts @ heads.norm.bias
        readouts = heads.norm.pulled(readouts, written.before_norm[block], written.attention[block])
    with evaluating(heads.projection), torch.enable_grad():
        leaf = z[:, None].detach().requires_grad_()
        made = heads.projection(leaf)
        pulled = [
            torch.autograd.grad(made, leaf, one[:, None].to(made), retain_graph=True)[0][:, 0]
            for one in readouts
        ]
    products = torch.stack(pulled).double() * z.double()
    of_heads = products.view(*products.shape[:-1], heads.n, -1).sum(-1)
    with evaluating(heads.projection):
        bias = bias + readouts @ heads.offset(z).double()
    return torch.cat([of_heads, bias[..., None]], -1)
