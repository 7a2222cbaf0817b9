"""Find the blocks, the final norm and the unembedding of any causal LM by tracing a run.

Module names differ between architectures, the data flow does not: each block takes what the block
before it returned, and the final norm takes what the last block returned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..errors import LoadingError
from ..offloading import device_of

# Two correct sums differ by about one machine epsilon; more than a few means another sum.
ROUNDINGS = 4.0


@dataclass(frozen=True)
class ModelStructure:
    """Where the parts of a causal LM are.

    Attributes:
        blocks: the L transformer blocks, in order.
        branches: per block, the two modules whose outputs it adds to the stream, attention first;
            None if its blocks do not add exactly two (a scaled residual, experts beside an MLP).
        extras: per block, how many values it returns after the residual; None for a plain tensor.
        final_norm: what stands between the last block and the unembedding.
        head: the unembedding.
        logit_scale: constant factor between the unembedding's output and the logits.
        soft_cap: logits are cap · tanh(x / cap); 0 for none.
    """

    blocks: tuple[nn.Module, ...]
    branches: tuple[tuple[nn.Module, nn.Module], ...] | None
    extras: tuple[int | None, ...]
    final_norm: nn.Module
    head: nn.Module
    logit_scale: float
    soft_cap: float

    def logits(self, unembedded: Float[Tensor, "*rows d_vocab"]) -> Float[Tensor, "*rows d_vocab"]:
        """The model's logits from the unembedding's output: scaled, then capped."""
        scaled = unembedded if self.logit_scale == 1.0 else unembedded * self.logit_scale
        cap = self.soft_cap
        return cap * torch.tanh(scaled / cap) if cap else scaled


@dataclass(frozen=True)
class _Call:
    module: nn.Module
    given: Tensor | None
    returned: Tensor | None
    extras: int | None


def first_tensor(value: Any) -> Tensor | None:
    """The tensor that a block passes on: itself, or the first of a tuple."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, tuple | list) and value and isinstance(value[0], Tensor):
        return value[0]
    return None


def find_structure(model: Any) -> ModelStructure:
    """Run four tokens through a Hugging Face causal LM (or PeftModel) and read its structure.

    It is found once: a model that is asked about again is not run, unless a module of it was
    added, removed or exchanged meanwhile.

    Raises:
        LoadingError: if no stack of blocks, or no path from it to the logits, is found.
    """
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    known = _KNOWN.get(plain)
    if known is None or not known.is_current(plain):
        known = _Known(_traced_structure(plain), [ref(module) for module in plain.modules()])
        _KNOWN[plain] = known
    return known.structure


@dataclass(frozen=True)
class _Known:
    """A structure that was found, and all modules of the model at that time, in order.

    References are weak: the number of a module that is gone may be given to another one.
    """

    structure: ModelStructure
    modules: Sequence[ref[nn.Module]]

    def is_current(self, model: nn.Module) -> bool:
        """Whether the model still has exactly these modules."""
        now = list(model.modules())
        return len(now) == len(self.modules) and all(
            reference() is module for reference, module in zip(self.modules, now, strict=True)
        )


_KNOWN: WeakKeyDictionary[nn.Module, _Known] = WeakKeyDictionary()


@torch.no_grad()
def _traced_structure(plain: Any) -> ModelStructure:
    if not hasattr(getattr(plain, "config", None), "get_text_config"):
        raise LoadingError(f"expected a PreTrainedModel or a PeftModel, got {type(plain).__name__}")
    config = plain.config.get_text_config()
    head = plain.get_output_embeddings()
    kind = type(plain).__name__
    if head is None:
        raise LoadingError(f"{kind} has no unembedding (output embeddings): not a language model")
    stacks = [
        m
        for m in plain.modules()
        if isinstance(m, nn.ModuleList) and len(m) == config.num_hidden_layers
    ]
    calls = _trace(plain)
    for stack in stacks:
        outputs = _outputs_in_order(stack, calls)
        if outputs is None:
            continue
        # What an adapter wraps the unembedding around is inside it, too.
        inside = {id(m) for part in (*stack, head) for m in part.modules()} - {id(head)}
        final_norm = _tail(calls, outputs[-1], head, inside)
        if final_norm is not None:
            if head.weight.shape[-1] != outputs[-1].shape[-1]:
                raise LoadingError(
                    f"{kind} unembeds vectors of {head.weight.shape[-1]} numbers from a stream of "
                    f"{outputs[-1].shape[-1]}: not supported"
                )
            scale, cap = _logit_map(plain, head, kind)
            by_module = {id(call.module): call for call in calls}
            return ModelStructure(
                blocks=tuple(stack),
                branches=_branches(stack, by_module),
                extras=tuple(by_module[id(block)].extras for block in stack),
                final_norm=final_norm,
                head=head,
                logit_scale=scale,
                soft_cap=cap,
            )
    raise LoadingError(
        f"cannot find the residual stream of {kind}: expected {config.num_hidden_layers} blocks, "
        "each taking what the block before it returned, then a norm and the unembedding"
    )


def _trace(model: Any) -> list[_Call]:
    """What every module takes and returns while the model runs."""
    calls: list[_Call] = []

    def record(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        given = first_tensor(args) if args else first_tensor(kwargs.get("hidden_states"))
        extras = len(output) - 1 if isinstance(output, tuple | list) else None
        calls.append(_Call(module, given, first_tensor(output), extras))

    handles = [m.register_forward_hook(record, with_kwargs=True) for m in model.modules()]
    try:
        _run(model)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _run(model: Any) -> Float[Tensor, "batch pos d_vocab"]:
    """Logits of four tokens."""
    weight = model.get_input_embeddings().weight
    tokens = torch.arange(len(PROBES), device=device_of(model))[None] % weight.shape[0]
    logits: Tensor = model(
        input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False
    ).logits
    return logits


def _outputs_in_order(stack: nn.ModuleList, calls: list[_Call]) -> list[Tensor] | None:
    outputs: list[Tensor] = []
    by_module = {id(call.module): call for call in calls}
    for block in stack:
        call = by_module.get(id(block))
        if call is None or call.given is None or call.returned is None:
            return None
        if outputs and not _same(call.given, outputs[-1]):
            return None
        outputs.append(call.returned)
    return outputs


def _branches(
    stack: nn.ModuleList, calls: dict[int, _Call]
) -> tuple[tuple[nn.Module, nn.Module], ...] | None:
    """What each block adds to the stream: the two parts of it that sum to output - input."""
    pairs = [_added_pair(block, calls) for block in stack]
    return tuple(pair for pair in pairs if pair) if all(pairs) else None


def _added_pair(block: nn.Module, calls: dict[int, _Call]) -> tuple[nn.Module, nn.Module] | None:
    own = calls[id(block)]
    if own.given is None or own.returned is None:
        return None
    parts = {id(part) for part in block.children()}
    # In the order in which they ran: attention comes first, whatever it is called.
    added = [
        (call.module, call.returned)
        for call in calls.values()
        if id(call.module) in parts
        and call.returned is not None
        and call.returned.shape == own.returned.shape
    ]
    fits = {
        (first, second): misfit(own.given, one, two, own.returned)
        for (first, one), (second, two) in combinations(added, 2)
    }
    best = min(fits, key=fits.__getitem__, default=None)  # the first of several
    return best if best is not None and fits[best] <= ROUNDINGS else None


def misfit(given: Tensor, one: Tensor, two: Tensor, returned: Tensor) -> float:
    """How far given + one + two is from what was returned, in roundings of its largest term.

    Element by element: relative to one huge activation, all other differences would vanish.
    """
    terms = torch.stack([given, one, two]).double()
    gap = (terms.sum(0) - returned.double()).abs()
    rounding = torch.finfo(returned.dtype).eps * terms.abs().sum(0)
    finite = torch.isfinite(gap) & torch.isfinite(rounding)
    gap, rounding = gap[finite], rounding[finite]
    return float((gap / rounding.clamp_min(1e-300)).max()) if len(gap) else 0.0


def _tail(calls: list[_Call], last: Tensor, head: nn.Module, inside: set[int]) -> nn.Module | None:
    """The modules that lead from the last block to the head."""
    chain: list[nn.Module] = []
    current = last
    for call in calls:
        if id(call.module) in inside or call.given is None or call.returned is None:
            continue
        # A stream in float32 over weights in half precision, as Mamba's, is cast before the head.
        if not _same(call.given, current.to(call.given.dtype)):
            continue
        if call.module is head:
            return chain[0] if len(chain) == 1 else nn.Sequential(*chain)
        chain.append(call.module)
        current = call.returned
    return None


def _same(a: Tensor, b: Tensor) -> bool:
    if a is b:
        return True
    # NaN counts as equal here: the pass over the texts names the block that makes it.
    alike = a.shape == b.shape and a.dtype == b.dtype
    return alike and torch.allclose(a, b, rtol=0.0, atol=0.0, equal_nan=True)


# What the unembedding is made to give, row by row: small enough for any cap to leave it as it is,
# the size of usual logits, large enough to be cut to the cap.
PROBES = (0.01, 1.0, 20.0, 20_000.0)


def _logit_map(model: nn.Module, head: nn.Module, kind: str) -> tuple[float, float]:
    """(scale, soft cap) that turn the unembedding's output into the logits.

    Read off known numbers put in the place of the unembedding's output: a model's own logits may be
    so small that no cap shows in them, and configurations have several names for one.
    """
    given: list[Tensor] = []

    def replace(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        spread = torch.linspace(-1, 1, output.shape[-1], device=output.device)
        sizes = torch.tensor(PROBES, device=output.device)
        given.append((sizes[:, None] * spread)[: output.shape[-2]].expand_as(output).to(output))
        return given[-1]

    handle = head.register_forward_hook(replace)
    try:
        made = _run(model).double()
    finally:
        handle.remove()
    if len(given) == 1 and made.shape == given[0].shape:
        put = given[0].double()
        scale = float((put[..., 0, :] @ made[..., 0, :].mT) / put[..., 0, :].square().sum())
        highest = float(made[..., -1, :].abs().max())
        cap = highest if highest < 0.5 * abs(scale) * PROBES[-1] else 0.0
        scale = 1.0 if abs(scale - 1) < 1e-5 else scale
        scaled = scale * put
        expected = cap * torch.tanh(scaled / cap) if cap else scaled
        pairs = zip(expected.unbind(-2), made.unbind(-2), strict=True)
        if all(_close(a.to(given[0]), b.to(given[0])) for a, b in pairs):
            return scale, cap
    raise LoadingError(
        f"the logits of {kind} are neither a multiple nor a soft cap of the unembedding's output: "
        "this architecture is not supported"
    )


def _close(a: Tensor, b: Tensor) -> bool:
    tolerance = 1e-5 if a.dtype == torch.float32 else 2e-2
    finite = torch.isfinite(a) & torch.isfinite(b)
    if not bool(finite.any()):
        return True
    a, b = a[finite], b[finite]
    span = float(b.abs().max())
    return bool(((a - b).abs() <= tolerance * max(span, 1e-6)).all())
