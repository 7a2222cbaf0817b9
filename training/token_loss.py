"""The loss over every next token, in slices of the logits where the unembedding is frozen.

The logits of a batch, their softmax and its gradient are the largest tensors of a training step,
and on small models take most of its time. If the unembedding is not trained, only the gradient
with respect to the residual stream is needed. It can be computed from a few rows of logits at a
time, so the logits of a whole batch never exist.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from ..models.structure import find_structure
from ..statistics.distances import BITS_PER_NAT

# A slice of float32 logits has so many bytes, and at least so many rows: a product of fewer rows
# reads the whole unembedding for little work. At 128k tokens that is 125 MiB, or 500 on a GPU.
CHUNK_BYTES = 4 * 2**20
CHUNK_ROWS, CHUNK_ROWS_ON_GPU = 256, 1024

Unembed = Callable[[Float[Tensor, "n d_model"]], Float[Tensor, "n d_vocab"]]


class TokenLoss:
    """Summed cross-entropy of every next token of a batch, in nats.

    Args:
        model: plain model or PeftModel, with `requires_grad` set as it will be trained.
    """

    def __init__(self, model: nn.Module) -> None:
        self._structure = find_structure(model)
        self._head = self._structure.head
        # A head that shares its weight with the embedding is trained if the embedding is.
        self.head_is_frozen = not any(p.requires_grad for p in self._head.parameters())

    def __call__(
        self,
        model: nn.Module,
        tokens: Int[Tensor, "batch pos"],
        counted: Bool[Tensor, "batch pos"] | None = None,
    ) -> Float[Tensor, ""]:
        """Run the model and sum the loss of all tokens but the first of each sequence.

        Args:
            model: the model as the Trainer wraps it.
            tokens: ids; padding, if any, at the ends and not counted.
            counted: which tokens the loss is on; None for all.
        """
        wanted = slice(None) if counted is None else counted[:, 1:].flatten()
        targets = tokens[:, 1:].flatten()[wanted]
        if not self.head_is_frozen:
            logits = model(input_ids=tokens, use_cache=False).logits
            return _cross_entropy(logits[:, :-1].flatten(0, 1)[wanted], targets)
        # The model's own unembedding of a whole batch would be wasted: it gets one position, and
        # the states are unembedded here, slice by slice.
        with last_position_only(self._head) as unembedded:
            model(input_ids=tokens, use_cache=False)
        states = unembedded[0][:, :-1].flatten(0, 1)[wanted]
        weight: Any = self._head.weight
        fewest = CHUNK_ROWS if states.device.type == "cpu" else CHUNK_ROWS_ON_GPU
        rows = max(fewest, CHUNK_BYTES // (4 * weight.shape[0]))
        loss: Tensor = _FrozenHeadLoss.apply(states, targets, self._unembed, rows)
        return loss

    def _unembed(self, states: Float[Tensor, "n d_model"]) -> Float[Tensor, "n d_vocab"]:
        return self._structure.logits(self._head(states))


def _cross_entropy(
    logits: Float[Tensor, "n d_vocab"], targets: Int[Tensor, " n"]
) -> Float[Tensor, ""]:
    # In bfloat16, with its 8 bits of precision, the loss would stop falling long before zero.
    return functional.cross_entropy(logits.float(), targets, reduction="sum")


class _FrozenHeadLoss(torch.autograd.Function):
    """The summed loss, with its gradient computed in the forward pass.

    Autograd would store the logits of all slices until the backward pass. Here each slice is
    differentiated at once, and only the gradient with respect to `states` is stored. That is
    possible because the loss is a scalar: whatever happens to it afterwards multiplies its
    gradient by one number.
    """

    @staticmethod
    def forward(
        ctx: Any,
        states: Float[Tensor, "n d_model"],
        targets: Int[Tensor, " n"],
        unembed: Unembed,
        rows: int,
    ) -> Float[Tensor, ""]:
        gradients: list[Tensor] = []
        total = torch.zeros((), dtype=torch.float32, device=states.device)
        for start in range(0, len(states), rows):
            with torch.enable_grad():
                leaf = states[start : start + rows].detach().requires_grad_()
                logits = unembed(leaf)
            # Overwrites the logits, whose values the unembedding's backward pass does not need.
            loss, by_logits = loss_and_gradient_(
                logits.detach().float(), targets[start : start + rows]
            )
            gradients += torch.autograd.grad(logits, leaf, by_logits.to(logits.dtype))
            total += loss
        ctx.save_for_backward(torch.cat(gradients))
        return total

    @staticmethod
    def backward(ctx: Any, *outer: Float[Tensor, ""]) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * outer[0].to(gradient.dtype), None, None, None


def loss_and_gradient_(
    logits: Float[Tensor, "n d_vocab"], targets: Int[Tensor, " n"]
) -> tuple[Float[Tensor, ""], Float[Tensor, "n d_vocab"]]:
    """Summed cross-entropy in nats, and its gradient, which overwrites the logits.

    The loss of a row is log(sum(exp(logits))) - logits[target]; its gradient is softmax(logits),
    minus 1 at the target. Powers are taken to base 2, because exp2 is several times faster than
    exp on a CPU.

    >>> loss, gradient = loss_and_gradient_(torch.zeros(1, 4), torch.tensor([2]))
    >>> round(float(loss), 4), gradient.tolist()
    (1.3863, [[0.25, 0.25, -0.75, 0.25]])
    """
    # Less the largest logit of the row, so that no power overflows.
    bits = logits.sub_(logits.amax(-1, keepdim=True)).mul_(BITS_PER_NAT)
    column = targets[:, None]
    at_target = bits.gather(-1, column)
    weights = bits.exp2_()
    total = weights.sum(-1, keepdim=True)
    loss = (total.log2() - at_target).sum() / BITS_PER_NAT
    gradient = weights.div_(total)
    gradient.scatter_add_(-1, column, torch.full_like(at_target, -1.0))
    return loss, gradient


@contextmanager
def last_position_only(head: nn.Module) -> Iterator[list[Float[Tensor, "batch pos d_model"]]]:
    """Let the unembedding compute logits for the last position only, which saves time and memory.

    Yields:
        A list that holds, after each forward pass, the states of all positions that the model
        passed to the unembedding.
    """
    states: list[Tensor] = []

    def cut(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        states[:] = [args[0]]
        return (args[0][:, -1:], *args[1:])

    handle = head.register_forward_pre_hook(cut)
    try:
        yield states
    finally:
        handle.remove()
